"""Mending: the blocks of a child are fitted to each other, one behind another, in closed form.

The library makes every option for the parent's stream. In a child a block reads what the blocks before it have left
there, and their errors add up. So, from the first block that is not the parent's on, with all blocks before it already
mended, the last matrix W of a block is moved by a D towards the least of

    sum over tokens t of |p_t - x_t - W c_t - D c_t|^2 / |p_t|^2

where c is what W reads, x the child's stream before the block and p the parent's stream where the child's next block
stands. So a block makes good what those before it have missed, and takes over blocks that were left out behind it, as
far as its own input tells: `ridges`. (GPTQ, arXiv 2210.17323, fits layers to inputs that the layers before have changed
as well, but towards each layer's own output.)

The first token of a text is one of hundreds in this sum, and every later token reads it: attention rests there (the
"sink" of arXiv 2309.17453), where a few blocks in a row have built up a stream a hundred times as long as others. A
child whose blocks build it with less than that can lose it for a smaller mean error. So, where mending has done harm,
it is done once more with first tokens counting as much as all others together (`sinks`). Not always: a child that
keeps its sink has other errors, which then are fitted less well.

Shape letters: N rows, L tokens of each, D model, C inner channels.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from intarsia.base.files import atomic_path, fingerprint
from intarsia.base.progress import Progress
from intarsia.compress import text
from intarsia.compress.assemble import Choice, placed, standing, unpacked_choice, with_blocks
from intarsia.compress.options import Site
from intarsia.compress.pacing import names
from intarsia.compress.ridges import Passed, checked_rows, fitted
from intarsia.compress.trainees import last_matrix
from intarsia.model import Decoder, ResidualBlock
from intarsia.model.mixers import Tables
from intarsia.ops.precise import exact_products

if TYPE_CHECKING:
    from intarsia.compress.coupled import Coupled
    from intarsia.compress.library import Library
    from intarsia.compress.pipeline import Job

Matrices = dict[int, torch.Tensor]  # by block
Rope = dict[int, Tables]

FILE = "matrices.safetensors"
BESIDE = 4  # candidates beside one pass of the parent: as many of their streams and matrices are held
KEPT = "mended"  # the folder of a run with what may be asked for again


def reach(sites: Sequence[Site], choice: Choice, count: int) -> list[int]:
    """Of every block of a child, before which of the parent's `count` blocks its next one stands."""
    return [*(index for index, _ in placed(sites, choice)[1:]), count]


def made_from(job: Job, choice: Choice) -> tuple:
    """What `mended` depends on."""
    return job.library_print(), names(choice), job.recipe.mend, job.recipe.data


def mended(
    job: Job, child: Decoder, choice: Choice, title: str, keep: bool = False, sinks: bool = False
) -> Matrices:
    """What `mend` makes of the child of a choice on the text that the recipe gives it; nothing where it gives none.
    `keep`: until `forget`, it is not made again. `sinks`: as of `mend`."""
    if not job.mends:
        return {}
    folder = job.run.path / KEPT / fingerprint(*made_from(job, choice), sinks)
    if (folder / FILE).exists():
        return stored_matrices(folder)
    matrices = fit(job, child, _reach(job, choice), title, sinks)
    if keep:
        folder.mkdir(parents=True, exist_ok=True)
        store_matrices(matrices, folder)
    return matrices


def fit(job: Job, child: Decoder, ends: Sequence[int], title: str, sinks: bool = False) -> Matrices:
    """What `mend` makes of a child with this `reach`, on the text that the recipe gives it; `sinks` as there."""
    rows = job.mending(job.recipe.mend.tokens)
    with Progress(title, len(job.model.blocks)) as progress:
        return mend(job.model, [(child.blocks, ends)], rows, progress.advance, sinks)[0]


def forget(job: Job) -> None:
    """Remove what `mended` has kept."""
    shutil.rmtree(job.run.path / KEPT, ignore_errors=True)


def lightly(job: Job, library: Library | Coupled, choices: Sequence[Choice]) -> Iterator[Matrices]:
    """Candidates of a search, before their blocks are packed, as mending leaves them on less text: some at a time
    beside one pass of the parent, of each of which one block is held. Nothing where the recipe gives no text."""
    rows, count = job.mending(job.recipe.mend.light), len(job.model.blocks)
    with Progress("candidates", len(choices)) as progress:
        for first in range(0, len(choices), BESIDE):
            some = choices[first : first + BESIDE]
            if rows is None:
                yield from ({} for _ in some)
                progress.advance(len(some))
                continue
            children = [(standing(library, job.sites, unpacked_choice(c)), _reach(job, c)) for c in some]
            share = len(some) / count
            yield from mend(job.model, children, rows, lambda blocks, share=share: progress.advance(blocks * share))


def _reach(job: Job, choice: Choice) -> list[int]:
    return reach(job.sites, choice, len(job.model.blocks))


@torch.no_grad()
def mend(
    parent: Decoder, children: Sequence[tuple[Iterable[ResidualBlock], Sequence[int]]], rows: torch.Tensor,
    advance: Callable[[int], None] = lambda blocks: None, sinks: bool = False,
) -> list[Matrices]:
    """Of every child new last matrices (D, C) of its blocks, by index, in its dtype; where the old one is best, none.

    children: blocks, and the `reach` of each. rows (N, L) int64, N at least 2: one in `CHECKED` says how fits are
    mixed. Blocks at a child's beginning that are the parent's own modules stay as they are; so do experts and Mamba-1.
    The streams of the parent and of every child are held for all rows, and what one block's last matrix reads.
    `advance` is told of the parent's blocks. `sinks`: the first token of a row counts as much as all others together.
    """
    rows = rows.to(parent.device)
    rope, p = parent.rope_tables(0, rows.shape[1]), parent.embed_tokens(rows)
    found: list[Matrices] = [{} for _ in children]
    walks = [_walk(parent, zip(*child, strict=True), p, rope, sinks, into) for child, into in zip(children, found)]
    with exact_products(parent.dtype):
        for walk in walks:
            next(walk)
        for at in range(len(parent.blocks)):
            p = torch.cat([parent.run(part, at, at + 1, rope=rope) for part in text.parts(p)])
            for walk in walks:
                walk.send(p)
            advance(1)
    return found


def _walk(
    parent: Decoder, steps: Iterable[tuple[ResidualBlock, int]], x: torch.Tensor, rope: Rope, sinks: bool,
    found: Matrices,
) -> Generator[None, torch.Tensor, None]:
    """A child on its way from x (N, L, D) on: it is sent the parent's stream behind every block, one after another."""
    checked, start, at, same, p = checked_rows(len(x), x.device), 0, 0, True, x
    for index, (block, end) in enumerate(steps):
        while at < end:
            p, at = (yield), at + 1
        same = same and end == start + 1 and block is parent.blocks[start]
        if same:
            x = p
        else:
            x, moved = _mended(block, x, p, rope, checked, sinks)
            if moved is not None:
                found[index] = moved
        start = end
    yield


def _mended(
    block: ResidualBlock, x: torch.Tensor, p: torch.Tensor, rope: Rope, checked: torch.Tensor, sinks: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The stream behind a block, and its new last matrix, if it gets one. x, p (N, L, D), checked (N,)."""
    behind = Passed(x).through(block, rope)
    moved = None
    if behind.read is not None:
        moved = fitted(behind.read, [p.float() - behind.x.float()], _first_matters(p) if sinks else p, checked)[0]
    if moved is None:
        return behind.x, None
    last = last_matrix(block.mixer)
    matrix = (last.weight.float() + moved.T).to(last.weight.dtype)
    return x + F.linear(behind.read, matrix, last.bias), matrix


def _first_matters(p: torch.Tensor) -> torch.Tensor:
    """A stream (N, L, D) beside which the errors of first tokens count L times."""
    p = p.float().clone()
    p[:, 0] *= p.shape[1] ** -0.5
    return p


def with_matrices(child: Decoder, matrices: Mapping[int, torch.Tensor]) -> Decoder:
    """The child with other last matrices in some blocks, which are copies; all else is shared with it."""
    blocks = list(child.blocks)
    for index, matrix in matrices.items():
        blocks[index] = copy.deepcopy(blocks[index])
        last_matrix(blocks[index].mixer).weight.data.copy_(matrix)
    return with_blocks(child, blocks)


def store_matrices(matrices: Mapping[int, torch.Tensor], folder: Path) -> None:
    """What `stored_matrices` reads."""
    with atomic_path(folder / FILE) as temporary:
        save_file({str(index): matrix.contiguous() for index, matrix in matrices.items()}, temporary)


def stored_matrices(folder: Path) -> dict[int, torch.Tensor]:
    """Last matrices by block."""
    return {int(index): matrix for index, matrix in load_file(folder / FILE).items()}
