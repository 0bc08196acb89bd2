"""Real processes over gloo see the same samples, come to the same losses, and leave checkpoints for any number."""

import shutil
from pathlib import Path

import pytest
import torch

from intarsia.arch import Attention, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json
from intarsia.base.runfolder import losses
from intarsia.formats import load
from intarsia.ops.fp8 import FORWARD, Fp8Weight, linear_fp8, quantise
from intarsia.train.fp8 import Fp8Projection, gather_in_fp8
from intarsia.train.loop import train
from intarsia.train.parallel import shard_root
from intarsia.train.ranks import joined
from intarsia.train.tensor import narrowed
from tiny_training import command, make_dialogues, read, shared_recipe, together, torchrun, undisturbed

LOW = 'precision.dtype="bfloat16"'
FP8 = (LOW, "precision.fp8=true", "precision.fp8_keep=1", "data.tokens=384")
DPO = ('loss.preference.kind="dpo"', "optimizer.lr=1e-3", "data.tokens=1536")


def figures(run):
    return [[row["loss"], row["gradient_norm"]] for row in losses(run)]


def close(one, other):
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-6)


def by_two(recipe, run, *changes):
    """The run by two ranks."""
    words = ["train", recipe, "--out", run, *(word for c in changes for word in ("--set", c))]
    together(2, command(words), Path(f"{run}-said"))
    return run


def forget(run):
    """Go back to the checkpoint before the last."""
    shutil.rmtree(run / "checkpoints" / "step_000000010")
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()


@pytest.mark.parametrize("shared", ["data", "tensor"])
def test_two_ranks_do_what_one_does_and_one_goes_on(shared, tmp_path):
    recipe, alone = shared_recipe(), undisturbed()
    run = by_two(recipe, tmp_path / "run", f"parallel.tensor={2 if shared == 'tensor' else 1}")
    close(figures(run), figures(alone))
    one, two = (load(path / "model")[0].state_dict() for path in (alone, run))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    for name in ("all", "command"):
        ours, theirs = (read_json(path / "summary.json")["bits_per_byte"][name] for path in (run, alone))
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-4) and ours["n"] == theirs["n"]
    forget(run)  # what two have written, one continues
    train(read(recipe), run)
    assert losses(run)[0]["step"] == 8
    close(figures(run), figures(alone)[8:])


def test_bfloat16_goes_on_with_two_ranks_from_what_one_wrote(tmp_path):
    run = tmp_path / "run"
    train(read(shared_recipe(), LOW), run)
    before = figures(run)
    forget(run)
    by_two(shared_recipe(), run, LOW)
    rows = losses(run)
    assert [row["step"] for row in rows] == [8, 9]
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in before[8:]], rel=5e-3)
    assert load(run / "model", dtype=None)[0].dtype == torch.bfloat16


def one_layer():
    """On three ranks, whose shards of 32 rows are not equal: what a layer multiplies by, and its gradient."""
    torch.manual_seed(0)
    layer, x, seen = Fp8Projection(16, 32, bias=False), torch.randn(8, 16).bfloat16(), []
    layer.weight.data[31] *= 3  # the largest magnitude is in the last shard
    plain = layer.weight.detach().bfloat16().requires_grad_()
    with joined() as ranks:
        shard_root(layer, torch.bfloat16, ranks)
        gather_in_fp8(layer)
        layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight))
        for _ in range(2):  # gathered for the first time, and again
            y, expected = layer(x), linear_fp8(x, plain)
            wanted = quantise(plain, FORWARD)
            assert isinstance(seen[-1], Fp8Weight) and seen[-1].dtype == torch.bfloat16
            assert torch.equal(seen[-1].scaled.data.view(torch.uint8), wanted.data.view(torch.uint8))
            assert seen[-1].scaled.scale == wanted.scale and torch.equal(y, expected)
            (y.float() ** 2).sum().backward()
            (expected.float() ** 2).sum().backward()
            own = plain.grad.float().chunk(3)[ranks.rank]
            torch.testing.assert_close(layer.weight.grad.to_local(), own, rtol=1e-6, atol=0)
            layer.weight.grad = plain.grad = None


def test_a_weight_is_gathered_in_fp8_and_again(tmp_path):
    together(3, one_layer, tmp_path / "said")


def test_weights_gathered_in_fp8_give_the_same_bits(tmp_path):
    plain = by_two(shared_recipe(), tmp_path / "plain", *FP8, "precision.fp8_gather=false")
    ours = by_two(shared_recipe(), tmp_path / "ours", *FP8)
    assert figures(ours) == figures(plain) and len(figures(ours)) == 3
    one, other = (run / "model" / "model.safetensors" for run in (ours, plain))
    assert one.read_bytes() == other.read_bytes()


def test_preferences_by_two_ranks_are_those_of_one(tmp_path):
    recipe = make_dialogues(tmp_path)["preferences"]
    train(read(recipe, *DPO), tmp_path / "alone")
    run = by_two(recipe, tmp_path / "run", *DPO)
    close(figures(run), figures(tmp_path / "alone"))
    ours, theirs = (read_json(path / "summary.json")["accuracy"] for path in (run, tmp_path / "alone"))
    assert ours == theirs


@pytest.mark.slow
def test_torchrun_itself(tmp_path):
    said = torchrun(2, ["train", shared_recipe(), "--out", tmp_path / "run", "--set", "data.tokens=256"])
    assert said.returncode == 0, said.stderr[-3000:]
    assert len(losses(tmp_path / "run")) == 2


def test_widths_that_do_not_divide_are_a_sentence():
    assert narrowed(Mamba2(4, 16, 16, 2), 2)[0] == Mamba2(2, 16, 16, 1, norm_groups=1)
    with pytest.raises(IntarsiaError, match="num_groups = 1"):
        narrowed(Mamba2(4, 16, 16, 1), 2)
    with pytest.raises(IntarsiaError, match="num_kv_heads = 2"):
        narrowed(Attention(8, 2, 16), 4)
    with pytest.raises(IntarsiaError, match=r"parallel\.tensor = 1"):
        narrowed(Attention(8, 2, 16, qk_norm=True), 2)
