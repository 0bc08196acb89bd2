"""From options, scores and costs to the search's sites, and from its answer back to options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from intarsia.arch import Architecture, block_parameters, parameters
from intarsia.compress.assemble import Choice
from intarsia.compress.measure import PHASES, CostTable, block_costs
from intarsia.compress.options import PARENT, OptionSpec, Site
from intarsia.compress.solve import Option
from intarsia.compress.targets import Problem
from intarsia.engine.scenario import Scenario

Options = dict[int, list[OptionSpec]]
ABSENT = [OptionSpec(PARENT, None, PARENT)]  # stands for a slot that the parent does not have


def pair_name(attention: str, ffn: str) -> str:
    return f"{attention} | {ffn}"


def make_problem(
    arch: Architecture, sites: Sequence[Site], options: Options, table: CostTable, scenario: Scenario, size: int,
    scores: Mapping[tuple[int, str, str], float] | None = None,
) -> Problem:
    """Sites of the search: a layer each, its options the compositions of its two slots; the parent's own comes first.

    Without `scores` all are zero, which is enough to ask what can be reached. `size` is bytes of one weight.
    """
    problem_sites = []
    for site in sites:
        pairs = []
        for a in options.get(site.attention, ABSENT):
            for f in options.get(site.ffn, ABSENT):
                one, two = (block_costs(table, s.block, arch, scenario, size) for s in (a, f))
                costs = {name: one[name] + two[name] for name in one}
                score = 0.0 if scores is None or a.name == f.name == PARENT else scores[site.layer, a.name, f.name]
                pairs.append(Option(pair_name(a.name, f.name), score, costs))
        problem_sites.append(pairs)
    rest = parameters(arch) - sum(block_parameters(b, arch.hidden_size) for b in arch.blocks)
    fixed = {p: table.fixed[p] for p in PHASES} | {"weight_bytes": rest * size, "cache_bytes": 0.0, "params": rest}
    return Problem(problem_sites, fixed, tokens=scenario.batch * scenario.length)


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
