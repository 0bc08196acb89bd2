"""Replace-one-site scores: what the whole parent loses when one site alone stands otherwise (Puzzle 4.2).

The stream below the site is the parent's and is computed once; only the blocks above it run again. Parent and child are
compared in float32 at every `stride`-th position of held-out text; the standard error is over sequences.

Two changes in one layer are not independent. Near the parent a KL is a quadratic form in the error, so for an attention
option a and an FFN option f of one layer

    KL(a, f) = KL(a) + KL(f) + c sqrt(KL(a) KL(f)),

with c the cosine of the two errors in that form (times 2). One composed measurement a layer gives its c; the library
of NVIDIA's 49B behaves so (joint KL three quarters of the sum, so c is about -1/2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import append_jsonl, read_jsonl
from intarsia.compress.library import Library
from intarsia.compress.options import NONE, PARENT, OptionSpec, Pair, Site, slot_names
from intarsia.compress.takeover import Takeover, leaves_out
from intarsia.model import Decoder, ResidualBlock
from intarsia.ops.precise import exact_products

if TYPE_CHECKING:
    from intarsia.compress.coupled import Coupled

METRICS = ("kl", "lm_loss", "cosine")


@dataclass(frozen=True)
class Scored:
    """One measurement. `score` is the metric that the search minimises; all three are kept, each with its SE."""

    layer: int
    attention: str
    ffn: str
    kl: float
    kl_se: float
    lm_loss: float
    lm_loss_se: float
    cosine: float
    cosine_se: float
    span: int = 1  # layers that these two stand for


HEAD_ROWS = 256  # positions that go through the head together: more need more memory, fewer read its matrix more often


class Scorer:
    """Scores options of a parent on ids (B, L). `positions` of every sequence are looked at."""

    def __init__(self, model: Decoder, ids: torch.Tensor, stride: int):
        self.model, self.ids = model, ids
        self.positions = torch.arange(stride - 1, ids.shape[1] - 1, stride)
        self.head = model.head_weight.float()
        self.rope = model.rope_tables(0, ids.shape[1])
        self.parts = torch.arange(len(ids)).split(max(1, HEAD_ROWS // len(self.positions)))
        with torch.inference_mode(), exact_products(model.dtype):
            self.last = self.pick(model.run(model.embed_tokens(ids)))
            self.parent = [self._log_probs(self.last[part]) for part in self.parts]
            self.chances = [log_p.exp() for log_p in self.parent]
            self.nll = torch.cat([self._nll(part, log_p) for part, log_p in zip(self.parts, self.parent)])

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """What the head reads at the chosen positions, (B, n, D) float32."""
        return self.model.final_norm(x[:, self.positions]).float()

    def _log_probs(self, rows: torch.Tensor, head: torch.Tensor | None = None) -> torch.Tensor:
        return F.log_softmax(F.linear(rows, self.head if head is None else head), dim=-1)

    def _head_of(self, child: Decoder) -> torch.Tensor:
        """(V, D) float32."""
        shared = child.head_weight is self.model.head_weight
        return self.head if shared else child.head_weight.float()

    def _nll(self, part: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        """Of the sequences `part`, (n,)."""
        return -log_p.gather(2, self.ids[part][:, self.positions + 1, None]).mean((1, 2))

    @torch.inference_mode()
    def measure(self, x: torch.Tensor, start: int, model: Decoder | None = None) -> dict[str, float]:
        """The three metrics, with standard errors, of a stream x (B, L, D) that continues at block `start` of a model
        with the parent's head; None: of the parent."""
        return self.compare(self.pick((model or self.model).run(x, start, rope=self.rope)))

    @torch.inference_mode()
    def whole(self, child: Decoder) -> dict[str, float]:
        """The three metrics of an assembled child."""
        last = child.run(child.embed_tokens(self.ids), rope=self.rope)[:, self.positions]
        return self.compare(child.final_norm(last).float(), self._head_of(child))

    @torch.inference_mode()
    def greedy(self, child: Decoder) -> dict[str, float]:
        """How often the likeliest token of an assembled child is the text's own (`accuracy`), and how often it is the
        parent's (`agreement`)."""
        last = child.final_norm(child.run(child.embed_tokens(self.ids), rope=self.rope)[:, self.positions]).float()
        right, same, head = 0, 0, self._head_of(child)
        with exact_products(self.model.dtype):
            for part, parent in zip(self.parts, self.parent):
                answers = self._log_probs(last[part], head).argmax(-1)
                right += int((answers == self.ids[part][:, self.positions + 1]).sum())
                same += int((answers == parent.argmax(-1)).sum())
        count = len(self.ids) * len(self.positions)
        return {"accuracy": right / count, "agreement": same / count}

    def compare(self, last: torch.Tensor, head: torch.Tensor | None = None) -> dict[str, float]:
        """The three metrics, with standard errors, of what the head reads at the chosen positions (B, n, D'). `head`
        (V, D') where it is not the parent's; a stream of another width has no cosine with the parent's."""
        kl, nll = [], []
        with exact_products(self.model.dtype):
            for part, p, log_p in zip(self.parts, self.chances, self.parent):
                log_q = self._log_probs(last[part], head)
                nll.append(self._nll(part, log_q))
                kl.append(torch.sub(log_p, log_q, out=log_q).mul_(p).sum(2).mean(1))
        cosine = torch.full((1,), math.nan)
        if last.shape == self.last.shape:
            cosine = 1 - F.cosine_similarity(last, self.last, dim=-1).mean(1)
        found = {"kl": torch.cat(kl), "lm_loss": torch.cat(nll) - self.nll, "cosine": cosine}
        pairs = {name: mean_and_se(rows.tolist()) for name, rows in found.items()}
        return {n: pair[0] for n, pair in pairs.items()} | {f"{n}_se": pair[1] for n, pair in pairs.items()}

    @torch.inference_mode()
    def change(self, x: torch.Tensor, block: ResidualBlock | None) -> torch.Tensor:
        """The stream after `block` in place of a parent's block."""
        return x if block is None else block(x, self.rope.get(getattr(block.spec, "head_dim", 0)))


def mean_and_se(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is not known and given as NaN."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def score_library(
    scorer: Scorer, library: Library, sites: list[Site], options: dict[int, list[OptionSpec]], file: Path,
    advance: Callable[[], None] = lambda: None, mine: Collection[Site] | None = None, known: Sequence[dict] = (),
    takeover: Takeover | None = None,
) -> list[Scored]:
    """Score every option of every site alone, one composition a layer, the layer left out, and every span; rows go to
    `file` as they are found, and those already there, or `known`, are not measured again. `mine`: the sites to score;
    None: all. `takeover`: what is left out is taken over by the block before; None: it is not."""
    done = {_key(r): r for r in (*known, *read_jsonl(file))}
    x = scorer.model.embed_tokens(scorer.ids)
    for n, site in enumerate(sites):
        if takeover:
            takeover.enter(site)
        if mine is not None and site not in mine:
            x = scorer.model.run(x, *site.reach, rope=scorer.rope)
            continue
        found: dict[tuple[str, str], dict[str, float]] = {}

        def need(a: OptionSpec | None, f: OptionSpec | None, length: int = 1, n=n, x=x, found=found) -> None:
            names, end = slot_names((a, f)), sites[n + length - 1].reach[1]
            key = (sites[n].layer, *names)
            if key not in done:
                whole = {"span": length} if length > 1 else {}
                done[key] = score_pair(scorer, library, sites[n], (a, f), x, end, takeover) | whole
                append_jsonl(file, done[key])
            if length == 1:
                found[names] = done[key]
            advance()

        attentions, ffns = (options.get(index, [None]) for index in (site.attention, site.ffn))
        for spec in attentions[1:]:
            need(spec, ffns[0])
        for spec in ffns[1:]:
            need(attentions[0], spec)
        if pair := _typical_pair(found):
            need(*(_named(options, index, name) for index, name in zip((site.attention, site.ffn), pair)))
        if (gone := _left_out(attentions, ffns)) and pair != slot_names(gone):
            need(*gone)
        for span in site.spans:
            need(span.attention, span.ffn, span.length)
        x = scorer.model.run(x, *site.reach, rope=scorer.rope)
    return scored(done.values(), sites)


def scored(rows: Iterable[dict], sites: list[Site]) -> list[Scored]:
    """Rows of one or several files, each measurement once, in the order of the sites."""
    order = {site.layer: n for n, site in enumerate(sites)}
    once = sorted({_key(r): r for r in rows}.values(), key=lambda r: order[r["layer"]])
    return [Scored(**{k: v for k, v in row.items() if k in Scored.__dataclass_fields__}) for row in once]


def _key(row: dict) -> tuple[int, str, str]:
    return row["layer"], row["attention"], row["ffn"]


def count_measurements(sites: list[Site], options: dict[int, list[OptionSpec]]) -> int:
    """How many `score_library` makes."""
    slots = [[options.get(index, [None]) for index in (s.attention, s.ffn)] for s in sites]
    cheaper = [[len(specs) - 1 for specs in pair] for pair in slots]
    left_out = [_left_out(*pair) is not None and a + f > 2 for pair, (a, f) in zip(slots, cheaper)]
    return sum(a + f + (a > 0 and f > 0) for a, f in cheaper) + sum(left_out) + sum(len(site.spans) for site in sites)


def _left_out(attentions: Sequence[OptionSpec | None], ffns: Sequence[OptionSpec | None]) -> Pair | None:
    """The pair that leaves a layer of two blocks out."""
    gone = [next((s for s in specs if s and s.method == NONE), None) for specs in (attentions, ffns)]
    return None if None in gone else (gone[0], gone[1])


def _named(options: dict[int, list[OptionSpec]], index: int | None, name: str) -> OptionSpec | None:
    return None if index is None else next(s for s in options[index] if s.name == name)


def score_pair(
    scorer: Scorer, library: Library | Coupled, site: Site, pair: Pair, x: torch.Tensor, end: int,
    takeover: Takeover | None = None,
) -> dict[str, Any]:
    """The row of a pair that stands at a site, before which the stream is x (B, L, D), up to the block `end`.
    `takeover` has come to the site."""
    slots = library.slots(site, pair)
    if takeover and leaves_out(pair) and end == site.reach[1]:
        x = takeover.stream([block for block, spec in zip(slots, pair) if spec is not None])
    else:
        for block in slots:
            x = scorer.change(x, block)
    attention, ffn = slot_names(pair)
    return {"layer": site.layer, "attention": attention, "ffn": ffn, **scorer.measure(x, end)}


def _typical_pair(found: dict[tuple[str, str], dict[str, float]]) -> tuple[str, str] | None:
    """The attention option and the FFN option of middling harm, whose composition is worth measuring; not the layer
    left out where there is another."""
    finite = {names: row for names, row in found.items() if math.isfinite(row["kl"])}
    attention = sorted((r["kl"], a) for (a, f), r in finite.items() if f == PARENT)
    ffn = sorted((r["kl"], f) for (a, f), r in finite.items() if a == PARENT)
    if not attention or not ffn:
        return None
    pair = (attention[len(attention) // 2][1], ffn[len(ffn) // 2][1])
    if pair == (NONE, NONE) and len(attention) + len(ffn) > 2:  # which is measured anyway
        others = [(a, f) for _, a in attention for _, f in ffn if (a, f) != pair and NONE in (a, f)]
        pair = others[len(others) // 2]
    return pair


def compose(rows: list[Scored], metric: str) -> dict[tuple[int, str, str], float]:
    """Scores of all compositions (layer, attention option, FFN option), measured ones as measured. Every figure is at
    least zero: a change that seems to help by chance is worth nothing. One that is no number becomes infinity, which
    the search never takes; neither says anything of the other options of its layer. A span is no composition."""
    if metric not in METRICS:
        raise IntarsiaError(f"score metric {metric!r} is not known; known: {', '.join(METRICS)}.")
    layers: dict[int, dict[tuple[str, str], float]] = {}
    result = {}
    for row in rows:
        harm = _harm(asdict(row)[metric])
        if row.span > 1:
            result[row.layer, row.attention, row.ffn] = harm
        else:
            layers.setdefault(row.layer, {})[row.attention, row.ffn] = harm
    for layer, known in layers.items():
        attention = {a: v for (a, f), v in known.items() if f == PARENT} | {PARENT: 0.0}
        ffn = {f: v for (a, f), v in known.items() if a == PARENT} | {PARENT: 0.0}
        c = _coupling(known, attention, ffn)
        for a, alone_a in attention.items():
            for f, alone_f in ffn.items():
                joint = _joint(alone_a, alone_f, c)
                result[layer, a, f] = known.get((a, f), max(joint, alone_a, alone_f) if c < 0 else joint)
    return result


def _harm(value: float) -> float:
    return max(0.0, value) if math.isfinite(value) else math.inf


def _joint(a: float, f: float, c: float) -> float:
    return math.inf if math.inf in (a, f) else a + f + c * math.sqrt(a) * math.sqrt(f)


def _coupling(known: dict[tuple[str, str], float], attention: dict[str, float], ffn: dict[str, float]) -> float:
    """c of a layer from its composed measurement, within the [-2, 2] that a quadratic form allows; 0 without one."""
    typical_first = sorted(known.items(), key=lambda row: row[0] == (NONE, NONE))
    for (a, f), joint in typical_first:
        if PARENT in (a, f) or not math.isfinite(joint + attention[a] + ffn[f]):
            continue
        root = math.sqrt(attention[a]) * math.sqrt(ffn[f])
        if root > 0:
            return min(2.0, max(-2.0, (joint - attention[a] - ffn[f]) / root))
    return 0.0
