"""What bench/tasks.py tells of finished runs: who answers better, question by question."""

import gzip
import json
import statistics
import sys
from pathlib import Path

import pytest

from byte_tokenizer import byte_tokenizer
from intarsia.arch import Architecture, Attention, FeedForward
from intarsia.base.files import write_json
from intarsia.evaluate import TASKS, answers, load_task
from intarsia.formats import load, save
from intarsia.model import Decoder, initialise

BENCH = str(Path(__file__).parents[1] / "bench")
WORDS = ("sea", "stone", "name", "calm", "old", "road")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder as bench/compress.py leaves it: one budget by two methods, a control, their parent."""
    home = tmp_path_factory.mktemp("answers")
    arch = Architecture.transformer(
        2, Attention(4, 2, 16), FeedForward(128), hidden_size=64, vocab_size=257, max_positions=64, tied_embeddings=True
    )
    places = {
        "parent": home / "parent", "puzzle": home / "runs/memory-20/child",
        "minipuzzle": home / "runs/memory-20-minipuzzle/child", "depth": home / "runs/memory-20/controls/depth",
    }  # fmt: skip
    for seed, place in enumerate(places.values()):
        place.parent.mkdir(parents=True, exist_ok=True)
        save(initialise(Decoder(arch), seed, 0.3), place, byte_tokenizer())
    said = {"parent": {"path": str(places["parent"]), "name": "tiny"}, "controls": {"depth": {}}}
    write_json(home / "runs/memory-20/summary.json", said)
    write_json(home / "runs/memory-20-minipuzzle/summary.json", said | {"controls": {}})
    (home / "tasks").mkdir()
    for name in TASKS:
        endings = 1 if name == "lambada" else 2
        rows = [
            {"doc_id": d, "idx": i, "label": ["x"] if name == "lambada" else d % 2,
             "request": {"context": f"the {WORDS[d % 6]}", "continuation": f" {WORDS[(d + i + 1) % 6]}"}}
            for d in range(12) for i in range(endings)
        ]  # fmt: skip
        with gzip.open(home / "tasks" / f"{name}.jsonl.gz", "wt") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    return home, places


def told(home, monkeypatch, capsys, *words):
    import tasks

    monkeypatch.setattr(sys, "argv", [
        "tasks.py", str(home / "runs"), "--tasks", str(home / "tasks"), "--docs", str(home / "page.md"), *words,
    ])  # fmt: skip
    assert tasks.main() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[c.strip() for c in line.split("|")[1:-1]] for line in lines][2:]


def test_the_difference_is_that_of_the_same_questions(runs, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCH)
    home, places = runs
    rows = told(home, monkeypatch, capsys, "--limit", "10")
    assert [row[:2] for row in rows] == [
        ["", "parent"], ["memory-20", "**puzzle**"], ["", "**minipuzzle**"], ["", "depth"]
    ]  # fmt: skip
    assert rows[0][3] == rows[1][3] == "" and "± " in rows[2][3]
    made = {}
    for name in ("puzzle", "depth"):
        model, tokenizer = load(places[name])
        made[name] = {t: answers(model.eval(), tokenizer, t, load_task(t, home / "tasks", 10)) for t in TASKS}
    gaps = [
        [a - b for a, b in zip(made["puzzle"][t].probability, made["depth"][t].probability)] for t in TASKS
    ]  # fmt: skip
    errors = [statistics.stdev(gap) / 10**0.5 for gap in gaps]
    value = 100 * statistics.fmean(map(statistics.fmean, gaps))
    error = 100 * sum(e**2 for e in errors) ** 0.5 / len(TASKS)
    assert rows[3][5] == f"{value:.1f} ± {error:.1f} %"
    assert "<!-- bench/tasks.py" in (home / "page.md").read_text()


def test_what_is_known_is_not_asked_again_unless_the_model_is_another(runs, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCH)
    home, places = runs
    first = told(home, monkeypatch, capsys, "--limit", "6")
    import tasks

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "answers", lambda *args: pytest.fail("asked again"))
        assert told(home, monkeypatch, capsys, "--limit", "6") == first
    model, tokenizer = load(places["depth"])
    save(initialise(Decoder(model.arch), 9, 0.3), home / "other", tokenizer)
    places["depth"].rename(home / "gone")
    (home / "other").rename(places["depth"])
    again = told(home, monkeypatch, capsys, "--limit", "6")
    assert again[:3] == first[:3] and again[3][4] != first[3][4]


def test_a_budget_that_is_not_there_is_a_sentence(runs, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import tasks

    from intarsia.base.errors import IntarsiaError

    with pytest.raises(IntarsiaError, match="no finished run of memory-40; it has: memory-20"):
        tasks.budgets(runs[0] / "runs", ["memory-40"])
    with pytest.raises(IntarsiaError, match="no finished run: make some"):
        tasks.budgets(runs[0] / "nothing")
