"""What the search is compared with: brute force (exact, tiny cases), greedy, and random choices (Puzzle F.2)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.optimize import minimize

from intarsia.base.errors import IntarsiaError
from intarsia.compress.solve import Bound, Infeasible, Sites, Solution, Table, describe, solve, total_costs, untied


def brute_force(sites: Sites, bounds: Sequence[Bound], *, fixed: Mapping[str, float] | None = None,
                differ_from: Sequence[Sequence[int]] = (), min_difference: int = 1) -> Solution:
    """Try every choice: the reference that `solve` is tested against. Raises `Infeasible`."""
    count = math.prod(len(site) for site in sites)
    if count > 200_000:
        raise IntarsiaError(f"{count} choices are too many to try one by one: use solve.")
    best = None
    for choice in itertools.product(*(range(len(site)) for site in sites)):
        score = math.fsum(site[index].score for site, index in zip(sites, choice))
        if not math.isfinite(score) or (best and score >= best[0]):
            continue
        if any(sum(a != b for a, b in zip(choice, other)) < min_difference for other in differ_from):
            continue
        costs = total_costs(sites, choice, fixed)
        if all(b.met(costs) for b in bounds) and not untied(sites, choice):
            best = (score, choice)
    if best is None:
        raise Infeasible("none of the choices meets the bounds.")
    return describe(sites, best[1], bounds, fixed, optimal=True, gap=0.0)


def greedy(sites: Sites, bounds: Sequence[Bound], *, fixed: Mapping[str, float] | None = None) -> Solution:
    """The greedy baseline of Puzzle F.2: a control, not a search.

    Every budget, less the least that the sites can cost, is split equally; sites are taken from the easiest (lowest
    mean score) on; each takes its best option within its share and hands what is left to the next. What a bound counts
    is not split: it goes to those who come first. Where options are tied, it is the best over all values of the ties.
    Raises `Infeasible` when that ends above a bound, which with one bound happens only if nothing meets it.
    """
    table, found, broken = Table(sites, bounds, fixed or {}), [], set()
    for allowed in _agreeing(table):
        solution = describe(sites, _greedy(table, allowed), bounds, fixed)
        over = [b.name for b in bounds if not b.met(solution.costs)]
        broken |= set(over)
        found += [] if over else [solution]
    if not found:
        raise Infeasible(f"the greedy choice ends above its budget of {' and '.join(sorted(broken)) or 'ties'}.")
    return min(found, key=lambda solution: solution.score)


def _agreeing(table: Table) -> Iterator[np.ndarray]:
    """(n,) masks: of every value for every group of ties, the options that name no other; where every site has one."""
    finite, groups = np.isfinite(table.score), _groups(table)
    if math.prod(map(len, groups.values())) > 10_000:
        raise Infeasible("there are too many ways to make layers alike for a greedy choice.")
    for values in itertools.product(*groups.values()):
        named = dict(zip(groups, values))
        allowed = finite & np.array([all(named[group] == value for group, value in ties) for ties in table.ties])
        if np.logical_or.reduceat(allowed, table.starts).all():
            yield allowed


def _groups(table: Table) -> dict[str, dict[str, None]]:
    """The values of every group of ties, in order."""
    groups: dict[str, dict[str, None]] = {}
    for group, value in itertools.chain.from_iterable(table.ties):
        groups.setdefault(group, {})[value] = None
    return groups


def _greedy(table: Table, finite: np.ndarray) -> np.ndarray:
    """(sites,) the options of one pass over those that are allowed."""
    sites, bounds = table.sites, table.bounds
    least = table.site_minimum(table.cost, finite)
    cost, room = table.cost - least[:, table.site], table.room - least.sum(axis=1)
    means = [table.score[start : start + size][finite[start : start + size]].mean()
             for start, size in zip(table.starts, table.sizes)]  # fmt: skip
    choice, spent = np.zeros(len(sites), dtype=int), np.zeros(len(bounds))
    counts = np.array([b.counts for b in bounds], dtype=bool)
    for turn, index in enumerate(np.argsort(means, kind="stable")):
        span = slice(table.starts[index], table.starts[index] + table.sizes[index])
        share = room * np.where(counts, 1.0, (turn + 1) / len(sites)) - spent
        over = np.maximum(0.0, (cost[:, span] - share[:, None]) / np.maximum(abs(room), 1e-300)[:, None])
        over = np.where(finite[span], over.max(axis=0, initial=0.0), np.inf)
        # Within the share the score decides; where nothing is, the least overshoot does.
        choice[index] = np.lexsort((table.score[span], over))[0]
        spent += cost[:, table.starts[index] + choice[index]]
    return choice


def random_choice(
    sites: Sites,
    bounds: Sequence[Bound],
    seed: int,
    *,
    fixed: Mapping[str, float] | None = None,
    tolerance: float = 0.02,
    draws: int = 20_000,
) -> Solution:
    """A random choice from the library that meets all bounds and comes close to the first (the time).

    Options are drawn independently with probability proportional to exp(-rate * cost), the rates set so that the
    expected total is the budget: given its total cost, every choice is then equally likely. The first draw whose first
    bound lies within `tolerance` (relative) below its limit is taken; without one, the closest draw below. Where no
    draw meets all bounds (few choices do), or layers must be alike, it is the optimum of random scores. Scores play no
    part.
    """
    rng = np.random.default_rng(seed)
    table = Table(sites, bounds, fixed or {})
    finite = np.isfinite(table.score)
    least = table.site_minimum(table.cost, finite)
    cost, room = table.cost - least[:, table.site], table.room - least.sum(axis=1)
    margin = tolerance * abs(bounds[0].limit) if bounds else 0.0
    best, closest = None, math.inf
    apart = all(len(values) == 1 for values in _groups(table).values())
    probability = _tilted(table, finite, cost, room, margin) if apart and (room >= 0).all() else None
    for _ in range(draws // 1000 if probability is not None else 0):
        spans = zip(table.starts, table.sizes)
        drawn = np.stack([rng.choice(n, 1000, p=probability[s : s + n]) for s, n in spans], axis=1)
        left = room[:, None] - cost[:, drawn + table.starts].sum(axis=2)
        distance = np.where((left >= 0).all(axis=0), left[0] if bounds else 0.0, np.inf)
        index = int(np.argmax(distance <= margin)) if (distance <= margin).any() else int(np.argmin(distance))
        if distance[index] < closest:
            best, closest = drawn[index], distance[index]
        if closest <= margin:
            break
    if best is None:
        shuffled = [
            [dataclasses.replace(o, score=rng.random() if math.isfinite(o.score) else math.nan) for o in site]
            for site in sites
        ]
        best = solve(shuffled, bounds, fixed=fixed)[0].choice
    return describe(sites, best, bounds, fixed)


def _tilted(table: Table, finite: np.ndarray, cost: np.ndarray, room: np.ndarray, margin: float) -> np.ndarray:
    """(n,) probabilities within each site: maximum entropy with the expected costs at, or below, the budgets."""
    if not len(room):
        return finite / np.add.reduceat(finite.astype(float), table.starts)[table.site]
    target = room.copy()
    target[0] = max(room[0] - margin / 2, room[0] / 2)
    scale = np.where(room > 0, room, 1.0)

    def weights(rates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        logits = np.where(finite, -(rates / scale) @ cost, -np.inf)
        top = np.maximum.reduceat(logits, table.starts)
        raw = np.exp(logits - top[table.site])
        total = np.add.reduceat(raw, table.starts)
        return raw / total[table.site], top, total

    def dual(rates: np.ndarray) -> tuple[float, np.ndarray]:
        probability, top, total = weights(rates)
        value = float((top + np.log(total)).sum() + rates @ (target / scale))
        return value, (target - cost @ probability) / scale

    # The first rate may be negative: a loose budget is to be used up as well. The others only push down.
    limits = [(-1e4, 1e4)] + [(0.0, 1e4)] * (len(room) - 1)
    rates = minimize(dual, np.zeros(len(room)), jac=True, method="L-BFGS-B", bounds=limits).x
    return weights(rates)[0]
