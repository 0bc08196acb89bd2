"""A child from a parent and a choice: a new list of blocks on the parent's stream, embedding and head."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from intarsia.compress.library import Library
from intarsia.compress.options import OptionSpec, Pair, Site
from intarsia.model import Decoder, ResidualBlock, quantised
from intarsia.model.packed import Importance

if TYPE_CHECKING:
    from intarsia.compress.coupled import Coupled

# A choice: for each site (attention option, FFN option); None where the parent has no such block.
Choice = Sequence[Pair]


def with_blocks(parent: Decoder, blocks: Sequence[ResidualBlock]) -> Decoder:
    """A decoder with these blocks and the parent's embedding, final norm and head: shared, nothing is copied."""
    child = Decoder(parent.arch.replace(blocks=()), parent.dtype, "meta")
    child.arch = parent.arch.replace(blocks=tuple(block.spec for block in blocks))
    child.embed, child.norm = parent.embed, parent.norm
    if not parent.arch.tied_embeddings:
        child.head = parent.head
    child.blocks = nn.ModuleList(blocks)
    return child.eval()


def assemble(library: Library | Coupled, sites: Sequence[Site], choice: Choice) -> Decoder:
    """The child of a choice. Kept blocks are the parent's own modules; `independent` copies what is to be trained."""
    return with_blocks(library.parent, list(standing(library, sites, choice)))


def standing(library: Library | Coupled, sites: Sequence[Site], choice: Choice) -> Iterator[ResidualBlock]:
    """The blocks of the child of a choice, in order, one at a time."""
    return (block for site, specs in zip(sites, choice, strict=True) for block in library.pair(site, specs))


def placed(sites: Sequence[Site], choice: Choice) -> list[tuple[int, OptionSpec]]:
    """Of every block of the child of a choice the parent's index in whose slot it stands, and its option."""
    slots = [slot for site, pair in zip(sites, choice, strict=True) for slot in zip((site.attention, site.ffn), pair)]
    return [(index, spec) for index, spec in slots if spec is not None and spec.block is not None]


def independent(child: Decoder) -> Decoder:
    """The same model with parameters of its own, to be trained without touching the parent."""
    twin = Decoder(child.arch, child.dtype, "meta")
    for name in ("embed", "norm", "head", "blocks"):
        if hasattr(child, name):
            setattr(twin, name, copy.deepcopy(getattr(child, name)))
    return twin


def precisions(choice: Choice) -> list[str]:
    """How each block of a child is packed, in order; "" where no option says so."""
    return [spec.precision for pair in choice for spec in pair if spec is not None and spec.block is not None]


def unpacked_choice(choice: Choice) -> Choice:
    """The options of a choice before their matrices are packed: what learns."""
    return [tuple(None if spec is None else spec.base for spec in pair) for pair in choice]


def as_run(model: Decoder, kinds: Sequence[str], importance: Mapping[int, Importance] | None = None) -> Decoder:
    """The model that its packed weights stand for; blocks that are not packed are shared with it. `importance`: of
    blocks by index, as `pack_weights` takes it."""
    if not any(kinds):
        return model
    blocks = enumerate(zip(model.blocks, kinds, strict=True))
    matters = importance or {}
    return with_blocks(model, [quantised(b, kind, matters.get(n)) if kind else b for n, (b, kind) in blocks])


def packed(library: Library | Coupled, sites: Sequence[Site], choice: Choice, child: Decoder) -> Decoder:
    """What becomes of the child of a choice, whose blocks are not packed, once they are: by what matters to them in the
    library."""
    matters = {n: library.importance(index, spec) for n, (index, spec) in enumerate(placed(sites, choice))}
    return as_run(child, precisions(choice), {n: each for n, each in matters.items() if each is not None})


def random_block(spec, parent: Decoder, seed: int) -> ResidualBlock:
    """A block of random weights with weights of its own: what is in them does not change what they cost."""
    block = ResidualBlock(spec, parent.arch, parent.dtype, parent.device)
    generator = torch.Generator(parent.device).manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.02, generator=generator) if parameter.dim() > 1 else parameter.fill_(1)
    return block.eval().requires_grad_(False)
