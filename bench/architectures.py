"""The published comparison at the size of a nano: Transformer, Mamba-1, Mamba-2 and hybrid of equal parameters.

What `bench/train.py` measures of them beside their training runs, all models in one process and in turns, so that what
is slow for a second is slow for all: steps of training, decoding behind contexts, and the two scans by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from behind import decode_behind
from peers.torch_clock import now, tokens

from intarsia.arch import Mamba1, Mamba2, catalog, parameters
from intarsia.base.progress import Progress
from intarsia.model import Cache, Decoder, initialise
from intarsia.ops.losses import next_token_loss
from intarsia.ops.selective import selective_scan
from intarsia.ops.ssd import ssd
from intarsia.train.optimizer import MasterAdamW

CPU = torch.device("cpu")


def compared(
    models: dict[str, str], dtype: torch.dtype, shape: tuple[int, int], contexts: tuple[int, ...], turns: int,
    decoded: int,
) -> dict[str, Any]:
    """`models`: what each is called, and its name in the catalog; `shape`: batch and length of a step.

    Tokens a second of training, seconds a token decoded behind every context, bytes of that context's memory, and for
    Mamba-1 and Mamba-2 seconds of forward and backward of a block's scan: a figure a turn.
    """
    made = {name: initialise(Decoder(catalog.get(model), dtype)) for name, model in models.items()}
    optimizers = {name: MasterAdamW(model.named_parameters()) for name, model in made.items()}
    scans = {name: scan_of(model, *shape) for name, model in made.items()}
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
                if scans[name] is not None:
                    kept["scans"].setdefault(name, []).append(_timed(scans[name]))
                progress.advance(note=name)
    return found


def train_step(model: Decoder, optimizer: MasterAdamW, batch: int, length: int) -> None:
    """Forward, backward and AdamW on float32 masters."""
    ids = tokens(model.arch.vocab_size, batch, length + 1, CPU)
    total, _ = next_token_loss(model.hidden(ids[:, :-1]), model.head_weight, ids[:, 1:])
    (total / (batch * length)).backward()
    optimizer.step(1e-4, clip=1.0)


def scan_of(model: Decoder, batch: int, length: int) -> Callable[[], None] | None:
    """Forward and backward of the first block's scan on random tokens; None where not all blocks are of one Mamba."""
    spec = model.arch.blocks[0]
    if any(b != spec for b in model.arch.blocks) or not isinstance(spec, (Mamba1, Mamba2)):
        return None
    if isinstance(spec, Mamba1):
        x, steps, op = (spec.inner_size,), spec.inner_size, selective_scan
        states, decays = (spec.state_size,), (spec.inner_size, spec.state_size)
    else:
        x, steps, op = (spec.num_heads, spec.head_dim), spec.num_heads, partial(ssd, chunk_size=spec.chunk_size)
        states, decays = (spec.num_groups, spec.state_size), (spec.num_heads,)
    x, b, c = (torch.randn(batch, length, *each).to(model.dtype) for each in (x, states, states))
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
