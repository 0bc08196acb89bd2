"""What bench/weights.py tells of a model: in one process, on a little text."""

import sys
from pathlib import Path

import pytest

from byte_tokenizer import byte_tokenizer
from intarsia.arch import Architecture, Attention, FeedForward
from intarsia.formats import save
from intarsia.model import Decoder, initialise

BENCH = str(Path(__file__).parents[1] / "bench")


@pytest.fixture
def model_folder(tmp_path):
    arch = Architecture.transformer(
        2, Attention(4, 2, 16), FeedForward(128), hidden_size=64, vocab_size=257, max_positions=64, tied_embeddings=True
    )
    save(initialise(Decoder(arch), std=0.3), tmp_path / "tiny", byte_tokenizer())
    return tmp_path / "tiny"


@pytest.fixture
def text_folder(tmp_path):
    (tmp_path / "text").mkdir()
    for n in range(40):
        (tmp_path / "text" / f"{n}.txt").write_text(f"Page {n}. " + "The sea was calm, and old stones kept names. " * 4)
    return tmp_path / "text"


def test_fewer_bits_are_farther_from_float32(model_folder, text_folder, monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(BENCH)
    import weights

    words = [str(model_folder), "--data", str(text_folder), "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["weights.py", *words, "--quick"])
    assert weights.main() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines][2:]
    assert [row[0] for row in rows] == ["float32", "bf16", "int8", "int4", "int4+", "sparse", "fp8"]
    kl = {row[0]: float(row[2].split()[0]) for row in rows[1:]}
    assert 0 <= kl["bf16"] < kl["int4"] and kl["int8"] < kl["int4"] < 1
    assert rows[0][2] == "" and all(float(row[4].split()[0]) > 1 for row in rows)
