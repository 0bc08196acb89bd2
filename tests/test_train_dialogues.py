"""Fine-tuning and preference tuning through the loop of pre-training: they learn, and go on to the same bits."""

import json
import math
import shutil

import pytest
import torch

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json, read_jsonl
from intarsia.base.runfolder import losses
from intarsia.data import Corpus, load_blend, mix
from intarsia.formats import load
from intarsia.formats.chat import chat_text
from intarsia.train.loop import train
from tiny_training import make_dialogues, read

EXTEND = ("data.extend.length=128", "data.extend.share=0.9")
WAYS = {
    "fine-tuning": ("conversations", ()),
    "long": ("conversations", EXTEND),
    "dpo": ("preferences", ('loss.preference.kind="dpo"', "optimizer.lr=1e-3")),
    "rpo": ("preferences", ('loss.preference.kind="rpo"', "loss.preference.eta=4.0", "optimizer.lr=1e-3")),
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    torch.set_num_threads(1)
    return make_dialogues(tmp_path_factory.mktemp("dialogues"))


@pytest.fixture(scope="module")
def runs(recipes, tmp_path_factory):
    """An undisturbed run of every way."""
    found = {}
    for way, (kind, changes) in WAYS.items():
        found[way] = tmp_path_factory.mktemp(way) / "run"
        train(read(recipes[kind], *changes), found[way])
    return found


def figures(run):
    return [(row["step"], row["loss"], row["lr"], row["gradient_norm"]) for row in losses(run)]


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_it_ends_with_the_same_bits(recipes, runs, way, tmp_path):
    kind, changes = WAYS[way]
    run = tmp_path / "run"
    shutil.copytree(runs[way], run)
    for step in (4, 6, 8):
        shutil.rmtree(run / "checkpoints" / f"step_{step:09d}")
    (run / "summary.json").unlink()
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "data")  # made again, to the same bits
    train(read(recipes[kind], *changes), run)
    rows = [row["step"] for row in read_jsonl(run / "metrics.jsonl") if "loss" in row]
    assert rows == [*range(8), *range(2, 8)]
    assert figures(run) == figures(runs[way])
    one, other = (path / "model" / "model.safetensors" for path in (run, runs[way]))
    assert one.read_bytes() == other.read_bytes()


def test_fine_tuning_learns_what_the_assistant_says(runs):
    rows = losses(runs["fine-tuning"])
    assert len(rows) == 8 and rows[-1]["loss"] < rows[0]["loss"] - 1
    found = read_json(runs["fine-tuning"] / "summary.json")["bits_per_byte"]
    assert set(found) == {"sums", "all"} and 0 < found["all"]["value"] < 2
    _, tokenizer = load(runs["fine-tuning"] / "model")
    assert chat_text(tokenizer, [{"role": "user", "content": "a"}]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode([tokenizer.eos_id]) == "<|im_end|>"


def test_a_loss_is_the_mean_over_what_the_assistant_says(recipes, runs):
    recipe = read(recipes["conversations"])
    corpus = Corpus(runs["fine-tuning"] / "data" / "corpus")
    batch = mix(corpus, load_blend("all").model_copy(update={"max_epochs": 50}), 4096, 128, packing="whole",
                seed=recipe.seed).batch(0, recipe.batch)  # fmt: skip
    tokens, targets, segments = (torch.from_numpy(a) for a in (batch.tokens, batch.targets, batch.segments))
    counts = targets >= 0
    model, tokenizer = load(recipe.init)
    said = tokenizer.decode(targets[counts].tolist())
    assert not {*said.replace("<|im_end|>", "")} - {*"0123456789"}  # the sums, and nothing of the questions
    nll = -model(tokens, segments=segments).double().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])
    assert losses(runs["fine-tuning"])[0]["loss"] == pytest.approx(nll[..., 0][counts].mean().item(), rel=1e-5)


def test_long_samples_are_made_of_joined_conversations(runs):
    folder = next((runs["long"] / "data" / "extended").iterdir())
    rows = [json.loads(line)["messages"] for line in (folder / "sums.jsonl").read_text().splitlines()]
    assert max(map(len, rows)) > 6 and sum(len(row) == 4 for row in rows) < 32
    assert losses(runs["long"])[-1]["loss"] < losses(runs["long"])[0]["loss"] - 1


@pytest.mark.parametrize("way", ["dpo", "rpo"])
def test_preferences_move_the_model_from_its_reference(runs, way):
    rows = losses(runs[way])
    if way == "dpo":  # at the first step the model is its reference: a coin
        assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    found = read_json(runs[way] / "summary.json")["accuracy"]
    assert found["all"]["value"] > 0.9 and found["all"]["n"] >= 3
    assert read_jsonl(runs[way] / "metrics.jsonl")[-1]["accuracy"] == found["all"]["value"]


def test_what_is_not_possible_is_a_sentence(recipes, tmp_path):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    rows = [{"prompt": f"what is {n}", "chosen": "a", "rejected": "b"} for n in range(40)]
    (pairs / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rpo, cases = WAYS["rpo"][1], []
    cases.append(("preferences", (*rpo, f"data.path={pairs}"), "have no rewards"))
    cases.append(("conversations", rpo, "is no pairs of answers"))
    cases.append(("preferences", (*rpo, 'data.packing="split"'), "read whole and apart"))
    for number, (kind, changes, sentence) in enumerate(cases):
        with pytest.raises(IntarsiaError, match=sentence):
            train(read(recipes[kind], *changes), tmp_path / str(number))
    for change, sentence in (("loss.z=1e-4", "stands alone"), ("data.extend.length=64", "joins conversations")):
        with pytest.raises(IntarsiaError, match=sentence):
            read(recipes["preferences"], *rpo, change)
