"""Controls at the child's measured speed: budgets corrected by what was timed."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compress_toys import ALL, all_options, sites, toy
from intarsia.base.runfolder import RunFolder
from intarsia.compress import matching
from intarsia.compress.matching import matched, names, nearest, stand_in
from intarsia.compress.solve import Infeasible

CHILD = [(None, SimpleNamespace(name="child"))]


class Stub:
    """A machine on which a choice takes what its one site says, times what its kind is mispredicted by."""

    wrong = 1.0
    timed = 0

    def __init__(self, *_):
        pass

    def turns(self, models, repeats, advance):
        Stub.timed += 1
        return {
            name: np.full((repeats, 2), seconds * (1.0 if name == "child" else self.wrong) / 2)
            for name, seconds in models.items()
        }


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr(matching, "Timer", Stub)
    monkeypatch.setattr(
        matching, "stand_in", lambda job, choice: 1.0 if choice is CHILD else float(choice[0][1].name)
    )
    Stub.timed = 0
    run = RunFolder(tmp_path / "run")
    return SimpleNamespace(
        run=run, stage=lambda name, *parts: run.stage(name, str(parts)), targets=[], model=None, scenario=None,
        sites=[], library_print=lambda: "library", recipe=SimpleNamespace(search=SimpleNamespace(rounds=3, repeats=2)),
    )  # fmt: skip


def chooser(step: float):
    """The slowest choice within a budget of `pace` seconds, where choices come in steps."""

    def choose(pace: float):
        seconds = math.floor(pace / step + 1e-9) * step
        if seconds <= 0.5:
            raise Infeasible("nothing is that fast.")
        return [(None, SimpleNamespace(name=repr(seconds)))], f"{seconds:.3f}"

    return choose


@pytest.mark.parametrize("wrong", [0.9, 1.0, 1.12])
def test_a_mispredicted_control_comes_out_at_the_childs_speed(job, monkeypatch, wrong):
    monkeypatch.setattr(Stub, "wrong", wrong)
    choice, words = matched(job, "depth", chooser(1e-4), 1.0, CHILD)
    assert float(choice[0][1].name) * wrong == pytest.approx(1.0, rel=matching.NEAR)
    assert words == f"{float(choice[0][1].name):.3f}"
    # A second call reads what was found: nothing is timed again, and the choice is the same.
    before = Stub.timed
    again, _ = matched(job, "depth", chooser(1e-4), 1.0, CHILD)
    assert Stub.timed == before and names(again) == names(choice)


def test_choices_in_steps_end_at_the_nearest(job, monkeypatch):
    monkeypatch.setattr(Stub, "wrong", 0.9)
    choice, _ = matched(job, "depth", chooser(0.15), 1.0, CHILD)
    assert float(choice[0][1].name) == pytest.approx(1.05)  # 0.945 s; a step less takes 0.81 s, one more 1.08 s
    assert Stub.timed <= 3


def test_a_control_that_cannot_be_is_left_out(job, monkeypatch):
    with pytest.raises(Infeasible):
        matched(job, "depth", chooser(0.1), 0.4, CHILD)
    monkeypatch.setattr(Stub, "wrong", 2.5)  # far too slow, and the budget that would mend it is out of reach
    choice, _ = matched(job, "greedy", chooser(1e-4), 1.0, CHILD)
    assert float(choice[0][1].name) == pytest.approx(1.0)


def test_nearest_counts_faster_and_slower_alike():
    assert nearest([{"speed": 1.06}, {"speed": 0.95}, {"speed": 1.05}])["speed"] == 1.05


def test_a_stand_in_has_the_shapes_of_the_choice_and_leaves_the_parent_alone():
    model = toy(ALL["plain"])
    where, options = sites(model), all_options(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    choice = [(options[s.attention][-1 - n], options[s.ffn][1 + n]) for n, s in enumerate(where)]
    stand = stand_in(SimpleNamespace(sites=where, model=model), choice)
    wanted = [spec.block for pair in choice for spec in pair if spec.block is not None]
    assert [block.spec for block in stand.blocks] == wanted
    assert torch.isfinite(stand(torch.arange(8)[None])).all()
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
