"""The Python API is lazy, and loading needs little more memory than the weights."""

import json
import subprocess
import sys

import pytest
import torch

import intarsia
from intarsia import formats
from intarsia.arch import Architecture, Attention, FeedForward
from intarsia.model import Decoder, initialise


def fresh(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_quick_and_light():
    code = """
import json, sys, time
began = time.perf_counter()
import intarsia
print(json.dumps([time.perf_counter() - began, sorted({"torch", "transformers", "numpy"} & set(sys.modules))]))
"""
    seconds, heavy = min(fresh(code) for _ in range(3))
    assert heavy == []
    assert seconds < 0.05


def test_verbs_import_torch_and_never_transformers():
    code = """
import json, sys
import intarsia
found = [intarsia.load.__module__, intarsia.save.__module__]
print(json.dumps([found, "torch" in sys.modules, "transformers" in sys.modules]))
"""
    assert fresh(code) == [["intarsia.formats.reader", "intarsia.formats.writer"], True, False]


def test_rooms_that_are_verbs_stay_rooms():
    """`intarsia.compress` is a package and a function, in whichever order it is first touched."""
    code = """
import json, types
import intarsia.compress.solve
import intarsia
room = intarsia.compress
print(json.dumps([isinstance(room, types.ModuleType), callable(room), room.solve.__name__]))
"""
    assert fresh(code) == [True, True, "intarsia.compress.solve"]


def test_unknown_attributes_are_errors():
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        _ = intarsia.distill
    assert {"load", "save", "generate", "evaluate", "compress"} <= set(dir(intarsia))


def test_api_round_trip(tmp_path):
    arch = Architecture.transformer(1, Attention(2, 1, 8), FeedForward(24), hidden_size=16, vocab_size=32)
    intarsia.save(initialise(Decoder(arch)), tmp_path / "m")
    model, tokenizer = intarsia.load(tmp_path / "m", dtype=torch.bfloat16)
    assert tokenizer is None and not model.training
    assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 32)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_peaks_under_a_fifth_above_the_weights(dtype, tmp_path):
    arch = Architecture.transformer(
        4, Attention(16, 4, 64), FeedForward(4096), hidden_size=1024, vocab_size=32_000, tied_embeddings=True
    )
    model = Decoder(arch, dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    formats.save(model, tmp_path / "m", shard_bytes=60_000_000)
    del model
    code = """
import json, sys
import intarsia.formats
def peak():
    # Not ru_maxrss: that begins at what the test process held when it forked.
    return 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
before = peak()
model, _ = intarsia.formats.load(sys.argv[1], dtype=sys.argv[2])
print(json.dumps([peak() - before, sum(p.numel() * p.element_size() for p in model.parameters())]))
"""
    grown, weights = fresh(code, str(tmp_path / "m"), dtype)
    assert weights > 150e6
    assert weights * 0.9 < grown < weights * 1.2
