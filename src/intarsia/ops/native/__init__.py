"""The Mamba ops in C++ for CPUs: AVX2, AVX-512, the same with bfloat16, or AMX, chosen when the process starts.
`ops.backends` imports this.

Compiled with the package where there is a C++ compiler, and by `python -m intarsia.ops.native.build`. A plain C
interface, called with pointers: the library knows neither Python nor torch. It has threads of its own, as many as
`torch.get_num_threads()` says when an op is called.

Nothing is loaded before it is asked for, so that `build` also runs where there is no library yet; then asking for
`OPS` raises `ImportError` with a sentence.
"""

from __future__ import annotations

from typing import Any

_KERNELS = ("OPS", "describe", "refuses")


def __getattr__(name: str) -> Any:
    if name not in _KERNELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from intarsia.ops.native import kernels

    globals().update({each: getattr(kernels, each) for each in _KERNELS})
    return globals()[name]
