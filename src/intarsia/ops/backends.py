"""Which implementation of an op runs: torch everywhere; native code on CPUs and Triton on GPUs where they are there.

A backend is a package beside this file, `ops/native` or `ops/triton`. Nothing of it is imported before it is asked
for. Importing it, or asking it for `OPS`, raises `ImportError` with a sentence when it cannot run here (not built, no
compiler); else it has
    OPS: dict[str, Callable]                     implementations with the signatures of the public functions
    refuses(op, tensor, training) -> str         why it does not take this call ("" when it takes it); a function of the
                                                 tensor's device, dtype and rows (shape[:-1]), by powers of two
`INTARSIA_OPS=torch` (or native, triton) asks for one backend everywhere. One that is not there is an error; an op
that it does not have, or refuses, runs in torch, and `describe` says so.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType

import torch

from intarsia.base.errors import IntarsiaError

OPS = (
    "causal_conv", "causal_conv_step", "ssd", "ssd_step", "selective_scan", "selective_step", "gated_norm",
    "linear", "packed_linear", "attend", "paged_attention", "decode_step",
    "rms_norm", "silu_mul", "relu_squared", "rotate", "kl_rows", "nll_rows",
)  # fmt: skip
BACKENDS = ("torch", "native", "triton")
VARIABLE = "INTARSIA_OPS"
_picked: dict[tuple, tuple[Callable | None]] = {}
_HOME = {"cpu": "native", "cuda": "triton"}  # which backend a device would rather use


def choose(op: str, tensor: torch.Tensor, training: bool = False) -> str:
    """The backend that runs `op` on this tensor: "torch", "native" or "triton"."""
    return _choose(op, tensor, training)[0]


def explain(op: str, tensor: torch.Tensor, training: bool = False) -> tuple[str, str]:
    """`choose`, and why it is that one."""
    return _choose(op, tensor, training)


def describe(device: torch.device | str = "cpu") -> dict[str, tuple[str, str]]:
    """For every op: the backend that runs it in inference on bfloat16 tensors of this device, and why."""
    device = torch.device(device)
    sample = torch.empty(0, dtype=torch.bfloat16, device=device)
    return {op: _choose(op, sample, False) for op in OPS}


def pick(op: str, plain: Callable, *tensors: torch.Tensor | None) -> Callable:
    """The implementation of `op` for these arguments: `plain`, the torch one, unless a backend takes them.

    The first tensor decides by its device, dtype and rows; any that needs a gradient makes it training. What was chosen
    once for such a call is remembered: in decoding a choice would take as long as the op.
    """
    first = tensors[0]
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    size = first.numel() // first.shape[-1] - 1 if first.numel() else 0
    key = (op, first.device.type, first.dtype, training, size.bit_length(), os.environ.get(VARIABLE, ""))
    found = _picked.get(key)
    if found is None:
        name = choose(op, first, training)
        found = _picked[key] = (None if name == "torch" else _load(name)[0].OPS[op],)
    return found[0] or plain


def _choose(op: str, tensor: torch.Tensor, training: bool) -> tuple[str, str]:
    forced = os.environ.get(VARIABLE, "")
    if forced and forced not in BACKENDS:
        raise IntarsiaError(f"INTARSIA_OPS is {forced!r}; possible: {', '.join(BACKENDS)}.")
    if forced == "torch":
        return "torch", "INTARSIA_OPS=torch"
    name = forced or _HOME.get(tensor.device.type, "")
    if not name:
        return "torch", f"no other backend knows the device {tensor.device.type}"
    module, absent = _load(name)
    if module is None:
        if forced:
            raise IntarsiaError(f"INTARSIA_OPS={name}, but this backend is not there: {absent}.")
        return "torch", f"{name} is not there: {absent}"
    if op not in module.OPS:
        return "torch", f"{name} does not have it"
    refusal = module.refuses(op, tensor, training)
    return ("torch", f"{name}: {refusal}") if refusal else (name, "INTARSIA_OPS" if forced else "it is there")


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """The backend's package, or None and why not."""
    try:
        module = importlib.import_module(f"intarsia.ops.{name}")
        return (module, "") if hasattr(module, "OPS") else (None, "its folder holds no list of ops")
    except ImportError as error:
        return None, str(error)
