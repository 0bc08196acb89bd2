"""Tasks from request files: reading, encoding at the seam, scoring, and the whole of `evaluate`."""

import gzip
import json
import math
import statistics

import pytest
import tokenizers
import torch

from intarsia.arch import Architecture, Attention, FeedForward
from intarsia.base.errors import IntarsiaError
from intarsia.data import build as build_data
from intarsia.evaluate import evaluate, load_task, run_task
from intarsia.evaluate.tasks import Item, encode_pairs
from intarsia.formats.tokenizer import Tokenizer
from intarsia.model import Decoder, initialise


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes with a few merges, one of which (`Ġb`) would cross a seam that ends in a space."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "Ġb", "ab", "<end>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("Ġ", "b"), ("a", "b")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, {"eos_token": "<end>"})


@pytest.fixture(scope="module")
def model(tokenizer):
    arch = Architecture.transformer(
        2, Attention(4, 2, 8), FeedForward(48), hidden_size=32, vocab_size=tokenizer.vocab_size, tied_embeddings=True,
        max_positions=96,
    )  # fmt: skip
    return initialise(Decoder(arch), std=0.3).eval()


def write_requests(folder, name, items, extra=()):
    rows = [
        {"doc_id": d, "idx": i, "label": [ending] if name == "lambada" else item.gold,
         "request": {"context": item.context, "continuation": ending}}
        for d, item in enumerate(items) for i, ending in enumerate(item.endings)
    ]  # fmt: skip
    with gzip.open(folder / f"{name}.jsonl.gz", "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in [*rows, *extra])


def items_of(count, endings):
    words = ["aba", "bb", "cab", "abba", "c", "bac"]

    def ending(i, k):
        return f" {words[(i * k + k) % 6]}{k}" * (k + 1)

    golds = [i % endings for i in range(count)]
    return [Item(f"q {words[i % 6]}{i}", tuple(ending(i, k) for k in range(endings)), g) for i, g in enumerate(golds)]


def test_requests_are_read_back_without_the_unconditional_ones(tmp_path):
    items = items_of(7, 4)
    unconditional = {"doc_id": 1_000_000, "idx": 0, "label": 0, "request": {"context": "", "continuation": " x"}}
    write_requests(tmp_path, "hellaswag", items, [unconditional])
    assert load_task("hellaswag", tmp_path) == items
    assert load_task("hellaswag", tmp_path, limit=3) == items[:3]


def test_bad_tasks_are_sentences(tmp_path):
    with pytest.raises(IntarsiaError, match="piqa, arc_easy"):
        load_task("mmlu", tmp_path)
    with pytest.raises(IntarsiaError, match="fetch tasks"):
        load_task("piqa", tmp_path)
    (tmp_path / "piqa.jsonl.gz").write_bytes(gzip.compress(b'{"doc_id": 0}\n')[:-3])
    with pytest.raises(IntarsiaError, match="damaged"):
        load_task("piqa", tmp_path)


def test_the_seam_belongs_to_the_ending(tokenizer):
    (whole, first), (moved, moved_first), (cut, cut_first) = encode_pairs(
        tokenizer, [("xa", " b"), ("xa ", "b"), ("a" * 50, " ba")], context=10
    )
    assert tokenizer.decode(whole[first:]) == " b"
    assert (moved, moved_first) == (whole, first)
    assert len(cut) == 11
    assert tokenizer.decode(cut[cut_first:]) == " ba"
    # `a` + `b` merge over the seam: the ending is what lies beyond the context's own tokens, and is not empty.
    (merged, merged_first), = encode_pairs(tokenizer, [("xa", "b")], context=10)
    assert merged_first == 1 and len(merged) == 2


@torch.no_grad()
def log_likelihood(model, tokenizer, text, ending):
    ids = tokenizer.encode(text + ending)
    logs = model(torch.tensor([ids])).double().log_softmax(-1)[0]
    first = len(tokenizer.encode(text))
    return sum(logs[i - 1, ids[i]].item() for i in range(first, len(ids)))


@pytest.mark.parametrize("name, count", [("piqa", 2), ("arc_easy", 4), ("hellaswag", 4)])
def test_scores_follow_the_definition(model, tokenizer, name, count):
    items = items_of(24, count)
    found = run_task(model, tokenizer, name, items)
    plain = by_length = 0
    chances = []
    for item in items:
        logs = [log_likelihood(model, tokenizer, item.context, e) for e in item.endings]
        plain += max(range(count), key=lambda i: logs[i]) == item.gold
        by_length += max(range(count), key=lambda i: logs[i] / len(item.endings[i])) == item.gold
        mean_length = sum(map(len, item.endings)) / count
        scaled = [x * mean_length / len(e) for x, e in zip(logs, item.endings)] if name == "hellaswag" else logs
        chances.append(math.exp(scaled[item.gold]) / sum(map(math.exp, scaled)))
    figures = {"accuracy": plain / 24, "normalised": by_length / 24}
    assert found["value"] == figures[found["metric"]]
    assert found["metric"] == ("normalised" if name == "hellaswag" else "accuracy")
    other = "accuracy" if name == "hellaswag" else "normalised"
    assert found[other]["value"] == figures[other]
    assert found["se"] == pytest.approx((found["value"] * (1 - found["value"]) / 24) ** 0.5)
    assert found["probability"]["value"] == pytest.approx(statistics.fmean(chances), rel=1e-4)
    assert found["probability"]["se"] == pytest.approx(statistics.stdev(chances) / 24**0.5, rel=1e-4)


@torch.no_grad()
def test_greedy_is_what_the_model_would_say(model, tokenizer):
    from intarsia.engine import generate

    right = []
    for i in range(6):
        context = f"q{i}"
        said = tokenizer.decode(generate(model, tokenizer.encode(context), 2))
        if tokenizer.encode(context + said)[: len(tokenizer.encode(context))] == tokenizer.encode(context):
            right.append(Item(context, (said,), 0))
    right = [r for r in right if "�" not in r.endings[0] and r.endings[0].strip()]
    assert right
    wrong = [Item(r.context, (" zz~~",), 0) for r in right]
    assert run_task(model, tokenizer, "lambada", right)["value"] == 1
    both = run_task(model, tokenizer, "lambada", right + wrong)
    assert both["value"] == 0.5
    chances = [math.exp(log_likelihood(model, tokenizer, i.context, i.endings[0])) for i in right + wrong]
    assert both["probability"]["value"] == pytest.approx(statistics.fmean(chances), rel=1e-4)


def test_evaluate_says_everything_in_json(model, tokenizer, tmp_path):
    text = tmp_path / "notes"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(f"document {i}: " + "abab cab " * (5 + i % 7))
    corpus = build_data([text], tokenizer, tmp_path / "corpus")
    write_requests(tmp_path, "piqa", items_of(5, 2))
    write_requests(tmp_path, "lambada", items_of(5, 1))
    child = initialise(Decoder(model.arch), seed=3, std=0.3)
    found = evaluate(
        child, tokenizer, corpus, tasks=("piqa", "lambada"), limit=4, parent=model, length=32, rows=3,
        tasks_folder=tmp_path,
    )  # fmt: skip
    assert json.loads(json.dumps(found)) == found
    assert found["kl"]["value"] > 0 and found["kl"]["n"] == 3
    assert set(found["bits_per_byte"]) == {"notes", "all"}
    assert found["tasks"]["piqa"]["n"] == found["parent"]["tasks"]["lambada"]["n"] == 4
    assert found["parent"]["bits_per_byte"]["all"]["value"] != found["bits_per_byte"]["all"]["value"]
    with pytest.raises(IntarsiaError, match="nothing to measure"):
        evaluate(child, tokenizer, tasks=())
    with pytest.raises(IntarsiaError, match="no tokenizer"):
        evaluate(child, None, tasks=("piqa",), tasks_folder=tmp_path)
