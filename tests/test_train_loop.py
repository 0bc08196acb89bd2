"""A training from end to end: it learns, resumes to the same bits whenever it was killed, and names what is wrong."""

import math
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json, read_jsonl
from intarsia.base.runfolder import losses
from intarsia.data import Corpus, mix
from intarsia.formats import load, save
from intarsia.model import Decoder
from intarsia.model.init import initialise
from intarsia.train.loop import train
from intarsia.train.material import blend_of
from tiny_training import ARCH, LENGTH, begin, command, read, shared_recipe, undisturbed

STEPS = 10
KILLS = 20


@pytest.fixture(scope="module")
def recipe():
    return shared_recipe()


@pytest.fixture(scope="module")
def whole():
    return undisturbed()


def figures(run):
    return [(r["step"], r["tokens"], r["loss"], r["lr"], r["gradient_norm"]) for r in losses(run)]


def same_model(one, other):
    return (one / "model" / "model.safetensors").read_bytes() == (other / "model" / "model.safetensors").read_bytes()


def test_it_learns_and_leaves_a_model(whole):
    rows = losses(whole)
    assert [row["step"] for row in rows] == list(range(STEPS)) and rows[-1]["tokens"] == 1280
    assert rows[0]["loss"] == pytest.approx(math.log(ARCH.vocab_size), rel=0.1)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.4
    assert rows[-1]["lr"] == pytest.approx(1e-4) and max(row["lr"] for row in rows) == pytest.approx(1e-2, rel=0.1)
    assert all(row["tokens_per_second"] > 0 and row["mfu"] >= 0 for row in rows)
    summary = read_json(whole / "summary.json")
    assert summary["bits_per_byte"]["all"]["value"] > 0 and summary["skipped"] == 0
    assert set(summary["bits_per_byte"]) == {"command", "language", "all"}
    model, tokenizer = load(whole / "model")
    assert model.arch.blocks == ARCH.blocks and tokenizer.eos_id is not None
    assert [p.name for p in sorted((whole / "checkpoints").iterdir())] == [f"step_{n:09d}" for n in (6, 8, 10)]


def test_a_finished_run_is_not_done_again(recipe, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    assert train(read(recipe), whole) == read_json(whole / "summary.json")
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_killed_at_any_moment_it_ends_with_the_same_bits(recipe, whole, tmp_path):
    """Twenty kills of a run that saves after every step; each attempt lives a little longer than the one before."""
    run, draw, done = tmp_path / "run", random.Random(5), []
    words = ["train", recipe, "--out", run, "--set", "checkpoint.every=128"]
    for attempt in range(KILLS):
        number = begin(command(words))
        time.sleep(draw.uniform(0.0, 0.02 + 0.05 * attempt))
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        done.append(len(losses(run)))
    assert done == sorted(done)
    train(read(recipe), run)
    assert figures(run) == figures(whole)
    assert same_model(run, whole)
    assert not [p for p in run.rglob(".*") if p.name != ".metadata"]


def test_a_run_of_another_recipe_is_refused(recipe, whole):
    with pytest.raises(IntarsiaError, match=r"recipe\.optimizer\.lr was 0\.01 and is now 0\.1"):
        train(read(recipe, "optimizer.lr=0.1"), whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(recipe, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    shard = run / "checkpoints" / "step_000000010" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    other = run / "checkpoints" / "step_000000008" / "__0_0.distcp"
    data = bytearray(other.read_bytes())
    data[len(data) // 2] ^= 1
    other.write_bytes(data)
    train(read(recipe), run)
    said = capsys.readouterr().err
    assert "step_000000010 is damaged (__0_0.distcp has" in said and "bytes instead of" in said
    assert "step_000000008 is damaged (__0_0.distcp has other bytes than were written)" in said
    assert "going on from step_000000006" in said
    assert figures(run) == figures(whole) and same_model(run, whole)
    for path in (run / "checkpoints").glob("*/state.json"):
        path.write_text('{"step": 1')
    with pytest.raises(IntarsiaError, match="no whole checkpoint is left"):
        train(read(recipe), run)


def test_a_damaged_shard_of_data_is_named(recipe, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(recipe.parent / "corpus", corpus)
    file = corpus / "command" / "train.bin"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntarsiaError, match=r"command/train\.bin is damaged: its bytes are not those"):
        train(read(recipe, f"data.path={corpus}"), tmp_path / "run")
    file.write_bytes(b"\xff" * len(data))  # not compared before, but no word of the vocabulary
    with pytest.raises(IntarsiaError, match=r"command/train\.bin is damaged: row \d+ of command"):
        train(read(recipe, f"data.path={corpus}", "data.verify=false"), tmp_path / "other")
    file.write_bytes(data[:-2])
    with pytest.raises(IntarsiaError, match="cut short"):
        train(read(recipe, f"data.path={corpus}", "data.verify=false"), tmp_path / "third")


def test_a_batch_that_is_no_number_is_left_out_and_named(recipe, tmp_path):
    """A word whose embedding is broken: every step that reads it is left out, the others learn."""
    corpus = Corpus(recipe.parent / "corpus")
    samples = mix(corpus, blend_of(read(recipe).data), 1280, LENGTH)
    read_words = [set(row) for row in samples.batch(0, 4 * STEPS).tokens.tolist()]
    holding = {word: [n for n, row in enumerate(read_words) if word in row] for word in range(ARCH.vocab_size)}
    word, rows_of_it = next((w, rows) for w, rows in holding.items() if len(rows) == 3)
    model = initialise(Decoder(ARCH))
    model.embed.weight.data[word] = math.nan
    save(model, tmp_path / "broken")
    settings = (f"init={tmp_path / 'broken'}", "data.max_epochs=50", "guard.most=99")
    summary = train(read(recipe, *settings), tmp_path / "run")
    rows = losses(tmp_path / "run")
    out = [row for row in rows if "skipped" in row]
    assert summary["skipped"] == len(out) and [row["step"] for row in out] == sorted({n // 4 for n in rows_of_it})
    for row in out:
        named = row["samples"][0]
        assert row["why"] == "the loss is nan" and math.isnan(named["loss"]) and named["sample"] in rows_of_it
        place = samples.place(named["sample"])
        assert (named["source"], named["epoch"], named["row"]) == place
    assert all(math.isfinite(row["loss"]) for row in rows if row not in out)
    with pytest.raises(IntarsiaError, match="1 steps in a row were left out"):
        train(read(recipe, *settings, "guard.most=1"), tmp_path / "other")


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    sizes = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)]
    if subprocess.run(sizes, capture_output=True).returncode:
        pytest.skip("a small disk can only be made where this process may mount one")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_loses_nothing(recipe, whole, small_disk):
    for size in (600, 1100):
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(small_disk)], check=True)
        with pytest.raises(IntarsiaError, match=r"could not write .*space"):
            train(read(recipe), small_disk / "run")
        there = sorted((small_disk / "run").glob("checkpoints/step_*"))
    assert there  # what was finished is kept
    subprocess.run(["mount", "-o", "remount,size=9000k", str(small_disk)], check=True)
    train(read(recipe), small_disk / "run")
    assert figures(small_disk / "run") == figures(whole) and same_model(small_disk / "run", whole)


def test_a_blend_that_changes_goes_on_from_where_it_was(recipe, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in (8, 10):
        shutil.rmtree(run / "checkpoints" / f"step_{step:09d}")
    other = tmp_path / "other.toml"
    other.write_text("max_epochs = 50\n[[phases]]\nweights = { language = 1 }\n")
    train(read(recipe, f"data.blend={other}"), run)
    assert figures(run)[:6] == figures(whole)[:6] and figures(run)[6:] != figures(whole)[6:]
    assert [row["start"] for row in read_json(run / "blends.json")] == [0, 24]


@pytest.mark.parametrize("changes", [
    ("recompute=true",), ("micro_tokens=128",), ('data.packing="whole"',), ("data.cross=true",),
    ('precision.dtype="bfloat16"', "loss.z=1e-4", 'schedule.kind="wsd"'),
], ids=lambda c: c[0])  # fmt: skip
def test_other_ways_to_train(recipe, whole, tmp_path, changes):
    train(read(recipe, *changes), tmp_path / "run")
    rows, plain = losses(tmp_path / "run"), losses(whole)
    if changes[0] in ("recompute=true", "micro_tokens=128"):  # another way to the same figures
        assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in plain], rel=1e-5)
    else:
        assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    if changes[0].startswith("precision"):
        assert load(tmp_path / "run" / "model", dtype=None)[0].dtype == torch.bfloat16
        assert rows[7]["lr"] == pytest.approx(1e-2)  # stable until the last 18 %


def test_looks_and_exports_come_on_schedule(recipe, tmp_path):
    run = tmp_path / "run"
    train(read(recipe, "evaluate.every=512", "checkpoint.export=640"), run)
    looks = [row["step"] for row in read_jsonl(run / "metrics.jsonl") if "heldout" in row]
    assert looks == [4, 8, 10]
    assert [p.name for p in (run / "exports").iterdir()] == ["step_000000005"]
    assert load(run / "exports" / "step_000000005")[0].arch.blocks == ARCH.blocks


def test_a_distillation_comes_near_its_teacher(recipe, whole, tmp_path):
    settings = (f"teacher={whole / 'model'}", "loss.kl=1.0", "optimizer.lr=3e-3")
    train(read(recipe, *settings), tmp_path / "run")
    rows = losses(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2 and rows[-1]["gradient_norm"] < rows[0]["gradient_norm"]


def test_tensorboard_is_told_the_same(recipe, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(read(recipe, 'trackers=["tensorboard"]'), tmp_path / "run")
    told = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [s.value for s in told.Scalars("loss")] == pytest.approx([r["loss"] for r in losses(tmp_path / "run")])
    assert len(told.Scalars("bits_per_byte")) == 1


@pytest.mark.parametrize(("changes", "sentence"), [
    (("trackers=[\"wandb\"]",), r"wandb is not installed: pip install wandb"),
    (("data.length=4096", "batch_tokens=4096", "data.tokens=8192"), "the context of"),
    (("data.max_epochs=0.01",), "max_epochs is 0.01"),
    (("parallel.tensor=2",), r"1 process cannot share blocks by 2"),
])  # fmt: skip
def test_what_is_not_possible_is_a_sentence(recipe, tmp_path, changes, sentence):
    with pytest.raises(IntarsiaError, match=sentence):
        train(read(recipe, *changes), tmp_path / "run")
