"""Generation: a prompt is read once into the cache, then tokens come one at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from intarsia.base.errors import IntarsiaError
from intarsia.model import Cache, Decoder
from intarsia.ops.backends import choose as choose_backend

PIECE = 2048  # tokens of a prompt read at a time on a CPU: more make no product faster, and what stands between them
# is then too large for the processor's caches
Ids = torch.Tensor | Sequence[int] | Sequence[Sequence[int]]


@torch.inference_mode()
def generate(
    model: Decoder,
    input_ids: Ids,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    on_token: Callable[[list[int]], None] | None = None,
) -> list[int] | list[list[int]]:
    """Continue a prompt, or several of one length.

    A list of ids gives a list of new ids; a list of lists or a tensor (B, L) gives a list of lists. Temperature 0
    takes the likeliest token; otherwise one is drawn from the `top_k` likeliest (0: all) and of those from the
    likeliest that together hold `top_p`. A row ends with the first of `stop_ids`, which it keeps. `on_token` gets
    the new id of each row after every step. Raises `IntarsiaError` for an empty or impossible prompt or setting,
    and when prompt and new tokens exceed the model's context.
    """
    prompt, single = _as_batch(input_ids, model)
    _check(model, prompt, max_new_tokens, temperature, top_k, top_p)
    generator = torch.Generator(model.device).manual_seed(seed)
    batch, length = prompt.shape
    cache = Cache(model.arch, batch, length + max_new_tokens, model.dtype, model.device)
    rows: list[list[int]] = [[] for _ in range(batch)]
    running, fed = [True] * batch, prompt
    for _ in range(max_new_tokens):
        token = choose(next_logits(model, fed, cache), temperature, top_k, top_p, generator)
        fed = token[:, None]
        for row, new in enumerate(token.tolist()):
            if running[row]:
                rows[row].append(new)
                running[row] = new not in stop_ids
        if on_token:
            on_token(token.tolist())
        if not any(running):
            break
    return rows[0] if single else rows


def next_logits(model: Decoder, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """(B, L) behind what the cache holds -> logits (B, V) of the token that follows; only its head row is computed."""
    if model.native is not None and input_ids.shape[1] == 1 and model.native.takes(cache):
        return model.native.step(input_ids[:, 0], cache)
    in_pieces = input_ids.shape[1] > PIECE and _reads_pieces(model)
    *before, last = input_ids.split(PIECE, 1) if in_pieces else (input_ids,)
    for part in before:
        model.hidden(part, cache)
    return model.project(model.hidden(last, cache)[:, -1])


def _reads_pieces(model: Decoder) -> bool:
    """Does attention to what was read before cost the same as within one long prompt?"""
    return choose_backend("attend", torch.empty(0, dtype=model.dtype, device=model.device)) == "native"


def choose(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> torch.Tensor:
    """(B, V) -> (B,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        # A token stays when those before it hold less than top_p, so the likeliest always does.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def _as_batch(ids: Ids, model: Decoder) -> tuple[torch.Tensor, bool]:
    if not isinstance(ids, torch.Tensor):
        lengths = {len(row) for row in ids if isinstance(row, Sequence)}
        if len(lengths) > 1:
            raise IntarsiaError(
                f"prompts of {min(lengths)} and {max(lengths)} tokens cannot share a batch: give prompts of one "
                "length, or one at a time."
            )
        ids = torch.tensor(ids, dtype=torch.int64)
    batch = ids[None] if ids.dim() == 1 else ids
    if batch.dim() != 2 or batch.numel() == 0:
        raise IntarsiaError("there is nothing to continue: the prompt has no tokens.")
    if batch.min() < 0 or batch.max() >= model.arch.vocab_size:
        raise IntarsiaError(
            f"the prompt holds ids from {batch.min()} to {batch.max()}, but the model knows 0 to "
            f"{model.arch.vocab_size - 1}: use the model's own tokenizer."
        )
    return batch.to(model.device), ids.dim() == 1


def _check(
    model: Decoder, prompt: torch.Tensor, new: int, temperature: float, top_k: int, top_p: float
) -> None:
    if new < 1:
        raise IntarsiaError(f"{new} new tokens cannot be generated: ask for at least 1.")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise IntarsiaError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p} is no way to sample: temperature and top_k are "
            "not negative, top_p is above 0 and at most 1."
        )
    total, context = prompt.shape[1] + new, model.arch.max_positions
    if total > context:
        raise IntarsiaError(
            f"{prompt.shape[1]} prompt tokens and {new} new ones are {total}, but the model's context is {context}: "
            "shorten the prompt or ask for fewer."
        )
