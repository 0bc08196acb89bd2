"""Bytes of a model at a scenario: counted, and as the operating system sees a process that runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from intarsia.arch import block_cache_bytes
from intarsia.base.errors import IntarsiaError
from intarsia.engine.scenario import Scenario
from intarsia.model import Decoder

_PROBE = """
import json, sys
import torch
from intarsia.compress.memory import resident
from intarsia.engine.scenario import Scenario, run_scenario
from intarsia.formats import load
path, scenario, dtype = sys.argv[1:]
torch.randn(64, 64) @ torch.randn(64, 64)
before = resident()
model, _ = load(path, dtype=dtype, weights="recorded")
weights = resident() - before
run_scenario(model, Scenario.parse(scenario))
print(json.dumps({"weights": weights, "running": resident() - before}))
"""


def cache_bytes(model: Decoder, scenario: Scenario) -> int:
    """Bytes of cache at the end of the scenario, by arithmetic."""
    return sum(block_cache_bytes(b, scenario.length, scenario.batch, model.dtype.itemsize) for b in model.arch.blocks)


def resident() -> int:
    """Bytes of this process in main memory (Linux)."""
    with open("/proc/self/status", encoding="utf-8") as status:
        line = next(row for row in status if row.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def in_process(path: Path, scenario: Scenario, dtype: torch.dtype) -> dict[str, int]:
    """What a fresh process grows by: `weights` after loading the model, `running` after the scenario, in bytes.

    Empty where the operating system does not tell.
    """
    if not Path("/proc/self/status").exists():
        return {}
    command = [sys.executable, "-c", _PROBE, str(path), str(scenario), str(dtype).removeprefix("torch.")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise IntarsiaError(f"the process that measures the memory of {path} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])
