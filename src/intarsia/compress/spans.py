"""Spans: one layer in place of several in a row, its last matrix fitted in closed form to all that they add.

- fold: a layer keeps its attention and its FFN; the FFN's last matrix is fitted so that its update also gives what the
  layers behind it would have added. ReplaceMe (arXiv 2505.02819, section 3) fits a square matrix behind the FFN for
  that; here every channel is free.
- linear: one linear block on the normalised stream in place of all blocks of the span.

The norm behind a span divides by the size of the stream there, so every token's error is weighed by that. Without it
the few tokens whose stream is enormous are all that is fitted.

Teacher-forced like the library: a span reads the parent's stream, so one pass of the parent serves all of them. In the
search a span is an option of its first site, and what stands at the others is nothing. Which of them belong together
is said by ties: for every boundary between two sites, how many sites from there on are covered by a span.

Shape letters: N tokens, D model, C what the last matrix reads (and a 1 where there is a bias).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from intarsia.arch import FeedForward, Linear
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import atomic_path, write_json
from intarsia.compress.library import larger, share_name, stream
from intarsia.compress.options import NONE, SPAN, OptionSpec, Pair, Site, Span
from intarsia.compress.recipe import Options as Recipe
from intarsia.compress.trainees import fit_towards
from intarsia.model import Decoder
from intarsia.model.mlp import Mlp
from intarsia.ops.losses import normalised_mse
from intarsia.ops.precise import exact_products

Options = Mapping[int, Sequence[OptionSpec]]


def with_spans(sites: Sequence[Site], options: Options, recipe: Recipe) -> list[Site]:
    """The sites with every span that the recipe asks for and that ends within the model.

    A fold begins where there is an FFN. Raises `IntarsiaError` where a length or a method fits nowhere.
    """
    lengths = sorted(set(recipe.spans))
    if lengths and lengths[-1] > len(sites):
        raise IntarsiaError(
            f"options.spans has {lengths[-1]}, but this parent has {len(sites)} layers: give lengths of 2 to that."
        )
    offered = {method: [_begin(site, options, method) for site in sites] for method in recipe.span_methods}
    for method in [m for m in offered if lengths and not any(offered[m])]:
        why = "no layer of this parent has an FFN" if method == "fold" else "no block of it may become linear"
        raise IntarsiaError(f"options.span_methods has {method}, but {why}: leave it out, or options.spans empty.")
    found = []
    for n, site in enumerate(sites):
        fits = [(m, length) for m in offered for length in lengths if offered[m][n] and n + length <= len(sites)]
        spans = tuple(_named(f"{m} {length}", length, *offered[m][n]) for m, length in fits)
        found.append(dataclasses.replace(site, spans=spans))
    return found


def _begin(site: Site, options: Options, method: str) -> Pair | None:
    """The options of the slots of a span that begins at `site`, still without its name; None where none can."""
    if method == "fold":
        block = None if site.ffn is None else options[site.ffn][0].block
        kept = None if site.attention is None else options[site.attention][0]
        return (kept, OptionSpec("", block, SPAN)) if isinstance(block, FeedForward) else None
    # Whichever linear block is timed anyway: its bias is that of an attention or FFN of the model.
    known = (spec.block for specs in options.values() for spec in specs if isinstance(spec.block, Linear))
    block = next(known, None)
    if block is None:
        return None
    slots = [None if i is None else OptionSpec(NONE, None, NONE) for i in (site.attention, site.ffn)]
    slots[site.attention is None] = OptionSpec("", block, SPAN)
    return slots[0], slots[1]


def _named(name: str, length: int, *slots: OptionSpec | None) -> Span:
    new = [dataclasses.replace(s, name=name) if s is not None and s.method == SPAN else s for s in slots]
    return Span(name, length, *new)


def ties(position: int, before: int, behind: int) -> dict[str, str]:
    """What an option says of the boundaries of its site: how many sites are covered from this one on (`before`; 0: it
    is not) and from the next one on (`behind`)."""
    return {f"covered from {position}": str(before), f"covered from {position + 1}": str(behind)}


def covering(sites: Sequence[Site], position: int) -> list[int]:
    """How many sites, from the one at `position` on, a span that began before it may still cover: each such number."""
    rest = {n + s.length - position for n in range(position) for s in sites[n].spans}
    return sorted(left for left in rest if left > 0)


@dataclass(eq=False)
class Place:
    """Where spans of one kind begin: the block of the parent whose stream they read, the FFN of whose channels they are
    made (None: of the stream itself), and of every span by name the block behind it."""

    index: int
    ffn: Mlp | None
    block: FeedForward | Linear
    ends: dict[str, int]
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # (C, C) and (C, D) a span

    @property
    def biased(self) -> bool:
        return self.block.bias

    def reads(self, n: torch.Tensor) -> torch.Tensor:
        """(B, L, D) normalised -> (N, C) float32."""
        c = (n if self.ffn is None else self.ffn.channels(n)).flatten(0, 1).float()
        return torch.cat([c, c.new_ones(len(c), 1)], 1) if self.biased else c

    def start(self, size: int) -> torch.Tensor:
        """(C, D): the last matrix before the fit, with its bias as the last row: the FFN's own, or nothing."""
        if self.ffn is None:
            return torch.zeros(size + self.biased, size)
        rows = self.ffn.down.weight.float().T
        return torch.cat([rows, self.ffn.down.bias.float()[None]]) if self.biased else rows

    def tensors(self, name: str, rows: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Of a fitted last matrix, as the library stores it."""
        last = f"{name}/{'proj' if self.ffn is None else 'down'}"
        weight, bias = (rows[:-1], rows[-1]) if self.biased else (rows, None)
        found = {f"{last}.weight": weight.T} | ({} if bias is None else {f"{last}.bias": bias})
        # Copies: several spans may have the parent's own matrix.
        return {n: t.to(dtype, copy=True, memory_format=torch.contiguous_format) for n, t in found.items()}


def places(model: Decoder, sites: Sequence[Site], mine: Sequence[Site]) -> list[Place]:
    """Where the spans of the sites `mine` begin; those of one kind at one site share what they read."""
    found: dict[tuple[int, bool], Place] = {}
    for n, site in enumerate(sites):
        for span in site.spans if site in mine else ():
            slot, spec = next((i, s) for i, s in ((site.attention, span.attention), (site.ffn, span.ffn))
                              if s is not None and s.method == SPAN)  # fmt: skip
            ffn = model.blocks[slot].mixer if isinstance(spec.block, FeedForward) else None
            place = found.setdefault((slot, ffn is None), Place(slot, ffn, spec.block, {}))
            place.ends[span.name] = sites[n + span.length - 1].blocks[-1] + 1
    return list(found.values())


def _ended(
    model: Decoder, ids: torch.Tensor, where: Sequence[Place]
) -> Iterator[tuple[Place, str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of every span, as it ends in the parent's pass: its place and name, what its last matrix reads (N, C), all that
    its blocks add to the stream (N, D), and the weight of every token's square error (N, 1)."""
    x, begun = model.embed_tokens(ids).flatten(0, 1).float(), []
    for index, _, n, update, _ in stream(model, ids):
        begun += [(place, place.reads(n), x) for place in where if place.index == index]
        x = x + update.flatten(0, 1).float()
        for place, c, before in begun:
            for name in [name for name, end in place.ends.items() if end == index + 1]:
                # Powers of two: what was exact in bfloat16 stays so.
                yield place, name, c, x - before, torch.exp2(-x.square().mean(1, True).log2().round())
        begun = [row for row in begun if max(row[0].ends.values()) > index + 1]


@torch.no_grad()
def fit_spans(
    model: Decoder, where: Sequence[Place], batches: Iterator[torch.Tensor],
    advance: Callable[[int, str], None] = lambda tokens, note: None,
) -> list[dict[str, torch.Tensor]]:
    """Fit the last matrices of all spans to the text of `batches`: of every place (C, D) by name."""
    with exact_products(model.dtype):
        for ids in larger(batches):
            for place, name, c, y, weight in _ended(model, ids, where):
                gram, cross = place.moments.get(name, (c.new_zeros(c.shape[1], c.shape[1]), 0))
                weighed = (c * weight).T
                place.moments[name] = gram.addmm_(weighed, c), cross + weighed @ y
            advance(ids.numel(), "")
    size = model.arch.hidden_size
    return [{name: fit_towards(*pair, p.start(size)) for name, pair in p.moments.items()} for p in where]


@torch.no_grad()
def harms(
    model: Decoder, where: Sequence[Place], ids: torch.Tensor, *rows: Sequence[Mapping[str, torch.Tensor]]
) -> list[list[dict[str, float]]]:
    """Weighed square error of every span on ids (B, L) over that of nothing in its place, for each of several last
    matrices, by place and name."""
    found: list[list[dict[str, float]]] = [[{} for _ in where] for _ in rows]
    for place, name, c, y, weight in _ended(model, ids, where):
        n, root = where.index(place), weight.sqrt()
        for each, matrices in zip(found, rows):
            given = c @ matrices[n][name].to(model.dtype).float()
            each[n][name] = float(normalised_mse(given * root, y * root))
    return found


def make_spans(
    model: Decoder, where: Sequence[Place], batches: Iterator[torch.Tensor], heldout: torch.Tensor, folder: Path,
    advance: Callable[[int, str], None] = lambda tokens, note: None,
) -> None:
    """Fit, and store one file a block and then the losses before and after; a fit that does not help on `heldout` (too
    little text for too many channels) is taken back."""
    fitted = fit_spans(model, where, batches, advance)
    start = [dict.fromkeys(p.ends, p.start(model.arch.hidden_size)) for p in where]
    before, after = harms(model, where, heldout, start, fitted)
    tensors: dict[int, dict[str, torch.Tensor]] = {}
    losses: dict[str, dict[str, list[float]]] = {}
    for n, place in enumerate(where):
        for name, old in before[n].items():
            helps = after[n][name] <= old  # NaN is no improvement
            rows = (fitted if helps else start)[n][name]
            tensors.setdefault(place.index, {}).update(place.tensors(name, rows, model.dtype))
            losses.setdefault(str(place.index), {})[name] = [old, after[n][name] if helps else old]
    for index, named in tensors.items():
        with atomic_path(folder / f"block_{index:03}.safetensors") as temporary:
            save_file(named, temporary)
    if losses:
        write_json(folder / f"losses.{share_name(tensors)}.json", losses)
