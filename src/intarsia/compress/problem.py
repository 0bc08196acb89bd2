"""From options, scores and costs to the search's sites, and from its answer back to options."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from intarsia.arch import Architecture, block_parameters, parameters
from intarsia.compress.assemble import Choice
from intarsia.compress.measure import PHASES, CostTable, block_costs, fixed_bytes
from intarsia.compress.options import PARENT, OptionSpec, Site
from intarsia.compress.placement import Placement
from intarsia.compress.solve import Infeasible, Option, solve
from intarsia.compress.targets import Problem
from intarsia.engine.scenario import Scenario

if TYPE_CHECKING:
    from intarsia.compress.profiles import Profile

Options = dict[int, list[OptionSpec]]
ABSENT = [OptionSpec(PARENT, None, PARENT)]  # stands for a slot that the parent does not have


def pair_name(attention: str, ffn: str) -> str:
    return f"{attention} | {ffn}"


def make_problem(
    arch: Architecture, sites: Sequence[Site], options: Options, table: CostTable, scenario: Scenario, size: int,
    scores: Mapping[tuple[int, str, str], float] | None = None, placement: Placement | None = None,
    profile: Profile | None = None,
) -> Problem:
    """Sites of the search: a layer each, its options the compositions of its two slots; the parent's own comes first.

    Without `scores` all are zero, which is enough to ask what can be reached. `size` is bytes of one weight.
    `placement`: rules for the attention that stays. `profile`: what the target loads; other layers are never chosen.
    """
    rules = [rule for rule in (placement, profile) if rule]
    costs_of = functools.cache(lambda block: block_costs(table, block, arch, scenario, size))
    problem_sites = []
    for site in sites:
        pairs = []
        for a in options.get(site.attention, ABSENT):
            for f in options.get(site.ffn, ABSENT):
                one, two = costs_of(a.priced), costs_of(f.priced)
                costs = {name: one[name] + two[name] for name in one}
                score = 0.0 if scores is None or a.name == f.name == PARENT else scores[site.layer, a.name, f.name]
                ties: dict[str, str] = {}
                for rule in rules:
                    costs |= rule.costs(site.layer, a.block, f.block)
                    ties |= rule.ties(a.block, f.block)
                pairs.append(Option(pair_name(a.name, f.name), score, costs, ties))
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
    choice = []
    for site, name in zip(sites, names, strict=True):
        wanted = name.split(" | ")
        choice.append(
            tuple(
                None if index is None else next(s for s in options[index] if s.name == part)
                for index, part in zip((site.attention, site.ffn), wanted)
            )
        )
    return choice
