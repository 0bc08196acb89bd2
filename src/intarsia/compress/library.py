"""The block library: every option of every site, trained against the parent's block (Puzzle 3), then fitted.

Teacher-forced: every option reads the parent's stream and imitates the parent's update of it, so no gradient crosses a
block and one pass of the parent trains all sites. After training the last matrix of every option is fitted in closed
form to fresh text, which costs one more pass and is worth more than the training itself at small budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from intarsia.arch import FeedForward
from intarsia.base.files import atomic_path, fingerprint, read_json, write_json
from intarsia.compress.importance import rank_channels
from intarsia.compress.options import COVERED, NONE, PARENT, SPAN, OptionSpec, Pair, Site
from intarsia.compress.recipe import Library as Recipe
from intarsia.compress.sensitivity import importance_of
from intarsia.compress.statistics import Statistics
from intarsia.compress.surgery import make_option
from intarsia.compress.trainees import Nested, Own, Trainee, draw, import_option, wide_enough
from intarsia.model import Decoder, ResidualBlock, quantised
from intarsia.model.packed import Importance
from intarsia.ops.losses import normalised_mse
from intarsia.ops.norm import rms_norm
from intarsia.ops.packed import WEIGHED
from intarsia.ops.precise import exact_products
from intarsia.train.optimizer import MasterAdamW, cosine

Batches = Callable[[int], torch.Tensor]  # step -> token ids (B, L)
Options = dict[int, list[OptionSpec]]  # block index of the parent -> its options
FIRST_FIT = 4096  # tokens
FIT_TOKENS = 4096  # of one pass
FIXED = ("linear", "experts", "cmoe", "moefication")  # made in closed form, not trained


@dataclass
class Library:
    """A finished library in a folder: `block` gives the module of an option, `losses` its figures."""

    folder: Path
    parent: Decoder
    losses: dict[str, dict[str, list[float]]]  # block index -> option -> [loss before, loss after]
    spans: Path | None = None  # the folder of what stands for several layers (`spans`)
    sensitivity: Path | None = None  # where `sensitivity` has left what matters to each option, if it was asked

    @classmethod
    def open(cls, folder: Path, parent: Decoder) -> Library:
        return cls(folder, parent, {str(index): row for index, row in stored_losses(folder).items()})

    def widened(self, specs: dict[int, OptionSpec], batches: Iterator[torch.Tensor]) -> dict[int, ResidualBlock]:
        """Narrower FFNs of widths between those that the library holds: prefixes of its sorted blocks, their last
        matrices fitted to `batches`. `specs` are by block index."""
        trainees: dict[int, Trainee] = {}
        for index, spec in specs.items():
            block = ResidualBlock(spec.block, self.parent.arch, self.parent.dtype)
            block.norm.weight.data.copy_(self.parent.blocks[index].norm.weight)
            stored = wide_enough(load_file(self.folder / f"block_{index:03}.safetensors"), spec.block.intermediate_size)
            down = torch.zeros_like(block.mixer.down.weight.data)
            import_option(stored | {f"{spec.name}/down.weight": down}, spec, block)
            trainees[index] = Nested([spec], [block], self.parent.dtype)
            trainees[index].block = block
        fit_trainees(self.parent, trainees, batches)
        for trainee in trainees.values():
            trainee.block.mixer.down.weight.data.copy_(trainee.downs[0])
        return {index: t.block.eval().requires_grad_(False) for index, t in trainees.items()}

    def slots(self, site: Site, pair: Pair) -> list[ResidualBlock | None]:
        """The block in each slot of a layer; None for nothing."""
        return [None if s is None else self.block(i, s) for i, s in zip((site.attention, site.ffn), pair)]

    def pair(self, site: Site, pair: Pair) -> list[ResidualBlock]:
        """The blocks that stand at a layer for an option of either slot, in order."""
        return [block for block in self.slots(site, pair) if block is not None]

    def block(self, index: int, spec: OptionSpec) -> ResidualBlock | None:
        """The block of an option at the parent's block `index`, in the parent's dtype; None for nothing. The parent's
        own option is the parent's own module, not a copy."""
        if spec.method in (NONE, COVERED):
            return None
        if spec.precision:  # what the packed weights stand for
            return quantised(self.block(index, spec.base), spec.precision, self.importance(index, spec))
        parent = self.parent.blocks[index]
        if spec.method == PARENT:
            return parent
        block = ResidualBlock(spec.block, self.parent.arch, self.parent.dtype, self.parent.device)
        block.norm.weight.data.copy_(parent.norm.weight)
        stored = load_file((self.spans if spec.method == SPAN else self.folder) / f"block_{index:03}.safetensors")
        if spec.method == SPAN and spec.block == parent.spec:  # only its last matrix is its own
            stored = {f"{spec.name}/{n}": t for n, t in parent.mixer.state_dict().items()} | stored
        import_option(stored, spec, block)
        return block.eval().requires_grad_(False)

    def importance(self, index: int, spec: OptionSpec) -> Importance | None:
        """What matters to the option where it is packed, if that was asked."""
        if not (self.sensitivity and spec.precision in WEIGHED):
            return None
        return importance_of(self.sensitivity, index, spec)


def unpacked(options: Options) -> Options:
    """Without those that are others packed: what a library holds."""
    return {index: [spec for spec in specs if not spec.precision] for index, specs in options.items()}


def stream(model: Decoder, ids: torch.Tensor) -> Iterator[tuple[int, ResidualBlock, torch.Tensor, torch.Tensor, tuple]]:
    """The parent's pass, block by block: (index, block, normalised input, update, rope tables)."""
    with torch.no_grad():
        x = model.embed_tokens(ids)
        rope = model.rope_tables(0, ids.shape[1])
    for index, block in enumerate(model.blocks):
        with torch.no_grad():
            tables = rope.get(getattr(block.spec, "head_dim", 0))
            n = rms_norm(x, block.norm.weight, block.eps)
            update = block.mixer(n, tables)
        yield index, block, n, update, tables
        x = x + update


@torch.no_grad()
def fit_trainees(
    model: Decoder, trainees: dict[int, Trainee], batches: Iterator[torch.Tensor],
    advance: Callable[[int, str], None] = lambda tokens, note: None,
) -> dict[int, list[torch.Tensor]]:
    """Fit the last matrices of all options to the parent's updates on `batches`; returns the old ones, by block."""
    moments: dict[int, list[list[torch.Tensor]]] = {}
    with exact_products(model.dtype):
        for ids in larger(batches):
            for index, _, n, update, tables in stream(model, ids):
                if index in trainees:
                    _add_moments(moments.setdefault(index, []), trainees[index], n, update, tables)
            advance(ids.numel(), "")
    return {index: trainees[index].refit([(g, c) for g, c in pairs]) for index, pairs in moments.items()}


def larger(batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same rows with `FIT_TOKENS` at a time: adding up a Gram matrix costs as much for few tokens as for many."""
    some: list[torch.Tensor] = []
    for ids in batches:
        some.append(ids)
        if sum(map(torch.Tensor.numel, some)) >= FIT_TOKENS:
            yield torch.cat(some)
            some = []
    if some:
        yield torch.cat(some)


def _add_moments(sums: list[list[torch.Tensor]], trainee: Trainee, n: torch.Tensor, update: torch.Tensor, tables):
    """Of what every last matrix reads, and of that with what it is to give: the update without its bias."""
    for turn, features in enumerate(trainee.inner(n, tables)):
        bias, c = trainee.last_bias(turn), features.flatten(0, 1).float()
        y = (update if bias is None else update - bias).flatten(0, 1).float()
        if turn == len(sums):
            sums.append([torch.zeros(c.shape[1], c.shape[1]), torch.zeros(c.shape[1], y.shape[1])])
        sums[turn][0].addmm_(c.T, c)
        sums[turn][1].addmm_(c.T, y)


class Builder:
    """Trains, fits and stores the options of all blocks. `advance(tokens, note)` reports progress."""

    def __init__(
        self, model: Decoder, options: Options, statistics: dict[int, Statistics], recipe: Recipe, ranking: str,
        folder: Path, states: str = "balanced",
    ):  # fmt: skip
        self.model, self.options, self.statistics, self.recipe = model, options, statistics, recipe
        self.ranking, self.folder, self.states = ranking, folder, states
        self.trainees: dict[int, Trainee] = {}
        self.orders: dict[int, torch.Tensor] = {}  # FFN channels by importance
        self.fixed: dict[int, list[tuple[OptionSpec, ResidualBlock]]] = {}  # not trained
        for index, specs in options.items():
            self._make(index, specs)
        self.optimizer = self._optimizer()

    def _optimizer(self) -> MasterAdamW:
        named = [(f"{i}.{n}", p) for i, t in self.trainees.items() for n, p in t.named_parameters()]
        for _, parameter in named:
            parameter.requires_grad_(True)
        return MasterAdamW(named)

    def _fit_mamba(self, batches: Batches) -> None:
        """Fit the last matrices of new Mamba-2 blocks before they are trained: what they read is at another scale than
        in the parent, and gradients would spend most of a short training on that."""
        new = ("mamba", "narrow")
        mamba = {i: [n for n, s in enumerate(t.specs) if s.method in new] for i, t in self.trainees.items()}
        wanted = {i: self.trainees[i] for i, turns in mamba.items() if turns}
        if not wanted:
            return
        count = -(-FIRST_FIT // self.recipe.batch_tokens)
        for index, old in fit_trainees(self.model, wanted, map(batches, range(count))).items():
            for turn in set(range(len(old))) - set(mamba[index]):
                wanted[index].restore(turn, old[turn])
        self.optimizer = self._optimizer()  # its masters are copies

    @torch.no_grad()
    def _make(self, index: int, specs: list[OptionSpec]) -> None:
        self.fixed[index] = []
        if all(s.method in (PARENT, NONE) for s in specs):  # a parent's own linear block, or nothing was asked for
            return
        parent, stats, order = self.model.blocks[index], self.statistics[index], None
        if isinstance(parent.spec, FeedForward):
            order = rank_channels(stats.channels, parent.mixer.down.weight.T, self.ranking)
            self.orders[index] = order
        wanted = [s for s in specs if s.method not in (PARENT, NONE)]
        made = {s: make_option(parent, s, self.model.arch, stats, order, self.states) for s in wanted}
        self.fixed[index] = [(s, b.to(self.model.dtype)) for s, b in made.items() if s.method in FIXED]
        learn = [s for s in made if s.method not in FIXED]
        if learn:
            kind = Nested if isinstance(parent.spec, FeedForward) and self.recipe.mode == "nested" else Own
            self.trainees[index] = kind(learn, [made[s] for s in learn], self.model.dtype)

    @property
    def steps(self) -> int:
        return self.recipe.tokens // self.recipe.batch_tokens

    def train(self, batches: Batches, save: Callable[[], None], advance: Callable[[int, str], None]) -> None:
        """All steps that are left; `save` is called after each and decides itself when to write."""
        if self.steps and not self.optimizer.steps:
            self._fit_mamba(batches)
        for step in range(self.optimizer.steps, self.steps):
            ids, total = batches(step), 0.0
            for index, _, n, update, tables in stream(self.model, ids):
                trainee = self.trainees.get(index)
                if trainee is not None:
                    loss = trainee.loss(n, update, tables, draw(step, index, len(trainee.specs)))
                    loss.backward()
                    total += loss.item()
            self.optimizer.step(cosine(step, self.steps, self.recipe.lr))
            save()
            advance(ids.numel(), f"loss {total / max(1, len(self.trainees)):.4f}")
        if self.optimizer.steps:
            for trainee in self.trainees.values():
                trainee.settle()

    @torch.no_grad()
    def fit(
        self, batches: Iterator[torch.Tensor], heldout: torch.Tensor, advance: Callable[[int, str], None]
    ) -> dict[int, dict[str, float]]:
        """Fit the last matrix of every trained option to the text of `batches`; where that does not help on `heldout`
        (too little text for too many channels), the old matrix stays. Returns the losses on `heldout`."""
        before = self.losses(heldout)
        old = fit_trainees(self.model, self.trainees, batches, advance)
        after = self.losses(heldout)
        for index, matrices in old.items():
            for turn, spec in enumerate(self.trainees[index].specs):
                if not after[index][spec.name] <= before[index][spec.name]:  # NaN is no improvement either
                    self.trainees[index].restore(turn, matrices[turn])
                    after[index][spec.name] = before[index][spec.name]
        return after

    @torch.no_grad()
    def losses(self, ids: torch.Tensor) -> dict[int, dict[str, float]]:
        """Normalised MSE of every option on held-out ids (B, L), by block and option."""
        found: dict[int, dict[str, float]] = {}
        for index, _, n, update, tables in stream(self.model, ids):
            if index not in self.options:
                continue
            row = {PARENT: 0.0, NONE: 1.0}
            for spec, block in self.fixed[index]:
                row[spec.name] = float(normalised_mse(block.mixer(n, tables), update))
            if index in self.trainees:
                for spec, y in self.trainees[index].outputs(n, tables):
                    row[spec.name] = float(normalised_mse(y, update))
            found[index] = {s.name: row[s.name] for s in self.options[index]}
        return found

    def store(self, before: dict[int, dict[str, float]], after: dict[int, dict[str, float]]) -> None:
        """One safetensors file a block, then the losses of these blocks."""
        for index in self.options:
            tensors = self.trainees[index].export() if index in self.trainees else {}
            for spec, block in self.fixed[index]:
                tensors |= {f"{spec.name}/{n}": t.contiguous() for n, t in block.mixer.state_dict().items()}
            if tensors:
                with atomic_path(self.folder / f"block_{index:03}.safetensors") as temporary:
                    save_file(tensors, temporary)
        rows = {str(i): {name: [before[i][name], after[i][name]] for name in after[i]} for i in after}
        if rows:
            write_json(self.folder / f"losses.{share_name(self.options)}.json", rows)


def share_name(blocks: Iterable[int]) -> str:
    """Of the files that one rank leaves for its blocks: another share never takes them for its own."""
    return fingerprint(sorted(blocks))


def stored_losses(folder: Path) -> dict[int, dict[str, list[float]]]:
    """Block -> option -> [loss before, loss after], of all blocks that any rank has finished."""
    found = {int(i): row for file in folder.glob("losses.*.json") for i, row in read_json(file).items()}
    return dict(sorted(found.items()))
