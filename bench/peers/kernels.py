"""The kernels of a Mamba-2 block against the machine's ceilings, both measured: bytes moved and operations done.

Shape letters: B batch, L length, H heads, P head dim, G groups, N state, Q chunk, C channels of the convolution, K its
kernel. Bytes are those that must move, each input read once and each output written once; operations are those of the
chunked form (arXiv 2405.21060, section 6) with half of every chunk's square, 2 for a multiply and an add. A backward
pass counts as twice its forward's operations. A kernel reaches the share (time that the slower ceiling allows) / time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from intarsia.arch import Mamba2, catalog
from intarsia.ops.backends import describe
from intarsia.ops.conv import causal_conv
from intarsia.ops.gated_norm import gated_norm
from intarsia.ops.ssd import ssd, ssd_step
from peers.torch_clock import now

Case = tuple[str, str, Callable[[], Any], float, float]  # name, op, call, bytes, operations


def ceilings(device: str, seconds: float = 0.5) -> dict[str, float]:
    """Floating-point operations a second of a bfloat16 matrix product, and bytes a second of a copy, reads and writes
    counted; the best of the sizes tried."""
    where = torch.device(device)
    rates = []
    for size in (1024, 2048, 4096) if where.type == "cpu" else (4096, 8192, 16384):
        a, b = (torch.randn(size, size, device=where).bfloat16() for _ in range(2))
        rates.append(2 * size**3 / _seconds(lambda a=a, b=b: a @ b, where, seconds))
    source = torch.ones(1 << (28 if where.type == "cpu" else 30), dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / _seconds(lambda: target.copy_(source), where, seconds)
    return {"operations": max(rates), "bytes": copied}


def measure(model: str, device: str, length: int, batch: int, seconds: float = 0.5) -> list[dict[str, Any]]:
    """Every kernel of the model's Mamba-2 blocks in bfloat16: prompts of `length`, steps of `batch` sequences."""
    where = torch.device(device)
    spec = next(b for b in catalog.get(model).blocks if isinstance(b, Mamba2))
    backend = {op: name for op, (name, _) in describe(where).items()}
    rows = []
    for cases in (_scan, _step, _conv, _norm):
        for name, op, call, moved, done in cases(spec, where, batch if cases is _step else length):
            took = _seconds(call, where, seconds)
            rows.append({"kernel": name, "backend": backend[op], "seconds": took, "bytes": moved, "operations": done})
    return rows


def _seconds(call: Callable[[], Any], device: torch.device, budget: float) -> float:
    """Seconds of one call: the quickest of several bursts, each long enough for the clock, some `budget` in all."""
    for _ in range(2):
        began = now(device)
        call()
        once = now(device) - began
    burst = max(1, int(0.01 / max(once, 1e-6)))
    best, end = once, time.perf_counter() + budget
    while time.perf_counter() < end:
        began = now(device)
        for _ in range(burst):
            call()
        best = min(best, (now(device) - began) / burst)
    return best


def _both(name: str, op: str, call: Callable[..., torch.Tensor], inputs: list[torch.Tensor], read: float,
          done: float) -> Iterator[Case]:  # fmt: skip
    """The forward pass without a graph, then the backward pass of one graph, again and again."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = call(*leaves)
    dy, written = torch.randn_like(y), _bytes([y])
    yield name, op, lambda: _without_graph(call, *inputs), read + written, done
    yield (
        f"{name}, backward", op, lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True),
        2 * read + written, 2 * done,
    )  # fmt: skip


def _without_graph(call: Callable[..., Any], *inputs: torch.Tensor) -> None:
    with torch.inference_mode():
        call(*inputs)


def _scan(s: Mamba2, device: torch.device, length: int) -> Iterator[Case]:
    x = torch.randn(1, length, s.num_heads, s.head_dim, device=device).bfloat16()
    b, c = (torch.randn(1, length, s.num_groups, s.state_size, device=device).bfloat16() for _ in range(2))
    dt = torch.rand(1, length, s.num_heads, device=device) * 0.1
    a, d = -torch.rand(s.num_heads, device=device) * 15 - 1, torch.ones(s.num_heads, device=device)
    inside = s.chunk_size * (s.num_groups * s.state_size + s.inner_size)  # C B^T and its product with x, half of each
    done = length * (inside + 4.0 * s.inner_size * s.state_size)

    def call(x, dt, a, b, c, d):
        return ssd(x, dt, a, b, c, d, chunk_size=s.chunk_size)[0]

    inputs = [x, dt, a, b, c, d]
    yield from _both("scan", "ssd", call, inputs, _bytes(inputs), done)


def _step(s: Mamba2, device: torch.device, batch: int) -> Iterator[Case]:
    x = torch.randn(batch, s.num_heads, s.head_dim, device=device).bfloat16()
    b, c = (torch.randn(batch, s.num_groups, s.state_size, device=device).bfloat16() for _ in range(2))
    dt = torch.rand(batch, s.num_heads, device=device) * 0.1
    a, d = -torch.rand(s.num_heads, device=device) * 15 - 1, torch.ones(s.num_heads, device=device)
    state = torch.zeros(batch, s.num_heads, s.head_dim, s.state_size, device=device)
    moved = _bytes([x, x, dt, b, c, state, state])
    yield (
        f"step of {batch}", "ssd_step", lambda: _without_graph(ssd_step, x, dt, a, b, c, d, state), moved,
        5.0 * state.numel(),
    )  # fmt: skip


def _conv(s: Mamba2, device: torch.device, length: int) -> Iterator[Case]:
    x = torch.randn(1, length, s.conv_size, device=device).bfloat16()
    weight = torch.randn(s.conv_size, s.conv_kernel, device=device).bfloat16()
    bias = torch.randn(s.conv_size, device=device).bfloat16()
    inputs = [x, weight, bias]
    yield from _both(
        "convolution", "causal_conv", lambda *t: causal_conv(*t)[0], inputs, _bytes(inputs),
        2.0 * s.conv_kernel * x.numel(),
    )  # fmt: skip


def _norm(s: Mamba2, device: torch.device, length: int) -> Iterator[Case]:
    y, z = (torch.randn(1, length, s.inner_size, device=device).bfloat16() for _ in range(2))
    inputs = [y, z, torch.ones(s.inner_size, device=device).bfloat16()]
    yield from _both(
        "gated norm", "gated_norm", lambda *t: gated_norm(*t, s.groups_of_norm, 1e-5), inputs, _bytes(inputs),
        8.0 * y.numel(),
    )  # fmt: skip


def _bytes(tensors: list[torch.Tensor]) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))
