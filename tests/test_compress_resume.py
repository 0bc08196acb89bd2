"""Killed at any moment and run again, a compression ends as if nothing had happened, and does nothing twice."""

import os
import random
import signal
import time

import pytest

from intarsia.base.files import read_json, read_jsonl
from intarsia.base.runfolder import RunFolder, Stage
from tiny_compression import begin, compress, done_stages, make_parent, make_recipe, make_text

KILLS = 24
# A budget of parameters: timings, which differ from run to run, then have no part in the choice.
TARGET = "params = 130_000"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(an undisturbed run's folder, one that was killed again and again, how often, stages seen done at each kill)."""
    import torch

    from intarsia.compress import pipeline, stages, summary  # noqa: F401  before the forks
    from intarsia.report import render  # noqa: F401

    torch.optim.AdamW([torch.zeros(1)])  # loads half of torch when it is first made
    torch.set_num_threads(1)  # threads do not survive a fork
    folder = tmp_path_factory.mktemp("resume")
    parent, data = make_parent(folder / "parent"), make_text(folder / "text")
    recipe = make_recipe(folder / "tiny.toml", data, TARGET)

    def words(run: str) -> list[str]:
        quick = ("--set", "cost.repeats=1", "--set", "cost.calibration=0", "--set", "search.repeats=1")
        options = (*quick, "--set", 'controls.kinds=["depth", "random"]', "--controls", "--out", folder / run)
        return ["compress", *map(str, (parent, "--recipe", recipe, *options))]

    whole = begin(words("whole"))
    draw, seen, killed, longest = random.Random(7), [], 0, 1.3
    while killed < KILLS:
        number = begin(words("killed"))
        time.sleep(draw.uniform(0.05, longest))
        if os.waitpid(number, os.WNOHANG)[0]:
            break  # it had finished, or failed, which the last run will tell
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        killed += 1
        seen.append(done_stages(folder / "killed"))
        if seen[-2:-1] == seen[-1:]:  # a slow machine gets nowhere in so short a time
            longest *= 1.25
    assert os.waitstatus_to_exitcode(os.waitpid(whole, 0)[1]) == 0
    status, _, err = compress(*words("killed")[1:])
    assert status == 0, err
    return folder / "whole", folder / "killed", killed, seen


def test_it_was_killed_in_many_places(runs):
    _, _, killed, seen = runs
    assert killed >= 10 and len({frozenset(stages) for stages in seen}) >= 4, [sorted(s) for s in seen]


def test_the_models_are_the_same_to_the_last_bit(runs):
    whole, killed, *_ = runs
    for name in ("child", "controls/depth", "controls/random"):
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (whole / name / file).read_bytes() == (killed / name / file).read_bytes(), (name, file)


def test_the_figures_are_the_same(runs):
    one, other = (read_json(run / "summary.json") for run in runs[:2])
    names = ("kl", "kl_se", "top1", "kl_before_distillation", "distillation", "bits_per_byte", "sample", "tournament")
    for name in names:
        assert one[name] == other[name], name
    for kind in ("depth", "random"):
        assert one["controls"][kind]["kl"] == other["controls"][kind]["kl"]
    assert [s["kl"] for s in one["options"]] == [s["kl"] for s in other["options"]]


def test_no_stage_is_done_twice(runs):
    _, killed, _, seen = runs
    now = done_stages(killed)
    for earlier in seen:
        for stage, facts in earlier.items():
            assert now[stage] == facts, stage


def test_no_row_is_written_twice(runs):
    _, killed, *_ = runs
    rows = read_jsonl(killed / "stages" / "score" / "scores.0.jsonl")
    scores = [(r["layer"], r["attention"], r["ffn"]) for r in rows]
    assert len(scores) == len(set(scores)) == read_json(killed / "stages" / "score" / "done.json")["measurements"]
    finalists = [row["name"] for row in read_jsonl(killed / "stages" / "tournament" / "finalists.0.jsonl")]
    assert len(finalists) == len(set(finalists)) > 1
    for stage in ("distill-child", "distill-depth", "distill-random"):
        steps = [row["step"] for row in read_jsonl(killed / "stages" / stage / "curve.jsonl")]
        assert len(steps) == len(set(steps)) > 1


def test_nothing_is_left_lying_about(runs):
    whole, killed, *_ = runs
    files = [{str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} for run in (whole, killed)]
    assert files[0] - {"metrics.jsonl"} == files[1] - {"metrics.jsonl"}


def test_the_peak_of_memory_is_that_of_all_attempts(tmp_path):
    number = os.fork()
    if not number:
        Stage.HEARTBEAT = 0.02
        with RunFolder(tmp_path).stage("library", "f"):
            held = bytearray(os.urandom(1)) * 700_000_000
            time.sleep(30)
            os._exit(len(held) and 70)
    time.sleep(1.5)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    run = RunFolder(tmp_path)
    assert run.peak_rss_bytes() > 700_000_000
    with run.stage("library", "f") as stage:
        stage.finish()
    assert read_json(stage.folder / "done.json")["peak_rss_bytes"] > 700_000_000
