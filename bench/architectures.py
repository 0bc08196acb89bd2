"""The published comparison at the size of a nano: Transformer, Mamba-1, Mamba-2 and hybrid of equal parameters.

What `bench/train.py` measures of them beside their training runs, all models in one process and in turns, so that what
is slow for a second is slow for all: steps of training, decoding behind contexts, and the two scans by themselves, on
states of several sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from behind import decode_behind
from peers.torch_clock import now, tokens

from intarsia.arch import Mamba1, catalog, parameters
from intarsia.base.progress import Progress
from intarsia.model import Cache, Decoder, initialise
from intarsia.ops.losses import next_token_loss
from intarsia.ops.selective import selective_scan
from intarsia.ops.ssd import ssd
from intarsia.train.optimizer import MasterAdamW

CPU = torch.device("cpu")
STATES = (16, 32, 64, 128)  # numbers that a channel remembers
HEAD_DIM = 64  # channels of Mamba-2 that share a decay


def compared(
    models: dict[str, str], dtype: torch.dtype, shape: tuple[int, int], contexts: tuple[int, ...], turns: int,
    decoded: int,
) -> dict[str, Any]:
    """`models`: what each is called, and its name in the catalog; `shape`: batch and length of a step.

    Tokens a second of training, seconds a token decoded behind every context, bytes of that context's memory, and
    seconds of forward and backward of the scans of Mamba-1 and Mamba-2 on as many channels and states of every size: a
    figure a turn.
    """
    made = {name: initialise(Decoder(catalog.get(model), dtype)) for name, model in models.items()}
    optimizers = {name: MasterAdamW(model.named_parameters()) for name, model in made.items()}
    channels = next(b.inner_size for m in made.values() for b in m.arch.blocks if isinstance(b, Mamba1))
    scans = {(k, n): scan_of(k, channels, n, *shape, dtype) for k in ("mamba1", "mamba2") for n in STATES}
    found: dict[str, Any] = {
        "shape": shape, "parameters": {name: parameters(model.arch) for name, model in made.items()},
        "bytes": {name: [Cache(model.arch, 1, n, dtype).bytes for n in contexts] for name, model in made.items()},
        "contexts": contexts, "train": {}, "decode": {}, "scans": {},
    }  # fmt: skip
    with Progress("architectures", (turns + 1) * len(made)) as progress:
        for turn in range(turns + 1):  # the first to warm up
            kept = found if turn else {"train": {}, "decode": {}, "scans": {}}
            for name, model in made.items():
                seconds = _timed(partial(train_step, model, optimizers[name], *shape))
                kept["train"].setdefault(name, []).append(shape[0] * shape[1] / seconds)
                for context in contexts:
                    each = kept["decode"].setdefault(name, {}).setdefault(context, [])
                    each.extend(decode_behind(model, context, 1, decoded))
                progress.advance(note=name)
            for (name, size), scan in scans.items():
                kept["scans"].setdefault(name, {}).setdefault(size, []).append(_timed(scan))
    return found


def train_step(model: Decoder, optimizer: MasterAdamW, batch: int, length: int) -> None:
    """Forward, backward and AdamW on float32 masters."""
    ids = tokens(model.arch.vocab_size, batch, length + 1, CPU)
    total, _ = next_token_loss(model.hidden(ids[:, :-1]), model.head_weight, ids[:, 1:])
    (total / (batch * length)).backward()
    optimizer.step(1e-4, clip=1.0)


def scan_of(
    name: str, channels: int, size: int, batch: int, length: int, dtype: torch.dtype
) -> Callable[[], None]:
    """Forward and backward of one kind's scan on random tokens, with a state of `size` numbers a channel."""
    heads = channels // HEAD_DIM
    if name == "mamba1":
        x, steps, op, states, decays = (channels,), channels, selective_scan, (size,), (channels, size)
    else:
        x, steps, op, states, decays = (heads, HEAD_DIM), heads, ssd, (1, size), (heads,)
    x, b, c = (torch.randn(batch, length, *each).to(dtype) for each in (x, states, states))
    inputs = [x, torch.full((batch, length, steps), 0.01), -torch.rand(decays), b, c]
    inputs = [each.requires_grad_() for each in inputs]

    def both() -> None:
        y, _ = op(*inputs)
        torch.autograd.grad(y, inputs, torch.ones_like(y))

    return both


def _timed(call: Callable[[], Any]) -> float:
    began = now(CPU)
    call()
    return now(CPU) - began
