"""Real processes over gloo see the same samples, come to the same losses, and leave checkpoints for any number."""

import shutil

import pytest
import torch

from intarsia.arch import Attention, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json
from intarsia.formats import load
from intarsia.train.loop import losses, train
from intarsia.train.tensor import narrowed
from tiny_training import make_material, read, torchrun

LOW = 'precision.dtype="bfloat16"'


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    torch.set_num_threads(1)
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    train(read(recipe), out)
    return out


def figures(run):
    return [[row["loss"], row["gradient_norm"]] for row in losses(run)]


def close(one, other):
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def together(recipe, tmp_path_factory):
    """The same run by two ranks: sharing the samples, sharing the blocks, and in bfloat16 from a checkpoint of one."""
    folder = tmp_path_factory.mktemp("together")
    train(read(recipe, LOW), folder / "low")
    before = figures(folder / "low")
    forget(folder / "low")
    said = torchrun(
        2, [recipe, "--out", folder / "data"], [recipe, "--out", folder / "tensor", "--set", "parallel.tensor=2"],
        [recipe, "--out", folder / "low", "--set", LOW],
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-3000:]
    return folder, before


def forget(run):
    """Go back to the checkpoint at step 12."""
    for step in (16, 20):
        shutil.rmtree(run / "checkpoints" / f"step_{step:09d}")
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()


@pytest.mark.parametrize("shared", ["data", "tensor"])
def test_two_ranks_do_what_one_does_and_one_goes_on(recipe, alone, together, shared):
    run = together[0] / shared
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
    assert losses(run)[0]["step"] == 12
    close(figures(run), figures(alone)[12:])


def test_bfloat16_goes_on_with_two_ranks_from_what_one_wrote(together):
    folder, before = together
    rows = losses(folder / "low")
    assert [row["step"] for row in rows] == list(range(12, 20))
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in before[12:]], rel=5e-3)
    assert load(folder / "low" / "model", dtype=None)[0].dtype == torch.bfloat16


def test_widths_that_do_not_divide_are_a_sentence():
    assert narrowed(Mamba2(4, 16, 16, 2), 2)[0] == Mamba2(2, 16, 16, 1, norm_groups=1)
    with pytest.raises(IntarsiaError, match="num_groups = 1"):
        narrowed(Mamba2(4, 16, 16, 1), 2)
    with pytest.raises(IntarsiaError, match="num_kv_heads = 2"):
        narrowed(Attention(8, 2, 16), 4)
    with pytest.raises(IntarsiaError, match=r"parallel\.tensor = 1"):
        narrowed(Attention(8, 2, 16, qk_norm=True), 2)
