"""What bench/train.py tells of Transformer, Mamba-1, Mamba-2 and hybrid: in one process, on a few tokens."""

import json
import sys
from pathlib import Path

import pytest
import torch

from intarsia.arch import block_cache_bytes, catalog

MODELS = {
    "transformer": "nemotron-t-nano", "mamba1": "mamba1-nano", "mamba2": "mamba2-nano", "hybrid": "nemotron-h-nano",
}  # fmt: skip
CONTEXTS = (64, 256)
STATES = [16, 32, 64, 128]


@pytest.fixture(scope="module")
def found():
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    try:
        from architectures import compared

        yield compared(MODELS, torch.float32, (1, 32), CONTEXTS, turns=1, decoded=1)
    finally:
        sys.path.pop(0)


def test_a_figure_of_every_kind_for_every_model(found):
    for kind in ("train", "decode", "bytes", "parameters"):
        assert list(found[kind]) == list(MODELS)
    assert all(len(each) == 1 and each[0] > 0 for each in found["train"].values())
    assert all(list(each) == list(CONTEXTS) and len(each[64]) == 1 for each in found["decode"].values())
    assert {name: list(each) for name, each in found["scans"].items()} == dict.fromkeys(("mamba1", "mamba2"), STATES)


def test_memory_grows_with_the_context_where_there_is_attention(found):
    for name, (short, long) in found["bytes"].items():
        blocks = catalog.get(MODELS[name]).blocks
        assert [short, long] == [sum(block_cache_bytes(b, n, bytes_per_element=4) for b in blocks) for n in CONTEXTS]
        assert (short == long) == name.startswith("mamba")
    assert found["bytes"]["transformer"][1] == 4 * found["bytes"]["transformer"][0]


def test_the_tables(found):
    from training_tables import section

    runs = {name: [{"bits_per_byte": {"all": {"value": 2.5 + i}}, "losses": [3.0, 2.0], "skipped": 0}]
            for i, name in enumerate(MODELS)}  # fmt: skip
    text = section(json.loads(json.dumps({
        "machine": {"cpu": "a", "flags": [], "threads": 1, "command": "b"}, "tokens": 5, "seeds": 1, "notes": [],
        "speed": {}, "runs": runs, "architectures": found,
    })))  # fmt: skip
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    table, scans = rows[: 2 + len(MODELS)], rows[2 + len(MODELS) : 4 + len(MODELS) + len(STATES)]
    assert len({len(row) for row in table}) == 1
    assert [(row[0].strip(), row[2].strip()) for row in table[2:]] == [
        ("transformer", "2.500"), ("mamba1", "3.500"), ("mamba2", "4.500"), ("hybrid", "5.500"),
    ]  # fmt: skip
    assert "State space duality (Mamba-2) over the selective scan (Mamba-1)" in text
    assert [row[0].strip() for row in scans[2:]] == list(map(str, STATES)) and all(row[3].strip() for row in scans)
