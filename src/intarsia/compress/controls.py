"""What simpler methods would have made of the same library at the same speed: the controls beside a child.

- uniform: every FFN at one width (Minitron's width pruning, on the same trained prefixes), or, where the target limits
  attention, what stays of it evenly spaced;
- depth: whole layers left out, those whose removal costs least;
- greedy: budgets shared out evenly, easiest layers first (Puzzle, F.2);
- random: choices from the library that happen to meet the budget;
- blocks, bits: the same search where only blocks, or only the precision of the parent's own blocks, may be chosen;
- "prefix,none" and the like: the same search among options of these methods and precisions alone, which tells what an
  option is worth.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from intarsia.arch import Attention, FeedForward
from intarsia.compress.assemble import Choice
from intarsia.compress.baselines import greedy, random_choice
from intarsia.compress.measure import BASE, PHASES, CostTable, key
from intarsia.compress.options import COVERED, NONE, PARENT, SPAN, OptionSpec, Site
from intarsia.compress.placement import Placement
from intarsia.compress.problem import choice_of, on_its_own, pair_name
from intarsia.compress.solve import Bound, Infeasible, Option, describe, solve

KINDS = ("uniform", "depth", "greedy", "random", "blocks", "bits")


def uniform_width(sites: Sequence[Site], block: FeedForward, table: CostTable, seconds: float, multiple: int) -> int:
    """The largest width (a multiple of `multiple`) at which the model takes at most `seconds`, all FFNs being equal.

    Costs between measured widths are interpolated. Raises `Infeasible` when even the narrowest is too slow.
    """
    known = known_widths(block, table)
    whole, ffns = table.parent_seconds(), sum(s.ffn is not None for s in sites)
    here = known[block.intermediate_size]

    def met(width: int) -> bool:
        return whole - ffns * (here - interpolated(known, width)) <= seconds

    return _widest(block, multiple, met, "fast")


def uniform_width_within(
    block: FeedForward, count: int, parent: Mapping[str, float], channel: Mapping[str, float], bounds: Sequence[Bound],
    multiple: int,
) -> int:
    """The largest width (a multiple of `multiple`) of `count` FFNs within bounds on costs that are linear in it.

    `parent`: total costs of the parent; `channel`: what one channel of one FFN costs. Raises `Infeasible` when even the
    narrowest does not meet them.
    """

    def met(width: int) -> bool:
        gone = count * (block.intermediate_size - width)
        costs = {name: cost - gone * channel.get(name, 0.0) for name, cost in parent.items()}
        return all(bound.met(costs) for bound in bounds)

    return _widest(block, multiple, met, "small")


def _widest(block: FeedForward, multiple: int, fits: Callable[[int], bool], what: str) -> int:
    """The largest width below the block's own that fits."""
    for width in range((block.intermediate_size - 1) // multiple * multiple, 0, -multiple):
        if fits(width):
            return width
    raise Infeasible(f"no uniform FFN width alone is {what} enough for the target.")


def known_widths(block: FeedForward, table: CostTable) -> dict[int, float]:
    """Width -> seconds of every measured FFN like `block` and no wider, and at 0 what the narrowest cost whatever their
    width: measured FFNs are affine in it (puzzle.md 1.6)."""
    known: dict[int, float] = {}
    for width in range(1, block.intermediate_size + 1):
        name = key(dataclasses.replace(block, intermediate_size=width))
        if name in table.blocks:
            known[width] = sum(table.blocks[name][p] for p in PHASES)
    if len(known) < 2:
        return {0: 0.0} | known
    (first, low), (second, high) = list(known.items())[:2]
    return {0: min(low, max(0.0, low - (high - low) * first / (second - first)))} | known


def interpolated(known: dict[int, float], width: int) -> float:
    """Seconds of a width between two known ones; of a wider one than all, on the line of the two widest."""
    if width > max(known):
        (first, low), (second, high) = sorted(known.items())[-2:]
        return high + (high - low) * (width - second) / (second - first)
    below, above = max(w for w in known if w <= width), min(w for w in known if w >= width)
    if below == above:
        return known[width]
    return known[below] + (known[above] - known[below]) * (width - below) / (above - below)


def control_choice(
    kind: str, sites: Sequence[Site], options: dict[int, list[OptionSpec]], problem_sites: Sequence[Sequence[Option]],
    bounds: Sequence[Bound], fixed: dict[str, float], width: int | None, seed: int,
    placement: Placement | None = None,
) -> tuple[Choice, str]:
    """The choice that a simpler method makes within `bounds`, and a description of it. `kind`: one of `KINDS`, which
    know no spans, or the methods and precisions that a search is kept to."""
    if kind not in KINDS:
        return _among(kind, sites, options, problem_sites, bounds, fixed)
    problem_sites = [[option for option in known if on_its_own(option.name)] for known in problem_sites]
    if kind == "uniform" and placement is not None:
        return _evenly(sites, options, problem_sites, bounds, fixed, placement)
    if kind == "uniform":
        if width is None:
            raise Infeasible("a uniform width is for parents with one FFN width and not for a time to the first token.")
        return _uniform(sites, options, width), f"every FFN at {width} channels"
    if kind == "depth":
        whole = pair_name(PARENT, PARENT)
        narrow = [[o for o in known if o.name in (whole, _gone(site))] for site, known in zip(sites, problem_sites)]
        solution = solve(narrow, bounds, fixed=fixed)[0]
        gone = sum(name != whole for name in solution.names)
        return choice_of(solution.names, sites, options), f"{gone} whole layers left out"
    if kind == "greedy":
        return choice_of(greedy(problem_sites, bounds, fixed=fixed).names, sites, options), "easiest layers first"
    if kind == "random":
        names = random_choice(problem_sites, bounds, seed, fixed=fixed).names
        return choice_of(names, sites, options), "random choices from the library"
    return _either(kind, sites, options, problem_sites, bounds, fixed)


def _either(
    kind: str, sites: Sequence[Site], options: dict[int, list[OptionSpec]], problem_sites: Sequence[Sequence[Option]],
    bounds: Sequence[Bound], fixed: dict[str, float],
) -> tuple[Choice, str]:
    """The exact search over half of its axes: cheaper blocks in the precision of all others, or the parent's blocks in
    any precision."""
    if not any(spec.precision for specs in options.values() for spec in specs):
        raise Infeasible(f"{kind} alone is a control where blocks have precisions: see options.precisions.")

    def wanted(spec: OptionSpec) -> bool:
        return not spec.precision if kind == "blocks" else spec.base.method == PARENT

    narrow = _wanted(sites, options, problem_sites, wanted)
    choice = choice_of(solve(narrow, bounds, fixed=fixed)[0].names, sites, options)
    if kind == "blocks":
        return choice, "cheaper blocks, none of them packed narrower"
    counted = Counter(spec.precision or BASE for pair in choice for spec in pair if spec is not None)
    return choice, "the parent's blocks, " + ", ".join(f"{count} in {name}" for name, count in counted.most_common())


def _among(
    kind: str, sites: Sequence[Site], options: dict[int, list[OptionSpec]], problem_sites: Sequence[Sequence[Option]],
    bounds: Sequence[Bound], fixed: dict[str, float],
) -> tuple[Choice, str]:
    """The exact search among the parent's blocks and options of some methods and precisions, `kind`: "prefix,int8"."""
    asked = set(kind.split(","))
    specs = {spec for known in options.values() for spec in known}
    methods = {spec.method for spec in specs} | ({SPAN} if any(site.spans for site in sites) else set())
    known = (methods | {spec.precision for spec in specs}) - {PARENT, ""}
    if strange := sorted(asked - known):
        held = ", ".join(sorted(known))
        raise Infeasible(f"it names {strange[0]}, of which this run has no options; it has: {held}.")

    def wanted(spec: OptionSpec) -> bool:
        return spec.method in asked | {PARENT} and spec.precision in asked | {""}

    narrow = _wanted(sites, options, problem_sites, wanted, spans=SPAN in asked)
    choice = choice_of(solve(narrow, bounds, fixed=fixed)[0].names, sites, options)
    words = [w for pair in choice for s in pair if s is not None for w in (s.method, s.precision)]
    counted = Counter(word for word in words if word not in (PARENT, COVERED, ""))
    return choice, ", ".join(f"{count} {name}" for name, count in counted.most_common())


def _wanted(
    sites: Sequence[Site], options: dict[int, list[OptionSpec]], problem_sites: Sequence[Sequence[Option]],
    wanted: Callable[[OptionSpec], bool], spans: bool = False,
) -> list[list[Option]]:
    """Of what may be chosen at every site, what is made of wanted options alone; with `spans`, all of these as well."""
    kept = [
        {pair_name(a, f) for a in _names(options, site.attention, wanted) for f in _names(options, site.ffn, wanted)}
        for site in sites
    ]
    return [
        [o for o in known if o.name in names or (spans and not on_its_own(o.name))]
        for known, names in zip(problem_sites, kept)
    ]


def _names(
    options: dict[int, list[OptionSpec]], index: int | None, wanted: Callable[[OptionSpec], bool]
) -> list[str]:
    """Of the options at a slot those that are wanted; a slot that the parent does not have is called as in the
    problem."""
    return [PARENT] if index is None else [spec.name for spec in options[index] if wanted(spec)]


def _gone(site: Site) -> str:
    """The pair that leaves a layer out; a slot that the parent does not have is called as in the problem."""
    return pair_name(*(PARENT if index is None else NONE for index in (site.attention, site.ffn)))


def _evenly(
    sites: Sequence[Site], options: dict[int, list[OptionSpec]], problem_sites: Sequence[Sequence[Option]],
    bounds: Sequence[Bound], fixed: dict[str, float], placement: Placement,
) -> tuple[Choice, str]:
    """As hybrids are published: attention evenly spaced, Mamba-2 in its place elsewhere, every FFN the parent's."""
    kept, names = placement.evenly(sites), []
    for n, site in enumerate(sites):
        mamba = next((s.name for s in options.get(site.attention, []) if s.method == "mamba"), PARENT)
        names.append(pair_name(PARENT if n in kept else mamba, PARENT))
    picked = [[o.name for o in known].index(name) for name, known in zip(names, problem_sites)]
    solution = describe(problem_sites, picked, bounds, fixed)
    if broken := [b.name for b in bounds if not b.met(solution.costs)]:
        raise Infeasible(f"attention spaced evenly misses {', '.join(broken)}.")
    choice = choice_of(names, sites, options)
    left = sum(spec is not None and isinstance(spec.block, Attention) for spec, _ in choice)
    return choice, f"attention evenly spaced in {left} layers, Mamba-2 elsewhere"


def _uniform(sites: Sequence[Site], options: dict[int, list[OptionSpec]], width: int) -> Choice:
    def ffn(index: int | None) -> OptionSpec | None:
        if index is None:
            return None
        parent = options[index][0]
        return OptionSpec(f"ffn {width}", dataclasses.replace(parent.block, intermediate_size=width), "prefix")

    return [(None if s.attention is None else options[s.attention][0], ffn(s.ffn)) for s in sites]
