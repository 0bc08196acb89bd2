"""What matters to int4+: the Fisher's diagonal of models and options, where it is kept, and a run that is killed."""

import copy
import shutil
import signal
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from compress_toys import ALL, LADDER, PLAIN, statistics, tokens, toy
from intarsia.arch import Architecture, Attention, Experts, FeedForward, Linear, Mamba2
from intarsia.base.files import read_json
from intarsia.compress.assemble import as_run
from intarsia.compress.library import Builder, Library, unpacked
from intarsia.compress.options import options_for
from intarsia.compress.recipe import Library as Recipe
from intarsia.compress.sensitivity import importance_of, of_model, of_option, passes
from intarsia.formats import load, save
from intarsia.model import Decoder, pack_weights
from intarsia.model.packed import matrices
from intarsia.ops.packed import DENSE_SPARSE, unpack
from tiny_compression import compress, make_parent, make_recipe, make_text, start

MIXED = Architecture(
    blocks=(Attention(4, 2, 8, qkv_bias=True), FeedForward(48), Mamba2(4, 8, 8, 2), Linear(bias=True),
            Experts(4, 2, 16, 24), FeedForward(40, "relu2", gated=False, bias=True)),
    hidden_size=32, vocab_size=61, max_positions=64, rope=PLAIN.rope,
)  # fmt: skip
ARCHITECTURES = ALL | {"mixed": MIXED}
ASKED = LADDER.model_copy(update={"mamba": True, "precisions": ("int8", DENSE_SPARSE)})


def by_autograd(model: Decoder, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean over sequences of every matrix's squared gradient, (O, I) float64, one whole backward pass after another."""
    twin = copy.deepcopy(model).requires_grad_(True)
    found = {}
    for row in ids:
        twin.zero_grad()
        F.cross_entropy(twin(row[None])[0, :-1], row[1:]).backward()
        for name, parameter in twin.named_parameters():
            if parameter.grad is not None:
                found[name] = found.get(name, 0) + parameter.grad.double().square() / len(ids)
    return found


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_fisher_is_that_of_one_sequence_after_another(name):
    model, ids = toy(ARCHITECTURES[name]), tokens(5)
    model.blocks[1].mixer.down.weight.requires_grad_(True)  # a student in training
    wanted, found = by_autograd(model, ids), of_model(model, ids, range(len(model.blocks)))
    for index, block in enumerate(model.blocks):
        assert list(found[index]) == [matrix for matrix, _ in matrices(block)]
        for matrix, sums in found[index].items():
            exact = wanted[f"blocks.{index}.{matrix}.weight"].sum(0)
            assert sums.dtype == torch.float32 and sums.min() >= 0
            assert (sums - exact).norm() < 1e-4 * exact.norm() and exact.norm() > 0
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["blocks.1.mixer.down.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert list(of_model(model, ids, [1])) == [1] and of_model(model, ids, []) == {}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_parents_own_blocks_have_the_parents_fisher(name):
    model, ids = toy(ARCHITECTURES[name]), tokens(3)
    everywhere = range(len(model.blocks))
    passed, wanted = passes(model, ids, everywhere), of_model(model, ids, everywhere)
    for index, block in enumerate(model.blocks):
        found = of_option(block, model, passed[index])
        for matrix, sums in wanted[index].items():
            assert (found[matrix] - sums).norm() <= 1e-4 * sums.norm()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    model, folder = toy(PLAIN), tmp_path_factory.mktemp("library")
    options = {i: options_for(block, ASKED) for i, block in enumerate(PLAIN.blocks)}
    made = Builder(model, unpacked(options), statistics(model, 4), Recipe(tokens=0), "refit", folder)
    losses = made.losses(tokens())
    made.store(losses, losses)
    return model, options, Library.open(folder, model)


def test_every_option_has_what_the_parents_gradient_says(library):
    """Narrower, with fewer heads, a Mamba-2 block in place of attention: against the gradient of <y, g> by hand."""
    model, options, held = library
    ids = tokens(3)
    passed, methods = passes(model, ids, range(4)), set()
    for index, specs in options.items():
        for spec in (s for s in specs if s.precision == DENSE_SPARSE):
            block = copy.deepcopy(held.block(index, spec.base)).requires_grad_(True)
            sums = {name: 0.0 for name, _ in matrices(block)}
            for x, g in passed[index]:
                block.zero_grad()
                tables = model.rope_tables(0, x.shape[1]).get(getattr(block.spec, "head_dim", 0))
                (block(x, tables).double() * g).sum().backward()
                sums = {n: sums[n] + m.weight.grad.double().square().sum(0) / 3 for n, m in matrices(block)}
            found = of_option(held.block(index, spec.base), model, passed[index])
            assert set(found) == set(sums)
            for name, exact in sums.items():
                assert (found[name] - exact).norm() < 1e-4 * exact.norm(), spec.name
            methods.add(spec.method)
    assert {"parent", "prefix", "drop", "mamba", "linear"} <= methods


def test_what_matters_is_kept_better(library):
    """On text that was not looked at, the loss is hurt less than by int4+ that knows of nothing, and than by int4."""
    model, *_ = library
    found = of_model(model, tokens(24, seed=1), range(4))
    hurt = {}
    with torch.no_grad():
        wanted = F.log_softmax(model(tokens(24, seed=2)).double(), -1)
        ways = {"int4": ("int4", {}), "blind": (DENSE_SPARSE, {}), "fisher": (DENSE_SPARSE, found)}
        for name, (kind, importance) in ways.items():
            got = F.log_softmax(as_run(model, [kind] * 4, importance)(tokens(24, seed=2)).double(), -1)
            hurt[name] = float((wanted.exp() * (wanted - got)).sum(-1).mean())
    assert 0 < hurt["fisher"] < hurt["blind"] < hurt["int4"]


def test_a_checkpoint_keeps_what_matters(tmp_path):
    model = toy(MIXED, dtype=torch.bfloat16)
    kinds = [DENSE_SPARSE, "int8", DENSE_SPARSE, "bf16", DENSE_SPARSE, DENSE_SPARSE]
    found = of_model(model, tokens(2), [i for i, kind in enumerate(kinds) if kind == DENSE_SPARSE])
    save(model, tmp_path / "child", weights=kinds, importance=found)
    again, _ = load(tmp_path / "child", weights="recorded")
    for packed, rounded in zip(again.blocks, as_run(model, kinds, found).blocks):
        for (_, matrix), (name, wanted) in zip(_packed(packed), matrices(rounded), strict=True):
            assert torch.equal(matrix.weight.bfloat16(), wanted.weight), name
    other, _ = load(tmp_path / "child", weights=DENSE_SPARSE)  # what was found is of use there too
    twin = pack_weights(load(tmp_path / "child")[0], DENSE_SPARSE, found)
    blind = pack_weights(load(tmp_path / "child")[0], DENSE_SPARSE)
    for index, same in ((4, True), (5, True)):
        for (_, a), (_, b), (_, c) in zip(*(_packed(m.blocks[index]) for m in (other, twin, blind)), strict=True):
            assert torch.equal(unpack(a.packed), unpack(b.packed)) == same and not torch.equal(a.weight, c.weight)
    save(model, tmp_path / "child", weights=["int8"] * 6)
    assert not (tmp_path / "child" / "sensitivity.safetensors").exists()


def _packed(block):
    return [(name, module) for name, module in block.named_modules() if hasattr(module, "packed")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(a run with int4+ among its precisions, one that was killed amid the sensitivities and went on)."""
    folder = tmp_path_factory.mktemp("runs")
    parent, recipe = make_parent(folder / "parent"), make_recipe(folder / "tiny.toml", make_text(folder / "text"))
    quick = ("cost.repeats=1", "cost.calibration=0", "library.tokens=256", "tournament.finalists=2",
             "search.solutions=1", "distill.tokens=256", "evaluate.tokens=256", "options.ffn_widths=[0.5]",
             'options.precisions=["int8","int4+"]', "options.linear=false", "dtype=bfloat16",
             "sensitivity.tokens=128")  # fmt: skip
    settings = [word for setting in quick for word in ("--set", setting)]
    words = [parent, "--recipe", recipe, *settings, "--memory", "220kB", "--out"]
    status, _, err = compress(*words, folder / "whole")
    assert status == 0, err
    process, first = start(*words, folder / "killed"), folder / "killed/stages/sensitivity/block_000.safetensors"
    while not first.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert first.exists() and not (folder / "killed" / "summary.json").exists()
    status, _, err = compress(*words, folder / "killed")
    assert status == 0, err
    return folder / "whole", folder / "killed"


def test_a_run_chooses_and_keeps_it(runs, tmp_path):
    whole, _ = runs
    kinds = read_json(whole / "child" / "config.json")["block_weights"]
    assert DENSE_SPARSE in kinds
    held = read_json(whole / "summary.json")["memory_bytes"]
    assert held["child"] == held["predicted"] <= 220_000 < held["parent"]
    child, loose = (load(whole / "child", weights=weights)[0] for weights in ("recorded", None))
    kept, index = load_file(whole / "child" / "sensitivity.safetensors"), kinds.index(DENSE_SPARSE)
    for (_, mine), (name, learned) in zip(_packed(child.blocks[index]), matrices(loose.blocks[index]), strict=True):
        assert kept[f"{index}/{name}"].shape == (learned.weight.shape[1],) and kept[f"{index}/{name}"].amax() > 0
        off = unpack(mine.packed) - learned.weight.float()  # it runs as it learned
        assert off.norm() < 2**-7 * learned.weight.float().norm()
    # What has been learned rounded is found again whatever matters; what has moved is not.
    moved = shutil.copytree(whole / "child", tmp_path / "moved")
    weights, generator = load_file(moved / "model.safetensors"), torch.Generator().manual_seed(0)
    for weight in weights.values():
        noise = torch.randn(weight.shape, generator=generator)
        weight += (0.1 * weight.float().std() * noise).to(weight.dtype) if weight.dim() == 2 else 0
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    child, _ = load(moved, weights="recorded")
    blind = pack_weights(load(moved)[0], kinds)
    assert child.blocks[index].spec == blind.blocks[index].spec
    pairs = zip(_packed(child.blocks[index]), _packed(blind.blocks[index]), strict=True)
    assert not any(torch.equal(a.weight, b.weight) for (_, a), (_, b) in pairs)
    files = sorted(file.name for file in (whole / "stages" / "sensitivity").glob("*.safetensors"))
    assert files == [f"block_{n:03}.safetensors" for n in range(8)]
    spec = next(s for s in options_for(FeedForward(192), ASKED) if s.name == f"parent {DENSE_SPARSE}")
    assert set(importance_of(whole / "stages" / "sensitivity", 1, spec)) == {"mixer.gate", "mixer.up", "mixer.down"}


def test_a_killed_run_ends_as_an_undisturbed_one(runs):
    whole, killed = runs
    for name in ("model.safetensors", "sensitivity.safetensors", "config.json"):
        assert (whole / "child" / name).read_bytes() == (killed / "child" / name).read_bytes(), name
    for file in (whole / "stages" / "sensitivity").glob("*.safetensors"):
        assert file.read_bytes() == (killed / "stages" / "sensitivity" / file.name).read_bytes()
    for stage in ("sensitivity", "score", "distill-child"):
        a, b = (read_json(run / "stages" / stage / "done.json")["fingerprint"] for run in runs)
        assert a == b
