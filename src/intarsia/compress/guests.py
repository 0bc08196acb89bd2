"""Controls that were made elsewhere (`controls.models`): what they are called, and where their blocks lie.

A checkpoint does not say in whose place of the parent's blocks one of its own stands; what the block adds to the stream
does. Of all ways to give every block of a guest one of the parent's, in order, the one is taken whose updates are most
alike: the greatest sum of their cosines, by dynamic programming, as sequences are aligned (Needleman and Wunsch 1970).
What mixes tokens stands for what does, and what does not for what does not, as far as that is possible.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from intarsia.arch import Block, Experts, FeedForward, Linear
from intarsia.compress.library import stream
from intarsia.formats.reader import locate
from intarsia.model import Decoder

ALIGNED_ON = 512  # tokens are enough; of all blocks of both models the updates are held


def guest_names(path: str) -> Iterator[str]:
    """What a checkpoint may be called, the shortest first; the last ones are endless."""
    place = locate(path)
    yield place.stem if place.is_file() else place.name
    whole = "-".join(place.absolute().with_suffix("").parts[1:])
    yield from (whole if n == 1 else f"{whole}-{n}" for n in itertools.count(1))


def origins(parent: Decoder, guest: Decoder, rows: torch.Tensor) -> list[int] | None:
    """Of every block of a guest, in the place of which of the parent's blocks it stands, on text rows (N, L) int64.
    None where it has more blocks than the parent, or a stream of another width."""
    if len(guest.blocks) > len(parent.blocks) or guest.arch.hidden_size != parent.arch.hidden_size:
        return None
    alike = _updates(guest, rows) @ _updates(parent, rows).T
    other = [[not _mixes(a) & _mixes(b) for b in parent.arch.blocks] for a in guest.arch.blocks]
    return in_order(alike - 2 * len(guest.blocks) * torch.tensor(other))  # more than all cosines can make good


def _mixes(block: Block) -> set[bool]:
    """Whether it mixes tokens; a linear block stands for either."""
    return {True, False} if isinstance(block, Linear) else {not isinstance(block, FeedForward | Experts)}


@torch.no_grad()
def _updates(model: Decoder, rows: torch.Tensor) -> torch.Tensor:
    """(blocks, N * L * D) float32: what every block adds, relative to the stream of each token, of length 1."""
    ids, found = rows.to(model.device), []
    x = model.embed_tokens(ids)
    for _, _, _, update, _ in stream(model, ids):
        x = x + update
        # Otherwise the few tokens whose stream is enormous would be all that is compared.
        size = x.float().norm(dim=-1, keepdim=True).clamp_min(1e-30)
        found.append((update.float() / size).flatten().cpu())
    return torch.nn.functional.normalize(torch.stack(found), dim=1)


def in_order(alike: torch.Tensor) -> list[int]:
    """For every row of alike (G, K), G at most K, a column further right than that of the row before: of all such
    choices the one of the greatest sum."""
    count, width = alike.shape
    # best[g, k]: of the first g rows, within the first k columns.
    best = torch.full((count + 1, width + 1), -torch.inf, dtype=torch.float64)
    best[0] = 0.0
    for g, k in itertools.product(range(count), range(width)):
        best[g + 1, k + 1] = torch.maximum(best[g + 1, k], best[g, k] + alike[g, k])
    found, k = [], width
    for g in range(count, 0, -1):
        while k > g and best[g, k - 1] == best[g, k]:
            k -= 1
        k -= 1
        found.append(k)
    return found[::-1]
