"""What bench/contexts.py tells of a Transformer and a hybrid: in one process, on short contexts."""

import sys
from pathlib import Path

import pytest

BENCH = str(Path(__file__).parents[1] / "bench")


@pytest.fixture
def contexts(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import contexts

    return contexts


def run(contexts, monkeypatch, capsys, folder, *words) -> tuple[str, list[list[str]]]:
    monkeypatch.setattr(sys, "argv", ["contexts.py", *words, "--quick", "--out", str(folder / "out.json")])
    assert contexts.main() == 0
    text = capsys.readouterr().out
    return text, [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_both_models_at_every_context(contexts, monkeypatch, capsys, tmp_path):
    _, rows = run(contexts, monkeypatch, capsys, tmp_path, "nemotron-t-nano", "nemotron-h-nano")
    requests = rows[-4:]
    assert [row[:2] for row in requests] == [
        [n, m] for n in ("128", "512") for m in ("nemotron-t-nano", "nemotron-h-nano")
    ]
    transformer = 12 * 2 * 2 * 32 * 2 * (512 + 8)  # blocks x (key, value) x heads x dim x bytes x tokens
    assert int(requests[2][2]) == int(0.02 * 2**30 / transformer)
    assert all(float(row[5].split()[0]) > 0 for row in requests)


def test_only_what_is_decoded(contexts, monkeypatch, capsys, tmp_path):
    text, rows = run(contexts, monkeypatch, capsys, tmp_path, "nemotron-h-nano", "--parts", "decode")
    assert "Requests" not in text and len(rows) == 6


def test_seconds_are_added_up_to_tokens_a_second(contexts):
    found = contexts.Found(1, batch={64: 4}, full={64: [0.5]}, prefill={64: [2.0]})
    assert found.per_second(64, 10) == [40 / (4 * 2.0 + 10 * 0.5)]
