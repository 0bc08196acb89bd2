"""From options, scores and costs to the search's sites, and from its answer back to options."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from intarsia.arch import Architecture, block_parameters, parameters
from intarsia.compress.assemble import Choice
from intarsia.compress.measure import PHASES, CostTable, block_costs, fixed_bytes
from intarsia.compress.options import COVERED, PARENT, SPAN, OptionSpec, Pair, Site, covered, slot_names
from intarsia.compress.placement import Placement
from intarsia.compress.solve import Infeasible, Option, solve
from intarsia.compress.spans import covering, ties
from intarsia.compress.targets import Problem
from intarsia.engine.scenario import Scenario

if TYPE_CHECKING:
    from intarsia.compress.profiles import Profile

Options = dict[int, list[OptionSpec]]
ABSENT = [OptionSpec(PARENT, None, PARENT)]  # stands for a slot that the parent does not have


def pair_name(attention: str, ffn: str) -> str:
    return f"{attention} | {ffn}"


def name_of(pair: Pair) -> str:
    """What the search calls a pair: by its two options, or one name for a span and for what is covered by one."""
    whole = next((s.name for s in pair if s is not None and s.method in (SPAN, COVERED)), None)
    return whole or pair_name(*slot_names(pair))


def on_its_own(name: str) -> bool:
    """Whether what the search calls so stands for its own layer and no span is part of it."""
    return " | " in name


Way = tuple[OptionSpec, OptionSpec, dict[str, str]]  # an option for each slot, and the ties of the spans


def ways(sites: Sequence[Site], options: Options, position: int) -> Iterator[Way]:
    """All that may stand at a site: compositions of its slots, the parent's own first, then spans that begin here, then
    nothing, once for every number of sites that a span which began before may cover from here on."""
    site, tied = sites[position], any(s.spans for s in sites)
    alone = ties(position, 0, 0) if tied else {}
    for a in options.get(site.attention, ABSENT):
        for f in options.get(site.ffn, ABSENT):
            yield a, f, alone
    for span in site.spans:
        yield span.attention or ABSENT[0], span.ffn or ABSENT[0], ties(position, 0, span.length - 1)
    for left in covering(sites, position):
        yield covered(left), covered(left), ties(position, left, left - 1)


def make_problem(
    arch: Architecture, sites: Sequence[Site], options: Options, table: CostTable, scenario: Scenario, size: int,
    scores: Mapping[tuple[int, str, str], float] | None = None, placement: Placement | None = None,
    profile: Profile | None = None,
) -> Problem:
    """Sites of the search: a layer each, its options the compositions of its two slots, the parent's own first, and
    behind them spans and what they cover.

    Without `scores` all are zero, which is enough to ask what can be reached. `size` is bytes of one weight.
    `placement`: rules for the attention that stays. `profile`: what the target loads; other layers are never chosen.
    """
    rules = [rule for rule in (placement, profile) if rule]
    costs_of = functools.cache(lambda block: block_costs(table, block, arch, scenario, size))
    problem_sites = []
    for position, site in enumerate(sites):
        pairs = []
        for a, f, tied in ways(sites, options, position):
            one, two = costs_of(a.priced), costs_of(f.priced)
            costs = {name: one[name] + two[name] for name in one}
            free = scores is None or a.name == f.name == PARENT or a.method == COVERED
            for rule in rules:
                costs |= rule.costs(site.layer, a.block, f.block)
                tied = tied | rule.ties(a.block, f.block)
            score = 0.0 if free else scores[site.layer, a.name, f.name]
            pairs.append(Option(name_of((a, f)), score, costs, tied))
        problem_sites.append(pairs)
    rest = parameters(arch) - sum(block_parameters(b, arch.hidden_size) for b in arch.blocks)
    fixed = {p: table.fixed[p] for p in PHASES}
    fixed |= {"weight_bytes": fixed_bytes(table, arch, size), "cache_bytes": 0.0, "params": rest}
    bounds, words = [bound for rule in rules for bound in rule.bounds()], [rule.words for rule in rules]
    return Problem(problem_sites, fixed, tokens=scenario.batch * scenario.length, rules=bounds, besides=words)


def check_placement(placement: Placement, sites: Sequence[Site], options: Options) -> None:
    """Raise `Infeasible` where no choice of the options keeps the rules, whatever it costs."""
    pairs = [
        [Option(pair_name(a.name, f.name), 0.0, placement.costs(site.layer, a.block, f.block))
         for a in options.get(site.attention, ABSENT) for f in options.get(site.ffn, ABSENT)]
        for site in sites
    ]  # fmt: skip
    try:
        solve(pairs, placement.bounds())
    except Infeasible:
        layers = ", ".join(map(str, placement.stuck(pairs)))
        raise Infeasible(
            f"target.keep_attention {placement.share:g} lets {placement.most} attention blocks stay, evenly dispersed, "
            f"never as the first mixer and each before an FFN; but at the layers {layers} no option takes its place. "
            "Set options.mamba to true, or ask for more attention."
        ) from None


def choice_of(names: Sequence[str], sites: Sequence[Site], options: Options) -> Choice:
    """The options behind the names of a solution."""
    return [_specs(name, site, options) for site, name in zip(sites, names, strict=True)]


def _specs(name: str, site: Site, options: Options) -> Pair:
    slots = (site.attention, site.ffn)
    if on_its_own(name):
        wanted = zip(slots, name.split(" | "))
        return tuple(None if i is None else next(s for s in options[i] if s.name == part) for i, part in wanted)
    found = next(((span.attention, span.ffn) for span in site.spans if span.name == name), None)
    nothing = OptionSpec(name, None, COVERED)
    return found or tuple(None if i is None else nothing for i in slots)
