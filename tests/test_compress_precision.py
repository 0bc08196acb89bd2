"""Bits as an axis of the search: exact bytes, scores of rounded weights, blocks and bits chosen jointly, and run so."""

import json
import math
import random

import pytest
import torch

import intarsia
from compress_toys import LADDER, PLAIN, sites, statistics, tokens, toy
from intarsia.arch import Architecture, Attention, FeedForward, Linear, Mamba2
from intarsia.compress.assemble import as_run, assemble, independent, precisions, unpacked_choice
from intarsia.compress.baselines import brute_force
from intarsia.compress.calibrate import Ground
from intarsia.compress.controls import control_choice
from intarsia.compress.library import Builder, Library, unpacked
from intarsia.compress.measure import PHASES, CostTable, distinct, key, measure_costs
from intarsia.compress.options import Quantised, options_for
from intarsia.compress.problem import choice_of, make_problem, pair_name
from intarsia.compress.recipe import Library as Recipe
from intarsia.compress.score import Scorer, compose, score_library
from intarsia.compress.solve import solve, total_costs
from intarsia.compress.targets import Problem, Target
from intarsia.engine.scenario import Scenario
from intarsia.formats import load, save
from intarsia.model import Decoder, initialise, pack_weights, weight_bytes
from intarsia.model.packed import packed_block_bytes, packed_outer_bytes
from intarsia.ops.packed import KINDS, pack, unpack
from tiny_compression import compress, make_parent, make_recipe, make_text

SCENARIO = Scenario(1, 12, 6)
FEW = LADDER.model_copy(update={"ffn_widths": (0.5,), "kv_methods": ("aligned",), "linear": False})
BITS_ALONE = {"parent", "int8", "int4", "|"}  # words in the names of the parent's own blocks in all precisions
BITS = FEW.model_copy(update={"precisions": ("int8", "int4")})
MIXED = Architecture(
    blocks=(Attention(6, 2, 8, qkv_bias=True), FeedForward(72), Mamba2(4, 24, 16, 2), Linear(bias=True),
            FeedForward(50, "relu2", gated=False, bias=True), Attention(3, 3, 16, qk_norm=True)),
    hidden_size=48, vocab_size=97, max_positions=64, rope=PLAIN.rope,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_bytes_are_those_of_the_packed_model(dtype, tied):
    arch, draw = MIXED.replace(tied_embeddings=tied), random.Random(0)
    for _ in range(4):
        kinds = [draw.choice(KINDS) for _ in arch.blocks]
        model = pack_weights(initialise(Decoder(arch, dtype)), kinds)
        counted = sum(packed_block_bytes(b, arch, kind, dtype) for b, kind in zip(arch.blocks, kinds))
        assert counted + packed_outer_bytes(arch, dtype) == weight_bytes(model)


def offered(model, recipe=BITS):
    return {i: options_for(block, recipe) for i, block in enumerate(model.arch.blocks)}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A library, every score, and the problem of a toy whose costs are its bytes."""
    model, folder = toy(PLAIN, dtype=torch.bfloat16), tmp_path_factory.mktemp("precision")
    options, where = offered(model), sites(model)
    made = Builder(model, unpacked(options), statistics(model, 4), Recipe(tokens=0), "refit", folder)
    losses = made.losses(tokens())
    made.store(losses, losses)
    library = Library.open(folder, model)
    rows = score_library(Scorer(model, tokens(4), 2), library, where, options, folder / "scores.jsonl")
    blocks = {k: {p: 0.01 for p in PHASES} for k in distinct(options, where)}
    table = CostTable(blocks, dict.fromkeys(PHASES, 0.5), {}, parent_blocks=list(PLAIN.blocks), packed=True)
    problem = make_problem(PLAIN, where, options, table, SCENARIO, 2, compose(rows, "kl"))
    return model, options, where, library, problem, {(r.layer, r.attention, r.ffn): r.kl for r in rows}


def test_every_option_comes_in_every_precision(case):
    _, options, *_ = case
    for specs in options.values():
        base = [spec for spec in specs if not spec.precision]
        assert base == options_for(base[0].block, FEW)
        for kind in ("int8", "int4"):
            again = [spec for spec in specs if spec.precision == kind]
            assert [spec.base for spec in again] == [spec for spec in base if spec.block is not None]
            assert all(spec.priced == Quantised(spec.block, kind) for spec in again)


def test_a_packed_option_holds_what_its_packed_weights_stand_for(case):
    _, options, _, library, *_ = case
    spec = next(s for s in options[1] if s.name == "ffn 24 int4")
    packed, plain = library.block(1, spec), library.block(1, spec.base)
    for name in ("gate", "up", "down"):
        rounded, weight = (getattr(block.mixer, name).weight for block in (packed, plain))
        assert torch.equal(rounded, unpack(pack(weight, "int4")).bfloat16()) and not torch.equal(rounded, weight)
    assert torch.equal(packed.norm.weight, plain.norm.weight)


def test_fewer_bits_do_more_harm(case):
    *_, kl = case
    for layer in (0, 1):
        for slot in (("parent {}", "parent"), ("parent", "parent {}")):
            eight, four = (kl[layer, *(part.format(bits) for part in slot)] for bits in ("int8", "int4"))
            assert 0 <= eight < four


@pytest.mark.parametrize("share", [0.85, 0.6, 0.4, 0.3])
def test_bits_and_blocks_are_chosen_jointly(case, share):
    """Against brute force, under a limit on memory; and the bytes are those of the child as it runs."""
    _, options, where, library, problem, _ = case
    costs = problem.parent_costs()
    limit = share * (costs["weight_bytes"] + costs["cache_bytes"])
    bounds = Problem(problem.sites, problem.fixed).bounds([Target("memory", limit)])
    best = brute_force(problem.sites, bounds, fixed=problem.fixed)
    found = solve(problem.sites, bounds, fixed=problem.fixed)[0]
    assert found.score == pytest.approx(best.score, abs=1e-9) and math.isfinite(best.score)
    choice = choice_of(found.names, where, options)
    child = assemble(library, where, unpacked_choice(choice))
    kinds = [kind or "bf16" for kind in precisions(choice)]
    assert any(kind != "bf16" for kind in kinds)
    rounded = as_run(child, precisions(choice))(tokens(1)).float()
    packed = pack_weights(independent(child).eval(), kinds)
    assert weight_bytes(packed) == total_costs(problem.sites, found.choice, problem.fixed)["weight_bytes"]
    assert (packed(tokens(1)).float() - rounded).norm() < 0.1 * rounded.norm()


def test_a_candidate_is_mended_before_it_is_packed(case, tmp_path):
    """As a child is: its rounded weights are those of the matrices that mending gave."""
    model, options, where, library, *_ = case
    names = ["parent int8 | ffn 24 int4", "parent | parent int4"]
    choice = choice_of(names, where, options)
    matrix = torch.randn_like(library.block(1, choice[0][1]).mixer.down.weight)

    def mend(given):
        assert given == [choice]
        return [{1: matrix}]

    scorer = Scorer(model, tokens(2), 2)
    plain, mended = (Ground(scorer, library, where, options, "kl", tmp_path / "rows", *way) for way in ((), (mend,)))
    for ground, held in ((plain, library.block(1, choice[0][1])), (mended, None)):
        child = next(ground.children([choice]))
        wanted = unpack(pack(matrix, "int4")).bfloat16() if held is None else held.mixer.down.weight
        assert torch.equal(child.blocks[1].mixer.down.weight, wanted)
        assert torch.equal(child.blocks[0].mixer.o.weight, library.block(0, choice[0][0]).mixer.o.weight)
        assert ground.measure([names])[0] == scorer.whole(child)["kl"] > 0
    assert plain.measure([names])[0] < mended.measure([names])[0]


@pytest.mark.parametrize("kind", ["blocks", "bits"])
@pytest.mark.parametrize("share", [0.85, 0.7, 0.6])
def test_blocks_alone_and_bits_alone_are_searched_exactly(case, kind, share):
    """The controls of the joint search: the best of all choices that touch nothing else, and never better than it."""
    _, options, where, _, problem, _ = case
    costs = problem.parent_costs()
    bounds = problem.bounds([Target("memory", share * (costs["weight_bytes"] + costs["cache_bytes"]))])
    choice, words = control_choice(kind, where, options, problem.sites, bounds, problem.fixed, None, 0)
    specs = [spec for pair in choice for spec in pair]
    alone = {
        "blocks": not any(spec.precision for spec in specs),
        "bits": all(spec.base.name == "parent" for spec in specs),
    }
    assert alone[kind] and not all(spec.name == "parent" for spec in specs) and words
    wanted = {"blocks": lambda name: " int" not in name, "bits": lambda name: set(name.split()) <= BITS_ALONE}[kind]
    narrow = [[option for option in site if wanted(option.name)] for site in problem.sites]
    best = brute_force(narrow, bounds, fixed=problem.fixed)
    names = [pair_name(*(spec.name for spec in pair)) for pair in choice]
    found = [next(o for o in site if o.name == name) for site, name in zip(problem.sites, names)]
    assert math.fsum(o.score for o in found) == pytest.approx(best.score, abs=1e-9)
    assert solve(problem.sites, bounds, fixed=problem.fixed)[0].score <= best.score + 1e-9


def test_costs_are_measured_packed(case):
    model, options, where, *_ = case
    table = measure_costs(model, SCENARIO, where, options, repeats=1, calibration=1)
    assert table.packed and set(table.blocks) == set(distinct(options, where))
    assert {key(spec.priced) for spec in options[1] if spec.block} <= set(table.blocks)
    assert all(math.isfinite(row[phase]) for row in table.blocks.values() for phase in PHASES)
    assert len(model.blocks) == 4 and not any("packed" in name for name, _ in model.named_modules())


def test_a_checkpoint_says_how_its_blocks_are_packed(tmp_path):
    model = initialise(Decoder(PLAIN, torch.bfloat16))
    save(model, tmp_path / "child", weights=["int4", "int8", "bf16", "int4"])
    plain, packed = (load(tmp_path / "child", weights=given)[0] for given in (None, "recorded"))
    assert [b.mixer.o.packed.kind if i % 2 == 0 else b.mixer.down.packed.kind for i, b in enumerate(packed.blocks)] == [
        "int4", "int8", "bf16", "int4"]  # fmt: skip
    assert weight_bytes(packed) < weight_bytes(plain) and not hasattr(plain.blocks[0].mixer.o, "packed")
    save(model, tmp_path / "silent")
    assert weight_bytes(load(tmp_path / "silent", weights="recorded")[0]) == weight_bytes(plain)


def test_a_run_chooses_bits_and_its_child_runs_so(tmp_path):
    parent, recipe = make_parent(tmp_path / "parent"), make_recipe(tmp_path / "tiny.toml", make_text(tmp_path / "text"))
    quick = ("cost.repeats=1", "cost.calibration=0", "library.tokens=256", "tournament.finalists=2",
             "search.solutions=1", "distill.tokens=256", "evaluate.tokens=256", "options.ffn_widths=[0.5]",
             'options.precisions=["int8","int4"]', "options.linear=false", "dtype=bfloat16")  # fmt: skip
    settings = [word for setting in quick for word in ("--set", setting)]
    status, _, err = compress(parent, "--recipe", recipe, *settings, "--memory", "240kB", "--out", tmp_path / "run")
    assert status == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=pytest.fail)
    child, _ = load(tmp_path / "run" / "child", weights="recorded")
    held = summary["memory_bytes"]
    assert held["child"] == held["predicted"] <= 240_000 < held["parent"]
    kinds = json.loads((tmp_path / "run" / "child" / "config.json").read_text())["block_weights"]
    assert len(kinds) == len(child.blocks) and set(kinds) & {"int8", "int4"}
    assert summary["child"]["weight_bytes"] == weight_bytes(child)
    assert len(list(intarsia.generate(child, [1, 2, 3], 4, stop_ids=()))) == 4
    # What it is before it learns is told of its blocks as they run; what matters to a child is nearly what matters to
    # its options.
    mending = json.loads((tmp_path / "run" / "stages" / "mend-child" / "done.json").read_text())
    assert summary["kl_before_distillation"] == pytest.approx(mending["kl"], rel=0.02)
    for setting in ("options.absent=false", "options.kv_methods=[]", "options.ffn_widths=[]"):
        settings += ["--set", setting]
    status, _, err = compress(parent, "--recipe", recipe, *settings, "--memory", "240kB", "--out", tmp_path / "whole")
    assert status == 0, err
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    # Nothing but bits, so nothing to mend.
    assert summary["kl_before_distillation"] == pytest.approx(summary["kl_assembled"], rel=0.02) and summary["kl"] > 0
