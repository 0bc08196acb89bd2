"""Who plays in the tournament: different solutions, the best and the optimum of the scores first."""

from itertools import combinations

import pytest

from intarsia.compress.solve import Solution
from intarsia.compress.tournament import finalists


def solution(*choice: int) -> Solution:
    return Solution(choice, tuple(map(str, choice)), 0.0, {})


FOUND = {
    "spread": solution(1, 1, 1, 1), "as scored": solution(1, 1, 1, 0), "near": solution(1, 1, 0, 0),
    "far": solution(2, 2, 2, 2), "other": solution(1, 0, 0, 0),
}  # fmt: skip


def apart(names) -> int:
    return min(sum(x != y for x, y in zip(FOUND[a].choice, FOUND[b].choice)) for a, b in combinations(names, 2))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_the_best_and_the_optimum_play_and_the_others_differ_most(count):
    names = finalists(FOUND, count)
    assert names[:2] == ["spread", "as scored"][:count] and len(names) == len(set(names)) == min(count, 5)
    if count == 4:  # no other name in the last place is further from those before it
        assert apart(names) == max(apart([*names[:-1], name]) for name in FOUND if name not in names[:-1])


def test_who_differs_most_plays_if_it_is_of_the_better_half():
    assert finalists(FOUND, 3) == ["spread", "as scored", "near"]
    assert finalists({"far": FOUND["far"], **FOUND}, 3) == ["far", "as scored", "spread"]
    swapped = {name: FOUND[name] for name in ("spread", "far", "as scored", "near", "other")}
    assert finalists(swapped, 3) == ["spread", "as scored", "far"]
