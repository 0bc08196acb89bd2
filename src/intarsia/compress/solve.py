"""The search: choose one option at every site, within budgets, so that the summed score is least (Puzzle, App. B).

A *site* is a list of `Option`s of which exactly one is chosen; costs and scores add up over sites. `solve` is exact
(a binary program through HiGHS); `baselines` holds what it is compared with, `targets` the words of the user.
Scores are losses: lower is better; an option whose score is not finite is forbidden.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack, vstack

from intarsia.base.errors import IntarsiaError

# A budget counts as met up to this relative excess: the rounding of sums of floats, nothing more.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Option:
    """One thing that may stand at a site. `costs` are additive; every option of a problem names the same ones.

    `ties`: group -> value. All options of a choice that name a value for a group name the same one.
    """

    name: str
    score: float
    costs: Mapping[str, float]
    ties: Mapping[str, str] = field(default_factory=dict)


Sites = Sequence[Sequence[Option]]


@dataclass(frozen=True)
class Bound:
    """`sum over costs of weights[cost] * total[cost] <= limit`, where the totals are those of the whole model.

    `counts`: of things that are there or not, so that a baseline cannot share it out over the sites in parts.
    """

    name: str
    weights: Mapping[str, float]
    limit: float
    counts: bool = False

    def value(self, costs: Mapping[str, float]) -> float:
        return math.fsum(weight * costs.get(name, 0.0) for name, weight in self.weights.items())

    def met(self, costs: Mapping[str, float]) -> bool:
        return self.value(costs) <= self.limit + TOLERANCE * abs(self.limit)


@dataclass(frozen=True)
class Solution:
    """A choice with what it costs. `slack` is limit minus value for each bound.

    `gap` is the score minus a proven lower bound of it, in units of the score (NaN where nothing was proven);
    `optimal` says that the solver closed it.
    """

    choice: tuple[int, ...]
    names: tuple[str, ...]
    score: float
    costs: dict[str, float]
    slack: dict[str, float] = field(default_factory=dict)
    optimal: bool = False
    gap: float = math.nan


class Infeasible(IntarsiaError):
    """No choice meets the bounds. `targets.explain_infeasible` says what would be possible."""


def total_costs(sites: Sites, choice: Sequence[int], fixed: Mapping[str, float] | None = None) -> dict[str, float]:
    """Whole-model totals of every cost of a choice, `fixed` (embedding, head, norm) included."""
    chosen = [site[index].costs for site, index in zip(sites, choice, strict=True)]
    fixed = fixed or {}
    names = dict.fromkeys([*fixed, *(name for costs in chosen for name in costs)])
    return {n: math.fsum([fixed.get(n, 0.0), *(costs.get(n, 0.0) for costs in chosen)]) for n in names}


def untied(sites: Sites, choice: Sequence[int]) -> list[str]:
    """The groups of which a choice names more than one value."""
    values: dict[str, set[str]] = {}
    for site, index in zip(sites, choice, strict=True):
        for group, value in site[index].ties.items():
            values.setdefault(group, set()).add(value)
    return [group for group, found in values.items() if len(found) > 1]


def describe(sites: Sites, choice: Sequence[int], bounds: Sequence[Bound], fixed: Mapping[str, float] | None = None,
             **proof) -> Solution:
    """The `Solution` of a choice, every sum taken exactly and not from the solver."""
    chosen = [site[index] for site, index in zip(sites, choice, strict=True)]
    costs = total_costs(sites, choice, fixed)
    slack = {b.name: b.limit - b.value(costs) for b in bounds}
    score = math.fsum(o.score for o in chosen)
    return Solution(tuple(map(int, choice)), tuple(o.name for o in chosen), score, costs, slack, **proof)


def solve(
    sites: Sites,
    bounds: Sequence[Bound],
    *,
    fixed: Mapping[str, float] | None = None,
    num_solutions: int = 1,
    min_difference: int = 1,
    time_limit: float = 60.0,
) -> list[Solution]:
    """The best choice, then further ones which differ from all before them in at least `min_difference` sites.

    Returns fewer than `num_solutions` when no more exist. `time_limit` is in seconds for each solution; one that
    runs into it comes back with `optimal=False` and its gap. Raises `Infeasible` when no choice meets the bounds.
    The same input gives the same output: HiGHS is deterministic, and of equal options of a site the first is taken.
    """
    if num_solutions < 1 or not 1 <= min_difference <= max(1, len(sites)):
        raise IntarsiaError(
            f"{num_solutions} solutions that differ in {min_difference} of {len(sites)} sites are not possible: "
            f"ask for at least one solution, and for a difference of 1 to {len(sites)} sites."
        )
    table = Table(sites, bounds, fixed or {})
    solutions: list[Solution] = []
    cuts: list[_Cut] = []
    for _ in range(num_solutions):
        found = _checked_optimum(table, cuts, time.monotonic() + time_limit)
        if found is None:
            break
        solutions.append(found)
        cuts.append(_Cut(found.choice, min_difference))
    if not solutions:
        raise Infeasible(f"no choice of options meets {' and '.join(b.name for b in bounds)} together.")
    return solutions


@dataclass(frozen=True)
class _Cut:
    """Solutions must differ from `choice` in at least `distance` sites (Hamming)."""

    choice: tuple[int, ...]
    distance: int


def _checked_optimum(table: Table, cuts: list[_Cut], deadline: float) -> Solution | None:
    """Minimise, then check every bound on exact sums.

    The solver's own feasibility tolerance is coarser than ours. A choice that slips through it is cut off, alone,
    and the solver runs again; that this happens more than a few times means broken numbers.
    """
    cuts = list(cuts)
    for _ in range(20):
        found = _minimise(table, cuts, deadline)
        if found is None:
            return None
        choice, bound, optimal = found
        solution = describe(table.sites, choice, table.bounds, table.fixed)
        broken = [b.name for b in table.bounds if not b.met(solution.costs)] + untied(table.sites, choice)
        if not broken:
            return dataclasses.replace(solution, optimal=optimal, gap=max(0.0, solution.score - bound))
        cuts.append(_Cut(solution.choice, 1))
    raise IntarsiaError(f"the solver's choices break {', '.join(broken)} again and again: costs too ill-scaled.")


class Table:
    """A problem as flat arrays over all options of all sites (n), one row of costs for each bound (K, n)."""

    def __init__(self, sites: Sites, bounds: Sequence[Bound], fixed: Mapping[str, float]):
        self.sites, self.bounds, self.fixed = sites, list(bounds), fixed
        _check(sites, bounds, fixed)
        options = [option for site in sites for option in site]
        self.sizes = np.array([len(site) for site in sites])
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self.site = np.repeat(np.arange(len(sites)), self.sizes)
        self.score = np.array([option.score for option in options], dtype=float)
        self.cost = np.array([[b.value(o.costs) for o in options] for b in bounds]).reshape(len(bounds), len(options))
        self.room = np.array([b.limit + TOLERANCE * abs(b.limit) - b.value(fixed) for b in bounds])
        self.ties = [tuple(option.ties.items()) for option in options]

    def site_minimum(self, values: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """(..., n) -> (..., sites): the least value among the allowed options of a site (inf: none)."""
        return np.minimum.reduceat(np.where(allowed, values, np.inf), self.starts, axis=-1)

    def tie_rows(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ties as rows over the options `columns` (n) and one more binary for each value of each group (m), which
        allows it: (rows, n + m), and what each row is at most. A group allows one value; a site takes only what is
        allowed."""
        values = list(dict.fromkeys(tie for column in columns for tie in self.ties[column]))
        groups = list(dict.fromkeys(group for group, _ in values))
        places: dict[tuple, int] = {}
        entries = [(groups.index(group), len(columns) + n, 1.0) for n, (group, _) in enumerate(values)]
        for place, column in enumerate(columns):
            for tie in self.ties[column]:
                row = places.setdefault((self.site[column], tie), len(groups) + len(places))
                entries.append((row, place, 1.0))
        entries += [(row, len(columns) + values.index(tie), -1.0) for (_, tie), row in places.items()]
        rows = np.zeros((len(groups) + len(places), len(columns) + len(values)))
        for row, column, entry in entries:
            rows[row, column] = entry
        return rows, np.r_[np.ones(len(groups)), np.zeros(len(places))]


def _check(sites: Sites, bounds: Sequence[Bound], fixed: Mapping[str, float]) -> None:
    if not sites:
        raise IntarsiaError("there is nothing to choose: the search needs at least one site with at least one option.")
    needed = {name for b in bounds for name in b.weights}
    for index, site in enumerate(sites):
        if not any(math.isfinite(option.score) for option in site):
            raise IntarsiaError(f"site {index} has no option with a finite score, so nothing can stand there.")
        for option in site:
            if missing := needed - set(option.costs):
                raise IntarsiaError(f"option {option.name!r} of site {index} has no cost {sorted(missing)}.")
            if not all(math.isfinite(cost) for cost in option.costs.values()):
                raise IntarsiaError(f"option {option.name!r} of site {index} has a cost that is not finite.")
    if not all(map(math.isfinite, [*fixed.values(), *(b.limit for b in bounds)])):
        raise IntarsiaError("a limit or a fixed cost is not a finite number.")
    if len({b.name for b in bounds}) < len(bounds):
        raise IntarsiaError("two bounds have the same name.")


def _minimise(table: Table, cuts: list[_Cut], deadline: float) -> tuple[np.ndarray, float, bool] | None:
    """(option per site, lower bound of the score, proven optimal), or None where nothing is feasible.

    With each site's best score taken off, all scores are >= 0, so an optimum of value v holds no option above v.
    Hence outliers are left out first and let in only while the value found, or infeasibility, says that they may
    matter; and the scores that the solver sees are in a unit no larger than the value it finds, because its
    tolerances are absolute. A score of a million nats meets the solver only if the answer needs it.
    """
    reduced = _reduce(table, cuts)
    if reduced is None:
        return None
    keep, cost, room = reduced
    best = table.site_minimum(table.score, keep)
    excess = table.score - best[table.site]
    positive = keep & (excess > 0)
    smallest = table.site_minimum(excess, positive)
    highest = float(excess[positive].max(initial=0.0))
    usual = float(np.median(smallest[np.isfinite(smallest)])) if highest else 1.0
    ceiling = 1e3 * usual
    while True:
        within = keep & (excess <= ceiling)
        unit = float(np.median(excess[within & positive])) if (within & positive).any() else 1.0
        found = _milp(table, within, excess / unit, cost, room, cuts, deadline)
        if found is None and ceiling >= highest:
            return None
        if found is None:
            ceiling *= 1e3
            continue
        flat, bound, optimal = found
        value = float(excess[flat].sum())
        if value == 0 or not optimal or (unit <= value and min(value, highest) <= ceiling):
            # Left-out options cost more than the ceiling each, so the ceiling too bounds what was not searched.
            lower = bound * unit if ceiling >= highest else min(bound * unit, ceiling)
            outlier = excess > 1e6 * usual
            if outlier[flat].any():  # The outliers are settled; now the rest at its own scale, at no more outliers.
                rest = np.where(outlier, 0.0, excess / usual)
                cost = np.vstack([cost, np.where(outlier, excess, 0.0)])
                room = np.append(room, cost[-1, flat].sum() * (1 + TOLERANCE))
                finer = _milp(table, within, rest, cost, room, cuts, deadline)
                flat = finer[0] if finer and excess[finer[0]].sum() <= value else flat
            return flat - table.starts, lower + math.fsum(best), optimal
        ceiling = value


def _reduce(table: Table, cuts: list[_Cut]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Drop options that no optimum needs; take each site's least cost off the budgets.

    Returns (keep (n,) bool, cost (K, n) above the site's least, room (K,) left), or None when infeasible.
    """
    keep = np.isfinite(table.score)
    while True:
        least = table.site_minimum(table.cost, keep)
        if not np.isfinite(least).all():
            return None
        cost = table.cost - least[:, table.site]
        room = table.room - least.sum(axis=1)
        if (room < 0).any():
            return None
        fits = keep & (cost <= room[:, None]).all(axis=0)
        if (fits == keep).all():
            break
        keep = fits
    # An option may yield to a better one, unless that one stands in an earlier solution: being different counts too.
    used = np.zeros(len(keep), dtype=bool)
    for cut in cuts:
        used[table.starts + np.array(cut.choice)] = True
    values = np.vstack([table.score, table.cost])
    for start, size in zip(table.starts, table.sizes):
        span = start + np.flatnonzero(keep[start : start + size])
        keep[span[_dominated(values[:, span], ~used[span], [set(table.ties[n]) for n in span])]] = False
    return keep, cost, room


def _dominated(values: np.ndarray, may_dominate: np.ndarray, ties: list[set]) -> np.ndarray:
    """(rows, n) -> (n,) bool: another column is nowhere larger and ties nothing else; of equal columns only the first
    is kept."""
    no_worse = (values[:, :, None] <= values[:, None, :]).all(axis=0)  # [a, b]: a is no worse than b
    if any(ties):
        no_worse &= np.array([[a <= b for b in ties] for a in ties])
    equal = no_worse & no_worse.T
    first = np.arange(values.shape[1])
    beats = no_worse & (~equal | (first[:, None] < first[None, :]))
    return (beats & may_dominate[:, None]).any(axis=0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what HiGHS prints from C (left-over debug lines of some versions) off the user's standard output."""
    try:
        sys.stdout.flush()
        libc, kept, sink = ctypes.CDLL(None), os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except (OSError, TypeError):  # no standard output, or no C library to flush by name: then the lines may show
        yield
        return
    try:
        libc.fflush(None)
        os.dup2(sink, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(sink)


def _milp(table: Table, keep: np.ndarray, score: np.ndarray, cost: np.ndarray, room: np.ndarray,
          cuts: list[_Cut], deadline: float) -> tuple[np.ndarray, float, bool] | None:
    """Hand the reduced problem to HiGHS: (flat index of the option per site, lower bound, proven) or None."""
    columns = np.flatnonzero(keep)
    if np.unique(table.site[columns]).size < len(table.sizes):
        return None
    tied, most = table.tie_rows(columns)
    more = tied.shape[1] - len(columns)  # binaries that only say which value a group has
    ones = csr_array((np.ones(len(columns)), (table.site[columns], np.arange(len(columns)))))
    rows, lower, upper = [ones], [np.ones(len(table.sizes))], [np.ones(len(table.sizes))]
    # Budgets are scaled to 1000, so that the solver's absolute tolerance of 1e-6 is 1e-9 of a budget.
    scale = 1000 / np.where(room > 0, room, 1.0)
    rows.append(csr_array(cost[:, columns] * scale[:, None]))
    upper.append(room * scale)
    for cut in cuts:
        chosen = np.isin(columns, table.starts + np.array(cut.choice))
        rows.append(csr_array(chosen[None, :].astype(float)))
        upper.append(np.array([float(len(table.sizes) - cut.distance)]))
    rows = [hstack([row, csr_array((row.shape[0], more))]) for row in rows] + [csr_array(tied)]
    upper = np.concatenate([*upper, most])
    lower = np.concatenate([*lower, np.full(len(upper) - len(table.sizes), -np.inf)])
    with _quiet():
        result = milp(
            np.r_[score[columns], np.zeros(more)],
            integrality=np.ones(tied.shape[1]),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(vstack(rows).tocsr(), lower, upper),
            options={"time_limit": max(0.1, deadline - time.monotonic()), "mip_rel_gap": 0.0},
        )
    if result.x is None and "infeasible" in result.message:
        return None
    if result.x is None:
        raise IntarsiaError(
            f"the solver found no choice in the time given ({result.message.strip()}). Give it a longer time limit."
        )
    # Within a site the columns are sorted, so the last one that wins a stable sort is the one near 1.
    order = np.lexsort((result.x[: len(columns)], table.site[columns]))
    last = np.searchsorted(table.site[columns][order], np.arange(len(table.sizes)), side="right") - 1
    bound = result.mip_dual_bound if result.mip_dual_bound is not None else -math.inf
    return columns[order[last]], float(bound), result.status == 0
