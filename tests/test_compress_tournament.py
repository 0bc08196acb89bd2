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
    if 2 < count < 5:  # no other name in the last place is further from those before it
        assert apart(names) == max(apart([*names[:-1], name]) for name in FOUND if name not in names[:-1])


def test_the_one_without_whole_layers_plays_however_far_it_is_before_it_is_mended():
    found = FOUND | {"whole layers": solution(1, 1, 1, 2)}
    assert finalists(found, 3) == ["spread", "as scored", "whole layers"]
    assert finalists(found, 2) == ["spread", "as scored"]
    assert finalists({"whole layers": found["whole layers"], **FOUND}, 2) == ["whole layers", "as scored"]
