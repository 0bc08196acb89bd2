"""A run folder keeps what was finished, whoever is killed and whenever."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json, read_jsonl, remove_leftovers
from intarsia.base.runfolder import RunFolder, Stage

HOLD = """
import sys, time
from intarsia.base.runfolder import RunFolder, Stage
Stage.HEARTBEAT = 0.05
run = RunFolder(sys.argv[1])
with run.lock(), run.stage("work", "f1") as stage:
    (stage.folder / "part").write_text("kept")
    print("working", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run and works in a stage."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_kept_out_and_a_dead_one_is_not(tmp_path, holder):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(IntarsiaError, match=f"number {holder.pid}.*--out"):
        with run.lock():
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with run.lock():
        assert (run.path / "lock").read_text() == str(os.getpid())


def test_a_killed_stage_keeps_its_work_and_its_seconds(tmp_path, holder):
    time.sleep(0.6)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFolder(tmp_path / "run").stage("work", "f1") as stage:
        assert not stage.done and (stage.folder / "part").read_text() == "kept"
        assert 0.3 < stage.seconds < 30
        before = stage.seconds
        stage.finish(seconds=10)
    assert stage.seconds == pytest.approx(10 + before, abs=0.1)


def test_a_stage_is_done_only_for_its_own_fingerprint(tmp_path):
    run = RunFolder(tmp_path)
    with run.stage("score", "a") as stage:
        (stage.folder / "scores.json").write_text("[1]")
        assert not stage.done and stage.facts == {}
        stage.finish(sites=30)
    again = run.stage("score", "a")
    assert again.done and again.facts["sites"] == 30 and (again.folder / "scores.json").exists()
    facts = read_json(again.folder / "done.json")
    assert set(facts) == {"fingerprint", "seconds", "peak_rss_bytes", "finished", "sites"}
    assert facts["fingerprint"] == "a" and facts["peak_rss_bytes"] > 1e6
    other = run.stage("score", "b")
    assert not other.done and not (other.folder / "scores.json").exists()


def test_unfinished_work_of_another_fingerprint_is_removed(tmp_path):
    run = RunFolder(tmp_path)
    (run.stage("library", "a").folder / "part").write_text("x")
    assert (run.stage("library", "a").folder / "part").exists()
    assert not (run.stage("library", "b").folder / "part").exists()


def test_a_damaged_done_file_is_no_finished_stage(tmp_path):
    run = RunFolder(tmp_path)
    run.stage("cost", "a").finish()
    (tmp_path / "stages/cost/done.json").write_text('{"fingerp')
    assert not run.stage("cost", "a").done


def test_an_error_keeps_the_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(Stage, "HEARTBEAT", 60)
    run = RunFolder(tmp_path)
    with pytest.raises(ZeroDivisionError):
        with run.stage("distill", "a"):
            time.sleep(0.2)
            raise ZeroDivisionError
    assert 0.2 <= run.stage("distill", "a").seconds < 5


def test_seconds_of_finished_stages(tmp_path):
    run = RunFolder(tmp_path)
    for name, seconds in (("load", 4.0), ("score", 2.5)):
        run.stage(name, "f").finish(seconds)
    run.stage("search", "f")
    assert run.seconds() == {"load": 4.0, "score": 2.5}


def test_a_folder_belongs_to_one_run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim(parent="abc", recipe={"target": {"speedup": 1.3}, "seed": (1, 2)})
    RunFolder(tmp_path / "run").claim(parent="abc", recipe={"target": {"speedup": 1.3}, "seed": [1, 2]})
    with pytest.raises(IntarsiaError) as error:
        run.claim(parent="xyz", recipe={"target": {"speedup": 1.5}, "seed": [1, 2]})
    sentence = str(error.value)
    assert "parent was abc and is now xyz" in sentence and "recipe.target.speedup was 1.3 and is now 1.5" in sentence
    assert "seed" not in sentence and "--out" in sentence and f"rm -r {run.path}" in sentence


def test_a_strangers_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    run = RunFolder(tmp_path)
    with run.lock(), pytest.raises(IntarsiaError, match=r"is no run folder.*thesis\.tex"):
        run.claim(parent="abc")
    with pytest.raises(IntarsiaError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex")


def test_metrics_have_a_time_and_survive_a_torn_line(tmp_path):
    run = RunFolder(tmp_path)
    run.metrics({"stage": "distill", "loss": 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"loss": 0.')
    run.metrics({"loss": 0.25})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [0.5, 0.25] and abs(rows[0]["time"] - time.time()) < 60


def test_the_environment_says_what_a_result_depends_on(tmp_path):
    RunFolder(tmp_path).write_environment(dtype="bfloat16")
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["dtype"] == "bfloat16" and facts["cores"] >= 1 and facts["memory_bytes"] > 2**28
    assert facts["versions"]["torch"].startswith("2.") and facts["cpu"]
    assert bool(facts["cpu_flags"]) == Path("/proc/cpuinfo").exists()


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path):
    """Ours, and what safetensors was writing into when it was killed."""
    left = (".state.safetensors.0a1b2c3d.tmp", ".child.0a1b2c3d.old", ".tmp2JwfEQ")
    kept = (".tmp", ".tmp2JwfEQ1", "tmp2JwfEQ", ".hidden", "state.safetensors")
    stages = tmp_path / "stages" / "distill"
    stages.mkdir(parents=True)
    for name in (*left, *kept):
        (stages / name).write_text("x")
    remove_leftovers(tmp_path)
    assert {p.name for p in stages.iterdir()} == set(kept)
