"""The machine at hand, as the operating system tells it: processor, its instructions, cores, memory. No torch."""

from __future__ import annotations

import os
import platform
import resource
import sys
from functools import cache
from importlib import metadata
from typing import Any

# Those that decide which matrix products are fast.
TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8",
                 "asimd", "bf16", "i8mm", "sve")  # fmt: skip
PACKAGES = ("intarsia", "torch", "numpy", "scipy", "safetensors", "tokenizers", "gguf", "transformers")


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            first = handle.read().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_model() -> str:
    """The processor's name for itself."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Which of `TELLING_FLAGS` the processor has."""
    info = _cpuinfo()
    have = set((info.get("flags") or info.get("Features") or "").split())
    return [flag for flag in TELLING_FLAGS if flag in have]


def cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="utf-8") as handle:
            quota, period = handle.read().split()
        return count if quota == "max" else max(1, min(count, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        return count


def memory_bytes() -> int:
    """Main memory, or the container's limit where that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="utf-8") as handle:
            limit = handle.read().strip()
        return physical if limit == "max" else min(physical, int(limit))
    except (OSError, ValueError):
        return physical


def peak_rss_bytes() -> int:
    """Most main memory that this process has held so far."""
    try:
        # Not getrusage first: Linux hands its maximum down from the process that started this one.
        with open("/proc/self/status", encoding="utf-8") as status:
            line = next(row for row in status if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str | None]:
    """The installed version of each package that a result depends on; None where it is absent."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment() -> dict[str, Any]:
    """What a result was made on, JSON-able. torch's own facts are there once torch has been imported."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": cpu_model(),
        "cpu_flags": cpu_flags(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "threads_variable": os.environ.get("OMP_NUM_THREADS"),
        "versions": versions(),
    }
    if torch := sys.modules.get("torch"):  # base imports no torch, and need not: whoever computes has done so
        facts["torch"] = {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "build": torch.__config__.show().splitlines(),
            "cuda": torch.version.cuda,
        }
    return facts
