"""The compiled library that fits this processor, called through ctypes, which releases the interpreter's lock.

`INTARSIA_NATIVE=avx2` (or another name of `build.LEVELS`) asks for a level lower than the processor's best.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass

import torch

import intarsia
from intarsia.base.errors import IntarsiaError
from intarsia.ops.native import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as the library numbers them
_LETTERS = {"i": ctypes.c_int, "l": ctypes.c_long, "f": ctypes.c_float, "p": ctypes.c_void_p}
_SIGNATURES = {  # i int, l long, f float, p pointer; the order of cpp/*.cpp
    "conv_forward": "i pll ppp p llll ii",
    "conv_backward": "i pll ppp pppp llll ii",
    "conv_sums": "ll",
    "conv_step": "ii pl pppp lll i",
    "ssd_forward": "i pll pll pll ppp pp pp llllll i",
    "ssd_parts": "lll",
    "ssd_backward": "i pll pll pll ppp pp pp ppp pppp llllll i",
    "ssd_step": "i pl pp pl pl ppp lllll i",
    "selective_forward": "i ppppppp ppp llll i",
    "selective_chunks": "l",
    "selective_groups": "l",
    "selective_backward": "i ppppppp ppppppppp llll i",
    "selective_step": "i pppppp pp lll i",
    "matvec_bf16": "i pl pl pp lll i",
    "packed_linear": "i p pl p l i",
    "packed_rows": "p p l p",
    "decode_step": "p p p p",
    "paged_attention": "pp pp pl p llll llll l i",
    "prompt_attention": "plll plll plll p lllllll i",
    "gated_norm_forward": "i pl pl p p lll f i",
    "gated_norm_backward": "i pl pl p pppp lll f i",
    "gated_norm_sums": "l",
    "rms_norm_forward": "i pl ppp ll f i",
    "rms_norm_sums": "l",
    "rms_norm_backward": "i pl ppppp ll i",
    "silu_mul_forward": "i ppp l i",
    "silu_mul_backward": "i ppppp l i",
    "relu_squared_forward": "i pp l i",
    "relu_squared_backward": "i ppp l i",
    "rotate_heads": "i plll pp ll plll llll f i",
    "kl_rows": "i ppppp ll i",
    "nll_rows": "i ppppp ll i",
    "sum_rows": "pp ll i",
    "intarsia_team": "p",
}
_COUNTS = ("conv_sums", "ssd_parts", "selective_chunks", "selective_groups", "gated_norm_sums", "rms_norm_sums")
HOW = "python -m intarsia.ops.native.build"


@dataclass(frozen=True)
class Library:
    """One level, loaded: its functions are attributes of `code`."""

    level: str
    code: ctypes.CDLL


def open_level(level: str) -> Library:
    """Load the library of one level. Raises ImportError with a sentence when it is not there or out of date."""
    path = build.library_path(level)
    if not path.exists():
        raise ImportError(f"the native library of level {level} is not built ({HOW})")
    try:
        code = ctypes.CDLL(str(path))
        code.intarsia_sources.restype = ctypes.c_char_p
        current = code.intarsia_sources().decode() == build.sources_key()
        for name, letters in _SIGNATURES.items() if current else ():
            getattr(code, name).argtypes = [_LETTERS[letter] for letter in letters.replace(" ", "")]
        if current:
            share_threads(code)
        for name in _COUNTS if current else ():
            getattr(code, name).restype = ctypes.c_long
    except (OSError, AttributeError) as error:
        raise ImportError(f"{path.name} does not load: {error}") from error
    if not current:
        raise ImportError(f"{path.name} was built from other sources; build it again ({HOW})")
    return Library(level, code)


def best() -> tuple[Library, str]:
    """The highest level that this processor runs and that was built, and why it is that one."""
    names = list(build.LEVELS)
    reaches = names[open_level("plain").code.intarsia_level()]
    wanted = os.environ.get("INTARSIA_NATIVE", reaches)
    if wanted not in names:
        raise IntarsiaError(f"INTARSIA_NATIVE is {wanted!r}; possible: {', '.join(names)}.")
    if names.index(wanted) > names.index(reaches):
        raise IntarsiaError(f"INTARSIA_NATIVE={wanted}, but this processor reaches {reaches}.")
    problem = ""
    for level in reversed(names[: names.index(wanted) + 1]):
        try:
            library = open_level(level)
        except ImportError as error:
            problem = problem or str(error)
            continue
        why = "INTARSIA_NATIVE" if wanted != reaches else "the best that this processor runs"
        return library, f"{why}; {problem}" if problem else why
    raise ImportError(problem)


def share_threads(code: ctypes.CDLL) -> None:
    """Let native code run on the threads of GNU's OpenMP, torch's own, where those spin while they wait for work.

    They do where torch was imported before this package, which tells them not to (`intarsia/__init__.py`); beside
    them threads of our own would get half a core. Without GNU's OpenMP nothing changes.
    """
    code.intarsia_team(_gomp_parallel() if intarsia.SPINNING else None)


@functools.cache
def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel in this process; of several OpenMPs the one that lies with torch."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            paths = [line.split()[-1] for line in maps if "libgomp" in line]
        path = max(paths, key=lambda path: "torch" in path, default=None)
        return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value if path else None
    except (OSError, AttributeError):
        return None


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def dense(tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    """Contiguous, and of `dtype` if given; the tensor itself where it is so already."""
    if tensor is None:
        return None
    return (tensor if dtype is None else tensor.to(dtype)).contiguous()


def summed(rows: torch.Tensor) -> torch.Tensor:
    """(R, ...) float32 and contiguous -> (...): the sum over rows, in their order on any number of threads."""
    total = torch.empty(rows.shape[1:])
    loaded.code.sum_rows(rows.data_ptr(), total.data_ptr(), len(rows), total.numel(), torch.get_num_threads())
    return total


loaded, reason = best()  # importing this module fails with a sentence where nothing can be loaded
