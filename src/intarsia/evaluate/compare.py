"""How far a child stands from its parent on the same tokens."""

from __future__ import annotations

import torch

from intarsia.base.errors import IntarsiaError
from intarsia.base.progress import Progress
from intarsia.model import Decoder
from intarsia.ops.losses import kl_and_agreement


@torch.inference_mode()
def compare(
    parent: Decoder,
    child: Decoder,
    tokens: torch.Tensor,
    batch_tokens: int = 2048,
    parent_hidden: torch.Tensor | None = None,
    title: str = "distance from the parent",
) -> dict[str, dict]:
    """`kl`: KL(parent || child) in nats a token, `top1`: share of positions where both name the same next token.

    tokens (N, L) int64; every position is compared, with logits in float32. Each figure is {value, se, n} with the
    error over the N rows (None for one row). `parent_hidden` are the parent's states of these tokens, where they are
    known (`hidden_states`); they save the parent's pass.
    """
    if parent.arch.vocab_size != child.arch.vocab_size:
        raise IntarsiaError(
            f"a parent of {parent.arch.vocab_size} tokens and a child of {child.arch.vocab_size} cannot be compared."
        )
    tokens = torch.as_tensor(tokens)
    if tokens.dim() != 2 or not tokens.numel():
        raise IntarsiaError(f"tokens of shape {tuple(tokens.shape)} cannot be compared on: give (rows, length).")
    parent_head, child_head = parent.head_weight.float(), child.head_weight.float()
    kls, sames = [], []
    with Progress(title, len(tokens)) as progress:
        for part in _parts(tokens, batch_tokens):
            ids = tokens[part].to(child.device)
            taught = parent.hidden(ids) if parent_hidden is None else parent_hidden[part]
            kl, same = kl_and_agreement(taught.float(), child.hidden(ids).float(), parent_head, child_head)
            kls.append(kl.mean(1).cpu())
            sames.append(same.float().mean(1).cpu())
            progress.advance(len(ids))
    return {"kl": mean(torch.cat(kls)), "top1": mean(torch.cat(sames))}


@torch.inference_mode()
def hidden_states(model: Decoder, tokens: torch.Tensor, batch_tokens: int = 2048) -> torch.Tensor:
    """The states after the final norm, (N, L, D) in the model's dtype, of tokens (N, L)."""
    return torch.cat([model.hidden(tokens[part].to(model.device)) for part in _parts(tokens, batch_tokens)])


def mean(rows: torch.Tensor) -> dict:
    """{value, se, n} of figures (n,), one a row."""
    rows = rows.double()
    se = (rows.std() / len(rows) ** 0.5).item() if len(rows) > 1 else None
    return {"value": rows.mean().item(), "se": se, "n": len(rows)}


def _parts(tokens: torch.Tensor, batch_tokens: int) -> list[slice]:
    size = max(1, batch_tokens // tokens.shape[1])
    return [slice(start, start + size) for start in range(0, len(tokens), size)]
