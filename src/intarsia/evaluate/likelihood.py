"""The one measurement under all others: the log-likelihood of some tokens after others, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from intarsia.base.errors import IntarsiaError
from intarsia.model import Decoder
from intarsia.ops.losses import nll_and_hits

BATCH_TOKENS = 2048  # of one pass, padding included; a little quicker than 1,024 or 4,096 on two cores


@torch.inference_mode()
def token_scores(
    model: Decoder,
    sequences: Sequence[Sequence[int]],
    firsts: Sequence[int],
    advance: Callable[[int], None] = lambda done: None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each sequence of T ids: -log p in nats (float32) of tokens first .. T-1 after those before them, and whether
    each is the likeliest one (bool), both (T - first,).

    Sequences of like length go through the model together, padded on the right, which a causal model does not see.
    The head runs in float32 and only where a token is scored. `advance` gets the number of sequences done.
    """
    for ids, first in zip(sequences, firsts):
        _check(model, ids, first)
    head = model.head_weight.float()
    found: list = [None] * len(sequences)
    for batch in _batches([len(s) for s in sequences], batch_tokens):
        inputs = torch.zeros(len(batch), max(len(sequences[i]) for i in batch) - 1, dtype=torch.int64)
        for row, i in enumerate(batch):
            inputs[row, : len(sequences[i]) - 1] = torch.as_tensor(sequences[i][:-1])
        hidden = model.hidden(inputs.to(model.device))
        scored = [hidden[row, firsts[i] - 1 : len(sequences[i]) - 1] for row, i in enumerate(batch)]
        targets = [torch.as_tensor(sequences[i][firsts[i] :]) for i in batch]
        nll, hits = nll_and_hits(torch.cat(scored).float(), head, torch.cat(targets).to(model.device))
        sizes = [len(t) for t in targets]
        for i, one, hit in zip(batch, nll.cpu().split(sizes), hits.cpu().split(sizes)):
            found[i] = (one, hit)
        advance(len(batch))
    return found


def _batches(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Indices from long to short, in groups whose padded size stays within `batch_tokens` (one sequence at least)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _check(model: Decoder, ids: Sequence[int], first: int) -> None:
    if not 1 <= first < len(ids):
        raise IntarsiaError(f"tokens {first} to {len(ids) - 1} cannot be scored: it takes one, and one before.")
    if len(ids) - 1 > model.arch.max_positions:
        raise IntarsiaError(
            f"a sequence of {len(ids)} tokens is longer than the model's context of {model.arch.max_positions}."
        )
    if max(ids) >= model.arch.vocab_size or min(ids) < 0:
        raise IntarsiaError(
            f"a token id of {max(ids)} does not fit a vocabulary of {model.arch.vocab_size}: the text was encoded with "
            "another tokenizer than the model's."
        )
