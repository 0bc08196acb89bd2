"""Bad input gets a sentence with exit status 2, before anything expensive, and nothing is lost."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from intarsia import cli
from intarsia.arch import Linear
from intarsia.base.files import read_json, write_json
from intarsia.formats import save
from intarsia.model import Decoder
from tiny_compression import ARCH, compress, make_parent, make_recipe, make_text, make_tokenizer

EXPENSIVE = ("importance", "library", "score", "search", "distill-child")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    text = make_text(folder / "text")
    return SimpleNamespace(
        parent=make_parent(folder / "parent"), text=text, recipe=make_recipe(folder / "tiny.toml", text)
    )


@pytest.fixture
def refused(given, tmp_path, capfd):
    """Run `compress` in this process and return the sentence it refuses with; a traceback would fail the test."""

    def run(*words, parent=None, out=None, recipe=None) -> str:
        out = out or tmp_path / "run"
        parts = ["compress", parent or given.parent, "--recipe", recipe or given.recipe, "--out", out, *words]
        try:
            status = cli.main([str(part) for part in parts])
        except SystemExit as stop:  # argparse
            status = stop.code
        sentence = capfd.readouterr().err
        assert status == 2, sentence
        assert "Traceback" not in sentence and len(sentence) < 1500
        assert not [s for s in EXPENSIVE if (Path(out) / "stages" / s).exists()] or "could not write" in sentence
        return sentence

    return run


def copy_of(parent: Path, folder: Path) -> Path:
    return Path(shutil.copytree(parent, folder))


def test_a_folder_that_is_no_checkpoint(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no checkpoint" in refused(parent=tmp_path / "empty")
    assert "there is no model at" in refused(parent=tmp_path / "nowhere")


def test_an_unknown_architecture(refused, given, tmp_path):
    parent = copy_of(given.parent, tmp_path / "parent")
    config = read_json(parent / "config.json")
    write_json(parent / "config.json", config | {"model_type": "gpt_neo"})
    sentence = refused(parent=parent)
    assert "'gpt_neo' is not known" in sentence and "llama" in sentence


def test_a_truncated_shard(refused, given, tmp_path):
    parent = copy_of(given.parent, tmp_path / "parent")
    os.truncate(parent / "model.safetensors", (parent / "model.safetensors").stat().st_size - 1000)
    assert "model.safetensors is cut short" in refused(parent=parent)


def test_nan_in_a_shard_and_the_same_folder_once_it_is_mended(refused, given, tmp_path):
    parent = copy_of(given.parent, tmp_path / "parent")
    tensors = safetensors.torch.load_file(parent / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = torch.nan
    safetensors.torch.save_file(tensors, parent / "model.safetensors")
    sentence = refused(parent=parent)
    assert "model.layers.2.mlp.up_proj.weight" in sentence and "holds 1 values that are NaN" in sentence
    shutil.copy(given.parent / "model.safetensors", parent)
    assert "out of reach" in refused("--speedup", "1000", parent=parent)  # no longer the checkpoint's fault


def test_a_tokenizer_that_does_not_fit(refused, given, tmp_path):
    parent = copy_of(given.parent, tmp_path / "parent")
    tokenizer = make_tokenizer()
    tokenizer.backend.add_tokens(["<more>"])
    (parent / "tokenizer.json").write_text(tokenizer.backend.to_str())
    assert "ids up to 400 and the model's vocabulary has 400" in refused(parent=parent)
    (parent / "tokenizer.json").unlink()
    assert "holds no tokenizer" in refused(parent=parent)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"MZ\x00\x01\x02" * 100, "is binary"),
        (b"caf\xe9 " * 100, "not UTF-8"),
        (b"too short", "shorter than one sequence of 32"),
        (b"one document alone cannot be split into two parts. " * 100, "held-out part of 32 tokens"),
    ],
)
def test_text_that_is_none(refused, tmp_path, content, part):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(content)
    assert part in refused("--data", tmp_path / "text")


def test_a_held_out_part_shorter_than_one_sequence(refused, tmp_path):
    # Which documents are held out is decided by their hash: one short text that is, and a long one that is not.
    def place(text: str) -> float:
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64

    short = next(text for n in itertools.count() if place(text := f"x = {n}") < 0.02)
    long = next(text for n in itertools.count() if place(text := f"the end of line {n}, " * 50) > 0.1)
    (tmp_path / "two.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (short, long)))
    sentence = refused("--data", tmp_path / "two.jsonl")
    assert "held-out part of 32 tokens" in sentence and "data.length" in sentence


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--set", "distill.rate=1"], ["unknown key 'distill.rate'"]),
        (["--set", "distil.tokens=1"], ["unknown key 'distil'", "Did you mean 'distill'?"]),
        (["--set", "library.mode=nestd"], ["'library.mode'", "'nested' or 'own'"]),
        (["--set", "score.metric=KL"], ["'score.metric'", "'kl'"]),
        (["--set", "evaluate.tasks=['piqua']"], ["'piqa'"]),
        (["--set", "controls.kinds=['uniforn']"], ["'uniform'"]),
        (["--set", "controls.among=['prefix none']"], ["'prefix none'", "with commas between them"]),
        (["--set", "distill.batch_tokens=0"], ["'distill.batch_tokens'", "greater than or equal to 1"]),
        (["--set", "score.stride=64"], ["score.stride"]),
        (["--set", "options.ffn_widths=[2.0]"], ["'options.ffn_widths'", "less than 1"]),
        (["--set", "dtype=int8"], ["'dtype'", "'bfloat16'"]),
        (["--throughput", "50", "--throughput", "60"], ["--throughput is given twice, as 50 and as 60"]),
        (["--speedup", "0.9"], ["no speed-up"]),
        (["--memory", "3 horses"], ["no number with a unit"]),
        (["--scenario", "1,512"], ["no scenario"]),
        (["--scenario", "1,250,64"], ["314 tokens", "context is 256"]),
        (["--set", "data.length=300"], ["data.length is 300", "context is 256"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)  # fmt: skip
def test_a_recipe_that_cannot_be(refused, words, parts):
    sentence = refused(*words)
    assert all(part in sentence for part in parts), sentence


def test_a_target_given_twice_in_a_file(refused, given, tmp_path):
    file = make_recipe(tmp_path / "twice.toml", given.text, "speedup = 1.2\nspeedup = 1.3")
    assert "twice.toml is not readable as TOML" in refused(recipe=file)


def test_a_target_out_of_reach_is_answered_with_what_is_possible(refused, given, tmp_path):
    sentence = refused("--speedup", "1000")
    assert "a speed-up of 1000.000 is out of reach" in sentence
    low, high = map(float, re.search(r"between ([\d.]+) and ([\d.]+) is possible", sentence).groups())
    assert low == 1 < high < 1000
    near = re.search(r"Nearest feasible: --speedup ([\d.]+)", sentence)[1]
    assert float(near) == pytest.approx(high, rel=1e-3)
    # The costs are kept; a further try is answered from them. And what is offered is really feasible.
    costs = (tmp_path / "run" / "stages" / "cost" / "done.json").read_bytes()
    assert "out of reach" in refused("--speedup", "999")
    assert (tmp_path / "run" / "stages" / "cost" / "done.json").read_bytes() == costs
    assert "is out of reach" in refused("--params", "1k")
    assert "nothing to do: the parent already meets params=10M" in refused("--params", "10M")


def test_two_targets_that_contradict_each_other(refused, tmp_path):
    """Small but slow, or fast but large: costs are planted where linear blocks are quick and narrow FFNs small."""
    options = ("--set", "options.ffn_widths=[0.08]", "--set", "options.absent=false", "--set", "options.kv_methods=[]")
    refused("--speedup", "1000", *options)
    file = tmp_path / "run" / "stages" / "cost" / "costs.json"
    costs = read_json(file)
    for kind, cost in costs["blocks"].items():
        seconds = 0.5 if kind.startswith("Linear") else 1.0
        cost |= {"prefill_seconds": seconds, "decode_seconds": seconds}
    costs["fixed"] = {"prefill_seconds": 0.1, "decode_seconds": 0.1}
    file.write_text(json.dumps(costs))
    sentence = refused("--speedup", "1.9", "--params", "56000", *options)
    assert "cannot be met together" in sentence and "Nearest feasible: --" in sentence
    assert "with params=56k, speedup reaches" in sentence


def test_a_run_folder_made_from_another_parent(refused, given, tmp_path):
    refused("--speedup", "1000")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "lock"}
    other = make_parent(tmp_path / "other", seed=1)
    sentence = refused("--speedup", "1000", parent=other)
    assert "belongs to another run" in sentence and str(other) in sentence and "--out" in sentence
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "lock"}
    moved = copy_of(given.parent, tmp_path / "moved")  # the same model elsewhere is the same model
    assert "out of reach" in refused("--speedup", "1000", parent=moved)


def test_a_parent_with_nothing_to_compress(refused, tmp_path):
    for name, blocks in {"bare": (), "linear": (Linear(), Linear())}.items():
        parent = save(Decoder(ARCH.replace(blocks=blocks)), tmp_path / name, make_tokenizer())
        assert "neither attention nor FFN blocks" in refused(parent=parent)


def test_out_that_is_no_place_for_a_run(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(out=tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    assert "is not empty and is no run folder" in refused(out=tmp_path / "folder")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "thesis.tex").read_text() == "mine"


def test_in_a_process_of_its_own_the_sentence_is_all_there_is(given, tmp_path):
    out = tmp_path / "run"
    status, out, err = compress(given.parent, "--recipe", given.recipe, "--scenario", "1,300,1", "--out", out)
    assert (status, out) == (2, "") and err.startswith("intarsia: the scenario 1,300,1 takes 301 tokens")
    assert err.count("\n") == 1


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one's own whose size can be set."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(kilobytes: int) -> None:
        how = "remount," if os.path.ismount(place) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={kilobytes}k", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a small disk can only be made where this process may mount one")

    resize(64)
    yield place, resize
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_loses_nothing(refused, given, small_disk):
    place, resize = small_disk
    done: dict[str, bytes] = {}
    draw, size = random.Random(3), 64
    while size < 4000:
        sentence = refused("--params", "130k", out=place / "run")
        assert re.search(r"could not (write|make)", sentence), sentence
        now = {p.parent.name: p.read_bytes() for p in place.glob("run/stages/*/done.json") if p.parent.name != "load"}
        assert done.items() <= now.items()
        done, size = now, size + draw.randrange(150, 900)
        resize(size)
        if len(done) > 5:
            break
    resize(100_000)
    words = (given.parent, "--recipe", given.recipe, "--params", "130k", "--out", place / "run")
    assert cli.main(["compress", *map(str, words)]) == 0
    assert done.items() <= {p.parent.name: p.read_bytes() for p in place.glob("run/stages/*/done.json")}.items()
    assert (place / "run" / "report.html").exists()
