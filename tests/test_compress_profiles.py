"""What a profile lets the search choose is what its format can say, no more and no less; the child is written so."""

import itertools
import json

import pytest

import intarsia
from compress_toys import LADDER, PLAIN
from intarsia.arch import Architecture, FeedForward, Mamba2, nemotron_h
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json
from intarsia.compress.measure import PHASES, CostTable, distinct
from intarsia.compress.options import options_for, sites_of
from intarsia.compress.problem import make_problem
from intarsia.compress.profiles import Profile, fitted, homes
from intarsia.compress.recipe import Recipe
from intarsia.compress.search import VIEWS, viewed
from intarsia.compress.solve import Infeasible, Option, solve, untied
from intarsia.compress.targets import Target, check_feasible
from intarsia.engine.scenario import Scenario
from intarsia.formats.gguf_writer import why_not_gguf
from intarsia.formats.registry import FAMILIES
from tiny_compression import compress, make_parent, make_recipe, make_text

WIDE = LADDER.model_copy(update={"ffn_widths": (0.5,), "kv_methods": ("drop", "mean"), "mamba_heads": (0.5,)})
LLAMA = PLAIN.replace(family="llama")
HYBRID = nemotron_h(
    5, 64, attentions=1, mamba_head_dim=8, head_dim=16, state_size=16, num_groups=2, vocab_size=61,
    intermediate_size=96, max_positions=128,
)  # fmt: skip


def profile_of(name: str, arch: Architecture, options=WIDE):
    offered = {i: options_for(block, options) for i, block in enumerate(arch.blocks)}
    return Profile(name, arch, offered, sites_of(arch)), offered


def pairs(arch, offered):
    """Of every layer, the blocks that may stand in its two slots."""
    return [
        [(a, f) for a in slot(offered, site.attention) for f in slot(offered, site.ffn)] for site in sites_of(arch)
    ]


def slot(offered, index):
    return [None] if index is None else list(dict.fromkeys(spec.block for spec in offered[index]))


def children(arch, offered):
    """Every child: its layers, its architecture."""
    for layers in itertools.product(*pairs(arch, offered)):
        blocks = tuple(block for layer in layers for block in layer if block is not None)
        if blocks:
            yield layers, arch.replace(blocks=blocks)


def chosen(profile, layers) -> bool:
    sites = [[Option("", 0.0, {}, profile.ties(*layer))] for layer in layers]
    return all(profile.allows(*layer) for layer in layers) and not untied(sites, [0] * len(sites))


@pytest.mark.parametrize(("name", "why_not"), [
    ("homogeneous", FAMILIES["llama"].why_not), ("vllm", FAMILIES["nemotron-nas"].why_not), ("llama.cpp", why_not_gguf),
], ids=["homogeneous", "vllm", "llama.cpp"])  # fmt: skip
def test_a_llama_becomes_what_the_format_can_say_and_nothing_else(name, why_not):
    options = WIDE.model_copy(update={"linear": name != "vllm"})  # the format has linear blocks, vllm has not
    profile, offered = profile_of(name, LLAMA, options)
    verdicts = {(chosen(profile, layers), why_not(arch) is None) for layers, arch in children(LLAMA, offered)
                if all((a is None) == (f is None) for a, f in layers) or name == "vllm"}  # fmt: skip
    assert verdicts == {(True, True), (False, False)}


def test_vllm_has_no_linear_blocks():
    profile, offered = profile_of("vllm", LLAMA)
    usable = profile.usable(offered, sites_of(LLAMA)).values()
    assert not any(spec.name == "linear" for specs in usable for spec in specs)


@pytest.mark.parametrize("name", ["homogeneous", "vllm", "llama.cpp"])
def test_a_hybrid_keeps_one_mamba_width(name):
    profile, offered = profile_of(name, HYBRID)
    seen, widths = set(), set()
    for layers, arch in children(HYBRID, offered):
        mambas = {block for block in arch.blocks if isinstance(block, Mamba2)}
        if chosen(profile, layers) and mambas:
            assert profile.home.why_not(arch) is None and len(mambas) == 1
            seen.add(len(arch.blocks))
            widths.add(len({b for b in arch.blocks if isinstance(b, FeedForward)}))
    assert seen == set(range(1, len(HYBRID.blocks) + 1))
    assert max(widths) == (2 if name == "vllm" else 1)


def test_attention_that_may_become_mamba_goes_to_the_hybrids_home():
    arch = LLAMA
    profile, offered = profile_of("vllm", arch, WIDE.model_copy(update={"mamba": True, "linear": False}))
    assert profile.home.format == "granitemoehybrid"
    formats = {profile.format_of(child) for layers, child in children(arch, offered) if chosen(profile, layers)}
    assert "granitemoehybrid" in formats and formats - {"granitemoehybrid"} <= {"llama", "nemotron-nas"}


def test_views_of_the_scores_keep_what_may_be_chosen():
    """Whole layers may go though neither of their halves may go alone, whichever way the scores are read."""
    profile, offered = profile_of("homogeneous", LLAMA)
    where, offered = sites_of(LLAMA), profile.usable(offered, sites_of(LLAMA))
    kinds = distinct(offered, where)
    table = CostTable({k: dict.fromkeys(PHASES, 0.01) for k in kinds}, dict.fromkeys(PHASES, 0.5), {})
    scores = {(s.layer, a.name, f.name): 1.0 for s in where for a in offered[s.attention] for f in offered[s.ffn]}
    problem = make_problem(LLAMA, where, offered, table, Scenario(1, 8, 4), 4, scores, profile=profile)
    least = problem.fixed["params"]
    with pytest.raises(Infeasible, match=r"of reach: .* with these options, and what the profile homogeneous loads"):
        check_feasible(problem, [Target("params", least - 1)])
    bounds = problem.bounds([Target("params", least)])
    for view in VIEWS:
        assert solve(viewed(problem, view), bounds, fixed=problem.fixed)[0].names == ("none | none",) * 2


def test_a_parent_that_no_format_holds_is_refused_in_a_sentence():
    strange = LLAMA.replace(rope=None)
    with pytest.raises(IntarsiaError, match=r"the profile llama.cpp has no format for this parent .*choose another"):
        profile_of("llama.cpp", strange)


def test_ffn_widths_are_what_the_format_does_not_pad():
    recipe = Recipe(profile="vllm")
    assert fitted(recipe, LLAMA).multiple == 256 and fitted(Recipe(), LLAMA).multiple == 64
    assert [home.format for home in homes("vllm", "qwen3")][:3] == ["nemotron-nas", "nemotron_h_puzzle", "qwen3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    make_parent(folder / "parent")
    make_recipe(folder / "tiny.toml", make_text(folder / "text"))
    return folder


QUICK = ("cost.repeats=1", "cost.calibration=0", "library.tokens=256", "tournament.finalists=1", "search.solutions=1",
         "distill.tokens=256", "distill.evaluations=0", "evaluate.tokens=256", "options.ffn_widths=[0.5]",
         'distill.teacher="stored"', "distill.teacher_top=16")  # fmt: skip


def run(folder, name, *words):
    settings = [word for setting in QUICK for word in ("--set", setting)]
    return compress(folder / "parent", "--recipe", folder / "tiny.toml", *settings, "--out", folder / name, *words)


@pytest.mark.parametrize(("profile", "model_type"), [
    ("homogeneous", "llama"), ("vllm", "nemotron-nas"), ("llama.cpp", ""),
])  # fmt: skip
def test_the_child_is_written_for_its_target_and_reads_back_the_same(folder, profile, model_type):
    out = folder / profile
    status, shown, err = run(folder, profile, "--params", "150k", "--profile", profile)
    assert status == 0, err
    summary = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    exported, teacher = summary["export"], out / "stages" / "teacher"
    assert (teacher / "answers.bin").stat().st_size == 2 * 128 * (16 * 6 + 4)  # two steps, of the 16 largest logits
    assert exported["profile"] == profile and exported["difference"] < 1e-4 and exported["path"] in shown
    if profile == "llama.cpp":
        assert exported["path"].endswith(".gguf")
    else:
        assert read_json(f"{exported['path']}/config.json")["model_type"] == model_type
    assert intarsia.load(exported["path"])[0].arch.vocab_size == 400
    if profile == "homogeneous":
        status, _, sentence = run(folder, "far", "--params", "25k", "--profile", profile)
        assert status == 2 and "out of reach" in sentence and "Nearest feasible: --params" in sentence
