"""FFN fusion (arXiv 2503.18908): where attention has left, the FFNs that follow one another become one wide FFN.

Of x1 = x + f1(x), x2 = x1 + f2(x1) the second hardly sees what the first has added, so x + f1(x) + f2(x) is near, and
that is one FFN: its channels are those of all of them. Nothing is saved but the overhead of a block, which is what
counts where few tokens are decoded. Each FFN keeps the weights of its own norm, multiplied into the matrices that read
it (the paper gives all of them the norm of the last). The last FFN of a run stays alone, as there: it matters most.

Shape letters: D model, I intermediate channels.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from intarsia.arch import Architecture, Block, FeedForward
from intarsia.compress.assemble import with_blocks
from intarsia.compress.distill import Boundary
from intarsia.model import Decoder, ResidualBlock

Places = Sequence[range]  # the blocks that become one, by index


def runs(blocks: Sequence[Block]) -> list[range]:
    """Where two or more FFNs of one make (all but their width) follow one another."""
    found, start = [], 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or _make(blocks[end]) != _make(blocks[start]) or _make(blocks[start]) is None:
            if end - start > 1:
                found.append(range(start, end))
            start = end
    return found


def _make(block: Block) -> FeedForward | None:
    return dataclasses.replace(block, intermediate_size=1) if isinstance(block, FeedForward) else None


def places(blocks: Sequence[Block], most: int) -> list[range]:
    """What to fuse: of every run all but the last FFN, in as few groups of at most `most` as can be, as equal as can
    be. None with `most` below 2."""
    found: list[range] = []
    for run in runs(blocks) if most > 1 else ():
        inner = range(run.start, run.stop - 1)
        count = math.ceil(len(inner) / most)
        cuts = [run.start + round(n * len(inner) / count) for n in range(count + 1)]
        found += [range(a, b) for a, b in itertools.pairwise(cuts) if b - a > 1]
    return found


def fused_spec(blocks: Sequence[FeedForward]) -> FeedForward:
    """The one FFN in place of several."""
    return dataclasses.replace(blocks[0], intermediate_size=sum(b.intermediate_size for b in blocks))


def fused(arch: Architecture, where: Places) -> Architecture:
    """The architecture after the fusion."""
    return arch.replace(blocks=tuple(_merged(list(arch.blocks), where, fused_spec)))


def _merged(items: list, where: Places, merge) -> list:
    """Every group of `where` replaced by what `merge` makes of it."""
    groups = {group.start: group for group in where}
    inside = {index for group in where for index in group}
    result = []
    for index, item in enumerate(items):
        if index in groups:
            result.append(merge([items[i] for i in groups[index]]))
        elif index not in inside:
            result.append(item)
    return result


def fuse(model: Decoder, where: Places) -> Decoder:
    """x + sum of what the FFNs of a group give to x, as one block each; all other modules are the model's own."""
    return with_blocks(model, _merged(list(model.blocks), where, lambda blocks: fuse_blocks(blocks, model.arch)))


@torch.no_grad()
def fuse_blocks(blocks: Sequence[ResidualBlock], arch: Architecture) -> ResidualBlock:
    """One block for FFNs beside one another: channels of all, output biases added, norms in the matrices."""
    spec, like = fused_spec([b.spec for b in blocks]), blocks[0].norm.weight
    one = ResidualBlock(spec, arch, like.dtype, like.device).requires_grad_(False)
    one.norm.weight.fill_(1)
    for name in ("gate", "up") if spec.gated else ("up",):
        layers = [(getattr(b.mixer, name), b.norm.weight.float()) for b in blocks]
        getattr(one.mixer, name).weight.copy_(torch.cat([layer.weight.float() * norm for layer, norm in layers]))
        if spec.bias:
            getattr(one.mixer, name).bias.copy_(torch.cat([layer.bias for layer, _ in layers]))
    one.mixer.down.weight.copy_(torch.cat([b.mixer.down.weight for b in blocks], 1))
    if spec.bias:
        one.mixer.down.bias.copy_(torch.stack([b.mixer.down.bias.float() for b in blocks]).sum(0))
    return one.eval()


def outside(ends: Sequence[Boundary], where: Places) -> list[Boundary]:
    """The ends of layers that still are between two blocks, with the child's blocks counted anew."""
    found = []
    for end in ends:
        if not any(group.start < end.child < group.stop for group in where):
            gone = sum(len(group) - 1 for group in where if group.stop <= end.child)
            found.append(dataclasses.replace(end, child=end.child - gone))
    return found


@torch.inference_mode()
def dependence(model: Decoder, ids: torch.Tensor, run: range) -> torch.Tensor:
    """(n, n): how far what block j of a run adds turns (1 - cosine, mean over tokens of ids (B, L)) where block i
    before it is left out; 0 elsewhere. FFNs that depend little on one another are those to fuse (the paper's M)."""
    x = model.run(model.embed_tokens(ids), 0, run.start)
    found = torch.zeros(len(run), len(run))
    whole = _added(model, x, run, None)
    for i, gone in enumerate(run):
        for j, update in _added(model, x, run, gone).items():
            if j > gone:
                found[i, j - run.start] = 1 - F.cosine_similarity(update, whole[j], dim=-1).mean()
    return found


def _added(model: Decoder, x: torch.Tensor, run: range, gone: int | None) -> dict[int, torch.Tensor]:
    """What every block of a run adds, (B, L, D) float32, with block `gone` left out."""
    found = {}
    for index in run:
        if index != gone:
            update = model.blocks[index].update(x)
            found[index] = update.float()
            x = x + update
    return found

