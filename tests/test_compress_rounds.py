"""Several rounds to the targets: what each is to reach and may choose, and that all figures are against the first
parent."""

import dataclasses
import math
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import intarsia
from intarsia.arch import Architecture, Attention, FeedForward, Linear, block_to_dict, parameters
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json, read_jsonl, write_json
from intarsia.base.recipe import load_recipe
from intarsia.compress import text
from intarsia.compress.options import options_for
from intarsia.compress.recipe import Recipe
from intarsia.compress.rounds import Round, check, goals, recipe_of
from intarsia.compress.solve import Infeasible, Option
from intarsia.compress.targets import Problem, parse_targets
from intarsia.data import Corpus
from intarsia.engine.scenario import Scenario
from intarsia.evaluate import bits_per_byte, compare, shorten
from tiny_compression import ARCH, begin, compress, done_stages, make_parent, make_recipe, make_text

SMALL = ("library.tokens=256", "library.refit_tokens=1024", "cost.repeats=1", "cost.calibration=0", "search.repeats=1",
         "search.rounds=1", "tournament.tokens=256", "evaluate.documents=2")  # fmt: skip
TOKENS, BATCH = 1152, 128


def words(parent: Path, recipe: Path, out: Path, *more: str) -> tuple:
    settings = (*SMALL, f"distill.tokens={TOKENS}", *more)
    return (parent, "--recipe", recipe, *(w for s in settings for w in ("--set", s)), "--rounds", "2", "--out", out)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two rounds, first whole blocks and then widths, to 60 % of the memory."""
    folder = tmp_path_factory.mktemp("rounds")
    parent, data = make_parent(folder / "parent"), make_text(folder / "text")
    recipe = make_recipe(folder / "tiny.toml", data, 'memory = "60%"')
    run = folder / "run"
    command = words(parent, recipe, run, 'round_axes=["depth", "width"]', "distill.lr=3e-3")
    status, out, err = compress(*command)
    assert status == 0, err
    return SimpleNamespace(parent=parent, run=run, one=run / "rounds" / "1", command=command, out=out)


def memory(arch: Architecture) -> float:
    """Bytes of float32 weights and of the keys and values of the scenario's 40 tokens."""
    attentions = [b for b in arch.blocks if isinstance(b, Attention)]
    return 4 * parameters(arch) + sum(2 * 40 * b.num_kv_heads * b.head_dim * 4 for b in attentions)


def test_every_round_goes_the_same_ratio(made):
    whole = memory(ARCH)
    for run, share in ((made.one, math.sqrt(0.6)), (made.run, 0.6)):
        aim = read_json(run / "stages" / "search" / "solutions.json")["solutions"]
        assert all(memory_of(s) <= share * whole * (1 + 1e-9) for s in aim)
        assert memory(intarsia.load(run / "child")[0].arch) <= share * whole * (1 + 1e-9)
    told = read_json(made.run / "summary.json")["rounds"]
    assert [r["target"]["memory"] for r in told] == pytest.approx([math.sqrt(0.6) * whole, 0.6 * whole])
    assert read_json(made.one / "summary.json")["target"] == told[0]["target"]
    assert read_json(made.run / "summary.json")["target"] == {"memory": "60%"}
    assert [f"{r['speedup_measured']:.2f} x" in made.out for r in told] == [True, True]
    pages = [(run / "report.html").read_text() for run in (made.one, made.run)]
    for number, row in enumerate(told, 1):
        cell = f"<td>{row['kl']:.3f} ± {row['kl_se']:.3f}</td>"
        assert [f"round {number}" in page for page in pages] == [number == 1, True] and cell in pages[1]


def memory_of(solution: dict) -> float:
    return solution["costs"]["weight_bytes"] + solution["costs"]["cache_bytes"]


def test_the_text_is_made_once_and_no_token_is_learned_from_twice(made):
    assert not (made.run / "stages" / "data" / "corpus").exists()
    last = [read_jsonl(run / "stages" / "distill-child" / "curve.jsonl")[-1] for run in (made.one, made.run)]
    assert [row["tokens"] for row in last] == [4 * BATCH, 5 * BATCH] and sum(r["tokens"] for r in last) == TOKENS
    told = read_json(made.run / "summary.json")["rounds"]
    assert [r["tokens"] for r in told] == [r["tokens"] for r in last]
    # Stored answers are those to the text of the whole distillation, one step after the other, by the first parent.
    corpus, (model, _) = Corpus(made.one / "stages" / "data" / "corpus"), intarsia.load(made.parent, dtype="float32")
    for run, step in ((made.one, 0), (made.one, 3), (made.run, 4), (made.run, 8)):
        ids = text.batch(corpus, step * 4, 4, 32, "train", text.DISTILLING)
        stored = answers(run)[step - (0 if run == made.one else 4)]
        torch.testing.assert_close(stored, model.hidden(ids), rtol=1e-4, atol=1e-5)


def answers(run: Path) -> list[torch.Tensor]:
    from intarsia.compress.answers import Answers

    known = Answers(run / "stages" / "teacher")
    return [known[step]["hidden"] for step in range(4 if run.name == "1" else 5)]


def test_figures_are_against_the_first_parent(made):
    summary = read_json(made.run / "summary.json")
    assert summary["parent"]["path"] == str(made.parent) and summary["parent"]["parameters"] == parameters(ARCH)
    assert summary["memory_bytes"]["parent"] == memory(ARCH)
    parent, tokenizer = intarsia.load(made.parent, dtype="float32")
    child, _ = intarsia.load(made.run / "child", dtype="float32")
    corpus = Corpus(made.one / "stages" / "data" / "corpus")
    held = text.batch(corpus, 0, 16, 32, "heldout", text.EVALUATING)
    found = compare(parent, child, held)
    assert summary["kl"] == pytest.approx(found["kl"]["value"], rel=1e-4)
    assert summary["top1"] == pytest.approx(found["top1"]["value"])
    documents = {c: corpus.documents("heldout", c, 2) for c in corpus.categories}
    short = {c: [shorten(d, 32, tokenizer) for d in docs] for c, docs in documents.items()}
    for who, model in (("parent", parent), ("child", child)):
        bits = bits_per_byte(model, short, separator=tokenizer.eos_id)
        assert summary["bits_per_byte"][who]["all"]["value"] == pytest.approx(bits["all"]["value"], rel=1e-5)
    between, _ = intarsia.load(made.one / "child", dtype="float32")
    nearer = compare(between, child, held)["kl"]["value"]
    assert abs(nearer / summary["kl"] - 1) > 0.01  # else this test could not tell the two
    judged = text.batch(corpus, 16, 8, 32, "heldout", text.EVALUATING)  # behind those that evaluate
    last = summary["distillation"][-1]
    if "undone" not in last:
        assert last["kl"] == pytest.approx(compare(parent, child, judged)["kl"]["value"], rel=1e-4)
    speed = read_json(made.run / "stages" / "speed" / "speed.json")["speed"]
    ratios = sorted(a / b for a, b in zip(speed["parent"]["runs"], speed["child"]["runs"]))
    assert summary["speedup_measured"] == pytest.approx((ratios[2] + ratios[3]) / 2)
    assert read_json(made.run / "rounds" / "1" / "summary.json")["bits_per_byte"]["parent"] == (
        summary["bits_per_byte"]["parent"]
    )


def test_predicted_speeds_are_against_it_too(made):
    summary, one = (read_json(run / "summary.json") for run in (made.run, made.one))
    costs, child = read_json(made.run / "stages" / "cost" / "costs.json"), intarsia.load(made.run / "child")[0].arch

    def seconds(blocks) -> float:
        known = [costs["fixed"], *(costs["blocks"][repr(b)] for b in blocks)]
        return sum(row[p] for row in known for p in ("prefill_seconds", "decode_seconds"))

    parent = intarsia.load(made.one / "child")[0].arch
    wanted = one["speedup_measured"] * seconds(parent.blocks) / seconds(child.blocks)
    assert summary["speedup_predicted"] == pytest.approx(wanted)


def test_a_round_chooses_on_its_axis_and_the_layers_stay_the_first_parents(made):
    one, two = (read_json(run / "summary.json")["child"]["sites"] for run in (made.one, made.run))
    assert [r["layer"] for r in one] == [r["layer"] for r in two] == [0, 1, 2, 3]
    own, linear = {"attention": ARCH.blocks[0], "ffn": ARCH.blocks[1]}, block_to_dict(Linear())
    changed = 0
    for before, after in zip(one, two):
        for slot in ("attention", "ffn"):
            first, second = before[slot]["block"], after[slot]["block"]
            assert first in (None, linear, block_to_dict(own[slot]))  # depth
            assert (first is None) == (second is None) and (first != linear or second == linear)  # width
            changed += first != second
    assert changed
    blocks = [row[slot]["block"] for row in two for slot in ("attention", "ffn") if row[slot]["block"]]
    assert blocks == [block_to_dict(b) for b in intarsia.load(made.run / "child")[0].arch.blocks]
    rows = read_json(made.run / "summary.json")["options"]
    known = {(r["layer"], r["slot"], r["option"]) for r in rows}
    assert all((r["layer"], s, r[s]["option"]) in known for r in two for s in ("attention", "ffn") if r[s]["block"])


def test_the_same_command_again_does_nothing_again(made):
    runs = (made.one, made.run)
    before = [done_stages(run) for run in runs]
    summary = read_json(made.run / "summary.json")
    status, out, err = compress(*made.command)
    assert status == 0, err
    assert [done_stages(run) for run in runs] == before and out.count("distill-child: already done") == 2
    again = read_json(made.run / "summary.json")
    moving = ("finished", "seconds")
    assert {k: v for k, v in again.items() if k not in moving} == {k: v for k, v in summary.items() if k not in moving}


def test_killed_and_run_again_it_ends_as_if_undisturbed(made, tmp_path):
    """The last round's child needs the first's to the bit, and so does every figure of it."""
    from intarsia.compress import pipeline, rounds, stages, summary  # noqa: F401  before the forks

    torch.optim.AdamW([torch.zeros(1)])
    torch.set_num_threads(1)
    command, run, draw = [*map(str, made.command)], tmp_path / "run", random.Random(3)
    command[command.index("--out") + 1] = str(run)

    def done() -> int:
        return len(done_stages(run / "rounds" / "1")) + len(done_stages(run))

    for stages_done in (1, 3, 4, 8, 10, 12, 14, 16, 20):  # of 12 and 11
        number = begin(["compress", *command])
        while done() < stages_done:
            assert not os.waitpid(number, os.WNOHANG)[0]
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
    assert done() < 23
    status, _, err = compress(*command)
    assert status == 0, err
    for name in ("child", "rounds/1/child"):
        for file in ("model.safetensors", "config.json"):
            assert (made.run / name / file).read_bytes() == (run / name / file).read_bytes(), (name, file)
    one, other = (read_json(folder / "summary.json") for folder in (made.run, run))
    for name in ("kl", "top1", "distillation", "bits_per_byte", "sample", "tournament"):
        assert one[name] == other[name], name
    assert one["child"]["sites"] == other["child"]["sites"]


# -------------------------------------------------------------------------------------------------- by hand arithmetic

SECONDS = {"prefill_seconds": 3.0, "decode_seconds": 5.0}


def stage_of(tmp_path: Path, number: int, count: int, targets: list[str], speeds: dict | None = None):
    """A job in round `number`, whose parent takes 8 s; a round before it was measured as `speeds` say."""
    recipe = load_recipe(Recipe, "quick", [f"rounds={count}"])
    round = Round(number, count, tmp_path / "run", tmp_path / "parent", recipe, 0)
    if speeds:
        write_json(round.folder(number - 1) / "stages" / "speed" / "speed.json", {"speed": speeds})
    job = SimpleNamespace(
        round=round, later=round if number > 1 else None, origin_path=tmp_path / "parent", profile=None, recipe=recipe,
        targets=parse_targets(targets), scenario=Scenario.parse("1,32,8"), model=SimpleNamespace(dtype=torch.float32),
    )  # fmt: skip
    nothing = dict.fromkeys(SECONDS, 0.0)
    problem = Problem([[Option("parent", 0.0, {k: s / 2 for k, s in SECONDS.items()}), Option("none", 1.0, nothing)]],
                      {k: s / 2 for k, s in SECONDS.items()} | {"params": 7.0}, tokens=40.0)  # fmt: skip
    return job, problem


def measured(total: float, first: float) -> dict:
    """Speeds of a child that is `total` times as fast as the first parent, and `first` times to the first token."""
    prefill = {"parent": {"prefill_seconds": {"median": first}}, "child": {"prefill_seconds": {"median": 1.0}}}
    return {"parent": prefill["parent"], "child": prefill["child"] | {"speedup": {"median": total}}}


def test_targets_of_the_first_of_two_rounds(tmp_path):
    make_parent(tmp_path / "parent")
    asked = ["speedup=2", "throughput=20", "latency=50%", "ttft=1s", "memory=200kB", "params=64%"]
    job, problem = stage_of(tmp_path, 1, 2, asked)
    root = math.sqrt
    wanted = [root(2), root(5 * 20), 8 * root(0.5), root(3), root(memory(ARCH) * 200e3), parameters(ARCH) * 0.8]
    found = goals(job, problem)
    assert [t.value for t in found] == pytest.approx(wanted) and not any(t.share for t in found)
    last = [2, 20, 4, 1, 200e3, 0.64 * parameters(ARCH)]
    assert [t.value for t in goals(job, problem, 2)] == pytest.approx(last)


def test_targets_of_a_later_round_are_against_the_first_parent(tmp_path):
    make_parent(tmp_path / "parent")
    asked = ["speedup=3", "throughput=30", "latency=40%", "ttft=50%", "memory=200kB", "params=64%"]
    job, problem = stage_of(tmp_path, 2, 3, asked, measured(1.6, 1.25))
    # The round's parent takes 8 s (3 s to the first token), so the first parent would take 12.8 s (3.75 s).
    way = 2 / 3
    wanted = [3**way / 1.6, (40 / 12.8) ** (1 - way) * 30**way, 12.8 * 0.4**way, 3.75 * 0.5**way,
              memory(ARCH) ** (1 - way) * 200e3**way, parameters(ARCH) * 0.64**way]  # fmt: skip
    assert [t.value for t in goals(job, problem)] == pytest.approx(wanted)
    budget = problem.bound(goals(job, problem)[0])
    assert budget.limit == pytest.approx(12.8 / 3**way)  # a time, for a speed-up


def test_without_rounds_targets_are_what_they_were(tmp_path):
    job, problem = stage_of(tmp_path, 1, 2, ["latency=50%", "speedup=1.5"])
    job.round = job.later = None
    assert [(t.kind, t.value) for t in goals(job, problem)] == [("latency", 4.0), ("speedup", 1.5)]


def test_what_is_out_of_reach_at_the_end_is_refused_at_the_beginning(tmp_path):
    make_parent(tmp_path / "parent")
    job, problem = stage_of(tmp_path, 1, 2, ["speedup=3"])  # sqrt(3) is within reach, 2 is the end
    with pytest.raises(Infeasible, match="out of reach"):
        check(job, problem)
    job.targets = parse_targets(["speedup=1.9"])
    check(job, problem)
    assert [t.value for t in job.targets] == pytest.approx([math.sqrt(1.9)])


def test_a_round_that_has_nothing_to_do_says_which(tmp_path):
    make_parent(tmp_path / "parent")
    job, problem = stage_of(tmp_path, 2, 2, ["speedup=1.5"], measured(1.6, 1.6))
    with pytest.raises(IntarsiaError, match="in round 2 of 2: there is nothing to do"):
        check(job, problem)


# ----------------------------------------------------------------------------------------------- the recipe of a round


def recipe(*settings: str) -> Recipe:
    return load_recipe(Recipe, "quick", settings)


@pytest.mark.parametrize("tokens, count", [(65_536, 1), (65_536, 3), (10_000, 2), (4_096, 5), (1_000, 2)])
def test_tokens_are_divided_among_the_rounds(tokens, count):
    given = recipe(f"rounds={count}", f"distill.tokens={tokens}")
    each = [recipe_of(given, n, ARCH).distill.tokens for n in range(1, count + 1)]
    assert sum(each) == tokens // 2048 * 2048 and max(each) - min(each) <= 2048


def test_axes_go_round_and_shut_options_out():
    given = recipe("rounds=3", 'round_axes=["depth", "width"]', "options.mamba=true", "options.windows=[16]")
    attention, ffn = Attention(4, 4, 16), FeedForward(192)
    names = [[{s.method for s in options_for(b, recipe_of(given, n, ARCH).options)} for b in (attention, ffn)]
             for n in (1, 2, 3)]  # fmt: skip
    assert names[0] == names[2] == [{"parent", "linear", "none"}] * 2
    assert names[1] == [{"parent", "drop", "aligned", "window", "mamba"}, {"parent", "prefix"}]
    whole = recipe("rounds=2")
    assert recipe_of(whole, 1, ARCH).options == whole.options


def test_attention_that_may_stay_and_fusion():
    given = recipe("rounds=2", "target.keep_attention=0.125", "fusion.most=4")
    found = [recipe_of(given, n, ARCH) for n in (1, 2)]
    assert [r.target.keep_attention for r in found] == pytest.approx([0.25, 0.125])  # from the half that there is
    assert [r.fusion.most for r in found] == [0, 4]


@pytest.mark.parametrize(
    "settings, words",
    [
        (("rounds=2", 'options.precisions=["int8"]'), "packed weights learn no further"),
        (("rounds=2", "distill.cosine_weight=1.0"), "the first parent is the teacher"),
        (('round_axes=["depth"]', "rounds=0"), "rounds"),
        (('round_axes=["depth", "width"]',), "round_axes names 2 rounds, but rounds is 1"),
        (("rounds=2", 'round_axes=["depth"]', "target.keep_attention=0.2"), "leave depth out"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, words):
    with pytest.raises(IntarsiaError, match=words):
        recipe(*settings)


def test_the_first_and_the_only_round_are_ordinary_runs():
    """A later round alone has another original than its parent."""
    from intarsia.compress.pipeline import Job

    fields = {f.name: None for f in dataclasses.fields(Job)}
    given = recipe("rounds=2")
    job = Job(**fields | {"parent_path": Path("p"), "recipe": given, "model": "m", "others": {}})
    assert job.later is None and job.original() == job.teacher() == "m" and job.taught() == []
    job.round = Round(1, 2, Path("home"), Path("p"), given, 0)
    assert job.later is None and job.original() == "m" and job.taught() == []
    job.round = dataclasses.replace(job.round, number=2)
    job.others[Path("p")] = "first"
    assert job.later and job.original() == job.teacher() == "first" and job.origin_path == Path("p")
    assert job.round.folder(1) == Path("home/rounds/1") and job.round.folder(2) == Path("home")
