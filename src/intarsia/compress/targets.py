"""What the user asks of a child (`--speedup 1.5`), as budgets of the search; and what can be had instead.

A target is an upper bound on a linear function of the choice. `check_feasible` needs costs alone (scores may all be
zero), so a target out of reach is refused before any expensive stage.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from intarsia.base.errors import IntarsiaError
from intarsia.compress.solve import Bound, Infeasible, Sites, Solution, solve, total_costs

_TIME = {"prefill_seconds": 1.0, "decode_seconds": 1.0}
_MEMORY = {"weight_bytes": 1.0, "cache_bytes": 1.0}


@dataclass(frozen=True)
class _Kind:
    """How a kind of target reads. `larger_is_better` kinds are work / time, the others bound `weights` directly."""

    weights: Mapping[str, float]
    noun: str
    units: Mapping[str, float]
    show: tuple[tuple[float, str], ...] = ((1.0, ""),)  # sizes and units to write it in, largest first
    larger_is_better: bool = False


_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "min": 60.0}
_BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
KINDS: dict[str, _Kind] = {
    "speedup": _Kind(_TIME, "a speed-up", {"": 1.0, "x": 1.0}, larger_is_better=True),
    "throughput": _Kind(_TIME, "a throughput", {"": 1.0, "tok/s": 1.0, "tokens/s": 1.0}, ((1.0, "tok/s"),), True),
    "latency": _Kind(_TIME, "a latency", _SECONDS, ((1.0, "s"), (1e-3, "ms"))),
    "ttft": _Kind({"prefill_seconds": 1.0}, "a time to first token", _SECONDS, ((1.0, "s"), (1e-3, "ms"))),
    "memory": _Kind(_MEMORY, "a memory", _BYTES, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))),
    "params": _Kind({"params": 1.0}, "a parameter count", {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9},
                     ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))),
}


@dataclass(frozen=True)
class Target:
    """`kind` is one of `KINDS`; `value` in its plain unit: a ratio, tokens/s, seconds, bytes, parameters; of a `share`,
    what the parent has is the unit, and `Problem.settled` says how much that is."""

    kind: str
    value: float
    share: bool = False

    def __str__(self) -> str:
        """As it is typed: `speedup=1.5`, `memory=212MB`, `memory=80%`; `parse_target` reads it back."""
        if self.share:
            return f"{self.kind}={100 * self.value:.10g}%"
        size, unit = _unit(self.kind, self.value)
        return f"{self.kind}={self.value / size:.10g}{unit}"

    @property
    def text(self) -> str:
        """The value as it is read: `1.500`, `212 MB`."""
        return _text(self.kind, self.value)

    def rounded(self) -> Target:
        """To four digits, towards the side that is easier to reach."""
        step = 10.0 ** (math.floor(math.log10(self.value)) - 3) if self.value > 0 else 1.0
        # The nudge keeps a value that is already round where it is.
        easier, nudge = (math.floor, 5e-10) if KINDS[self.kind].larger_is_better else (math.ceil, -5e-10)
        return Target(self.kind, float(f"{easier(self.value / step * (1 + nudge)) * step:.12g}"))


def _unit(kind: str, value: float) -> tuple[float, str]:
    """The largest unit that the value reaches, or the smallest there is."""
    show = KINDS[kind].show
    return next((unit for unit in show if value >= unit[0]), show[-1])


def _text(kind: str, value: float) -> str:
    size, unit = _unit(kind, value)
    number = f"{value / size:.3f}" if kind == "speedup" else f"{value / size:.4g}"
    return f"{number} {unit}".strip()


def parse_target(text: str) -> Target:
    """`kind=value` with an optional unit: speedup=1.5, memory=220MB or 1.5GiB, params=100M, ttft=80ms; or a share of
    what the parent has, memory=80%."""
    kind, equals, value = (part.strip() for part in str(text).partition("="))
    if kind not in KINDS or not equals:
        raise IntarsiaError(
            f"the target {text!r} is not understood: write kind=value with a kind of {', '.join(KINDS)}, "
            "for example speedup=1.5 or memory=220MB."
        )
    match = re.fullmatch(r"([-+]?[\d_]*\.?\d+(?:[eE][-+]?\d+)?|[-+]?\d+\.)\s*([A-Za-z/]*|%)", value)
    units = KINDS[kind].units | ({} if KINDS[kind].larger_is_better else {"%": 0.01})
    if not match or match[2].lower() not in units:
        known = ", ".join(unit for unit in units if unit)
        raise IntarsiaError(f"the target {text!r} is not understood: {value!r} is no number with a unit of {known}.")
    number = float(match[1]) * units[match[2].lower()]
    if not (math.isfinite(number) and number > 0):
        raise IntarsiaError(f"the target {text!r} asks for nothing that can be: its value must be above zero.")
    if kind == "speedup" and number <= 1:
        raise IntarsiaError(f"the target {text!r} is no speed-up: the parent itself is 1, so ask for more than 1.")
    return Target(kind, number, match[2] == "%")


def parse_targets(given: Sequence[str | Target] | Mapping[str, object]) -> list[Target]:
    """Parse every target; at least one, and each kind once. A mapping (from a recipe) is kind -> value."""
    texts = [f"{kind}={value}" for kind, value in given.items()] if isinstance(given, Mapping) else given
    targets = [text if isinstance(text, Target) else parse_target(text) for text in texts]
    if not targets:
        raise IntarsiaError(f"no target is given: ask for one or more of {', '.join(KINDS)}, such as speedup=1.5.")
    for first, second in itertools.combinations(targets, 2):
        if first.kind == second.kind:
            raise IntarsiaError(f"{first.kind} is given twice, as {first} and as {second}: keep the one you mean.")
    return targets


@dataclass(frozen=True)
class Problem:
    """All that a target is measured against.

    `fixed`: costs outside the sites (embedding, head, final norm). `parent`: the index of the parent's own option of
    each site, the first where None. `tokens`: batch * (prompt + generated) of the scenario, for `throughput`.
    `rules`: bounds that hold whatever the targets are; `besides`: the same in words.
    """

    sites: Sites
    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)
    parent: Sequence[int] | None = None
    tokens: float | None = None
    rules: Sequence[Bound] = ()
    besides: Sequence[str] = ()

    def parent_costs(self) -> dict[str, float]:
        return total_costs(self.sites, self.parent or [0] * len(self.sites), self.fixed)

    def _work(self, kind: str) -> float:
        """What a kind that is larger when better divides by the time."""
        if kind == "speedup":
            return Bound("", _TIME, 0.0).value(self.parent_costs())
        if not self.tokens:
            raise IntarsiaError("a throughput needs a scenario: tokens per second of which batch, prompt and answer?")
        return self.tokens

    def settled(self, target: Target) -> Target:
        """The target in plain units: of a share, so much of what the parent has."""
        if not target.share:
            return target
        return Target(target.kind, target.value * self.value(target.kind, self.parent_costs()))

    def bound(self, target: Target) -> Bound:
        """The budget that a target means for the totals of the whole model."""
        kind = KINDS[target.kind]
        limit = self._work(target.kind) / target.value if kind.larger_is_better else target.value
        return Bound(target.kind, kind.weights, limit)

    def bounds(self, targets: Sequence[Target]) -> list[Bound]:
        return [*(self.bound(target) for target in targets), *self.rules]

    def value(self, kind: str, costs: Mapping[str, float]) -> float:
        """What a model of these total costs reaches in a kind of target."""
        amount = Bound("", KINDS[kind].weights, 0.0).value(costs)
        if KINDS[kind].larger_is_better:
            return self._work(kind) / amount if amount > 0 else math.inf
        return amount


def on_whole_time(bound: Bound) -> bool:
    """Whether a bound limits the time of the whole scenario."""
    return set(bound.weights) == set(_TIME)


def paced(bounds: Sequence[Bound], pace: float) -> list[Bound]:
    """The bounds for a predictor whose children come out at `pace` times the speed it predicts: limits on time are
    multiplied by it, all others stay."""
    timely = set(_TIME)
    return [dataclasses.replace(b, limit=b.limit * pace) if set(b.weights) <= timely else b for b in bounds]


@dataclass(frozen=True)
class Reach:
    """The range of one kind with other targets in force.

    `extreme` is the best value and `solution` the best-scoring choice that has it; both None where the other targets
    alone are already out of reach.
    """

    kind: str
    parent: float
    extreme: float | None
    solution: Solution | None


def reach(problem: Problem, kind: str, others: Sequence[Target] = (), *, time_limit: float = 20.0) -> Reach:
    """How far one kind can go, `others` (of its own kind: ignored) being met."""
    others = [target for target in others if target.kind != kind]
    found = _cheapest(problem, kind, others, time_limit)
    here = problem.value(kind, problem.parent_costs())
    if found is None:
        return Reach(kind, here, None, None)
    weights = KINDS[kind].weights
    limit = Bound(kind, weights, Bound(kind, weights, 0.0).value(found.costs))
    best = solve(problem.sites, [*problem.bounds(others), limit], fixed=problem.fixed, time_limit=time_limit)[0]
    return Reach(kind, here, problem.value(kind, found.costs), best)


def _cheapest(problem: Problem, kind: str, others: Sequence[Target], time_limit: float = 20.0) -> Solution | None:
    """The choice that goes furthest in a kind while it meets the other targets."""
    amount = Bound(kind, KINDS[kind].weights, 0.0)
    sites = [
        [dataclasses.replace(o, score=amount.value(o.costs) if math.isfinite(o.score) else math.nan) for o in site]
        for site in problem.sites
    ]
    try:
        return solve(sites, problem.bounds(others), fixed=problem.fixed, time_limit=time_limit)[0]
    except Infeasible:
        return None


def reachable(problem: Problem, targets: Sequence[Target] = (), kinds: Sequence[str] | None = None) -> dict[str, Reach]:
    """`reach` of every kind (or of `kinds`), each with the targets of the other kinds in force."""
    if kinds is None:
        kinds = [kind for kind in KINDS if kind != "throughput" or problem.tokens]
    return {kind: reach(problem, kind, targets) for kind in kinds}


def check_feasible(problem: Problem, targets: Sequence[Target]) -> None:
    """Raise `IntarsiaError` unless some choice meets all targets and the parent does not already."""
    bounds, parent = problem.bounds(targets), problem.parent_costs()
    if all(bound.met(parent) for bound in bounds):
        values = " and ".join(f"{t.kind} {_text(t.kind, problem.value(t.kind, parent))}" for t in targets)
        asked = f"{_list(targets)} (it has {values})" if targets else "what is asked of its attention"
        raise IntarsiaError(f"there is nothing to do: the parent already meets {asked}. Ask for more.")
    if targets and not _feasible(problem, targets):
        explain_infeasible(problem, targets)


def explain_infeasible(problem: Problem, targets: Sequence[Target]) -> None:
    """Raise `Infeasible` with what stands in the way, the reachable ranges and the nearest targets that can be met."""
    alone = [t for t in targets if not _feasible(problem, [t])]
    pairs = [p for p in itertools.combinations(targets, 2) if not set(p) & set(alone) and not _feasible(problem, p)]
    if alone:
        sentences = [_out_of_reach(problem, target) for target in alone]
    elif pairs:
        sentences = [f"{a} and {b} cannot be met together: {_best(problem, a, [b])}; {_best(problem, b, [a])}."
                     for a, b in pairs]
    else:
        rest = "; ".join(_best(problem, t, [o for o in targets if o is not t]) for t in targets)
        sentences = [f"{_list(targets)} cannot be met together, though any two of them can: {rest}."]
    near = " ".join(f"--{t}".replace("=", " ") for t in nearest_feasible(problem, targets))
    sentences.append(f"Nearest feasible: {near}" if near else "No target of these kinds can be met beyond the parent.")
    raise Infeasible(" ".join(sentences))


def nearest_feasible(problem: Problem, targets: Sequence[Target]) -> list[Target]:
    """The targets, each relaxed to the best that is possible beside those before it; met together.

    One that allows nothing better than the parent is left out.
    """
    near: list[Target] = []
    for target in targets:
        if not _feasible(problem, [*near, target]):
            best = reach(problem, target.kind, near)
            if best.extreme is None or not math.isfinite(best.extreme):
                continue
            target = Target(target.kind, best.extreme).rounded()
            if not _better(target.kind, target.value, best.parent):
                continue
        near.append(target)
    return near


def _feasible(problem: Problem, targets: Sequence[Target]) -> bool:
    found = _cheapest(problem, targets[0].kind, targets[1:])
    return found is not None and problem.bound(targets[0]).met(found.costs)


def _better(kind: str, value: float, than: float) -> bool:
    return value > than if KINDS[kind].larger_is_better else value < than


def _list(targets: Sequence[Target]) -> str:
    return " and ".join(map(str, targets))


def _out_of_reach(problem: Problem, target: Target) -> str:
    best = reach(problem, target.kind)
    noun = f"{KINDS[target.kind].noun} of {target.text}"
    if best.extreme is None:
        return f"{noun} is out of reach: nothing can be chosen at all."
    extreme = Target(target.kind, best.extreme).rounded().value
    ends = sorted([best.parent, extreme])
    span = " and ".join(_text(target.kind, end) for end in ends)
    options = ", and ".join(["these options", *problem.besides])
    return f"{noun} is out of reach: between {span} is possible with {options}{_quality(best)}."


def _quality(best: Reach) -> str:
    score = best.solution.score if best.solution else 0.0
    return f" (at a predicted loss of {score:.3g} at that end)" if score else ""


def _best(problem: Problem, target: Target, others: Sequence[Target]) -> str:
    best = reach(problem, target.kind, others)
    if best.extreme is None:
        return f"with {_list(others)} no {target.kind} is possible"
    value = _text(target.kind, Target(target.kind, best.extreme).rounded().value)
    return f"with {_list(others)}, {target.kind} reaches {value} at best{_quality(best)}"
