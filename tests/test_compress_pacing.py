"""Choices at a measured speed: budgets corrected by what was timed."""

import math
from types import SimpleNamespace

import pytest
import torch

from compress_toys import ALL, all_options, sites, toy
from intarsia.base.runfolder import RunFolder
from intarsia.compress import pacing
from intarsia.compress.options import PARENT
from intarsia.compress.pacing import Aim, nearest, pace_for, stand_in
from intarsia.compress.solve import Infeasible

UNFUSED = SimpleNamespace(most=0)
CHILD = [(None, SimpleNamespace(name="child", method="prefix", precision=""))]


class Machine:
    """One on which a choice takes what its one site says, times what its kind is mispredicted by."""

    wrong = 1.0
    timed = 0

    @classmethod
    def compare_speed(cls, models, scenario, repeats, advance):
        cls.timed += 1
        taken = {name: s * (1.0 if name == "reference" else cls.wrong) for name, s in models.items()}
        return {name: {"speedup": {"median": taken["reference"] / s}} for name, s in taken.items()}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """What `pace_for` needs of a run; a choice is one number, its seconds."""
    monkeypatch.setattr(pacing, "compare_speed", Machine.compare_speed)
    monkeypatch.setattr(pacing, "stand_in", lambda job, choice: 1.0 if choice is CHILD else float(choice[0][1].name))
    Machine.timed = 0
    run = RunFolder(tmp_path / "run")
    return SimpleNamespace(
        run=run, stage=lambda name, *parts: run.stage(name, str(parts)), targets=[], runner=lambda: 2.0, scenario=None,
        sites=[], library_print=lambda: "library",
        recipe=SimpleNamespace(search=SimpleNamespace(rounds=3, repeats=2), fusion=UNFUSED),
    )  # fmt: skip


def chooser(step: float):
    """The slowest choice within a budget of `pace` seconds, where choices come in steps."""

    def choose(pace: float):
        seconds = math.floor(pace / step + 1e-9) * step
        if seconds <= 0.5:
            raise Infeasible("nothing is that fast.")
        return [(None, SimpleNamespace(name=repr(seconds), method="prefix" if seconds < 1.9 else PARENT, precision=""))]

    return choose


def seconds(choose, pace: float) -> float:
    return float(choose(pace)[0][1].name)


@pytest.mark.parametrize("wrong", [0.9, 1.0, 1.12])
def test_a_mispredicted_control_comes_out_at_the_childs_speed(job, monkeypatch, wrong):
    monkeypatch.setattr(Machine, "wrong", wrong)
    choose = chooser(1e-4)
    pace = pace_for(job, "depth", choose, 1.0, Aim(1.0, CHILD))
    assert seconds(choose, pace) * wrong == pytest.approx(1.0, rel=0.015)
    # A second call reads what was found: nothing is timed again.
    before = Machine.timed
    assert pace_for(job, "depth", choose, 1.0, Aim(1.0, CHILD)) == pace and Machine.timed == before


@pytest.mark.parametrize("wrong", [0.9, 1.0, 1.12])
def test_the_child_comes_out_as_fast_as_asked_or_a_little_faster(job, monkeypatch, wrong):
    """The parent takes 2 s; 1.6 times as fast is 1.25 s."""
    monkeypatch.setattr(Machine, "wrong", wrong)
    choose = chooser(1e-4)
    pace = pace_for(job, "child", choose, 1.25, Aim(1.6, low=0.995, high=1.03))
    assert 1.25 / 1.03 <= seconds(choose, pace) * wrong <= 1.25 / 0.995 + 1e-3


def test_choices_in_steps_end_at_the_nearest(job, monkeypatch):
    monkeypatch.setattr(Machine, "wrong", 0.9)
    choose = chooser(0.15)
    pace = pace_for(job, "depth", choose, 1.0, Aim(1.0, CHILD))
    assert seconds(choose, pace) == pytest.approx(1.05)  # 0.945 s; a step less takes 0.81 s, one more 1.08 s
    assert Machine.timed <= 3


def test_what_cannot_be_is_infeasible_and_what_could_be_comes_closest(job, monkeypatch):
    with pytest.raises(Infeasible):
        pace_for(job, "depth", chooser(0.1), 0.4, Aim(1.0, CHILD))
    monkeypatch.setattr(Machine, "wrong", 2.5)  # far too slow, and the budget that would mend it is out of reach
    assert pace_for(job, "greedy", chooser(1e-4), 1.0, Aim(1.0, CHILD)) == 1.0


def test_a_wild_timing_does_not_end_at_the_parent_itself(job, monkeypatch):
    monkeypatch.setattr(Machine, "wrong", 0.5)  # so fast that the budget would hold the whole parent
    choose = chooser(1e-4)
    assert seconds(choose, pace_for(job, "child", choose, 1.25, Aim(1.6, low=0.995, high=1.03))) == 1.25


def test_the_nearest_is_fast_enough_where_one_is():
    rounds = [{"speed": 1.06}, {"speed": 0.96}, {"speed": 1.05}]
    assert nearest(rounds, Aim(1.0))["speed"] == 1.05
    assert nearest(rounds, Aim(1.1, low=0.9, high=1.0))["speed"] == 1.05
    assert nearest(rounds, Aim(1.3))["speed"] == 1.06
    assert nearest(rounds, Aim(0.96, low=1.0, high=1.02))["speed"] == 0.96


def test_a_stand_in_has_the_shapes_of_the_choice_and_leaves_the_parent_alone():
    model = toy(ALL["plain"])
    where, options = sites(model), all_options(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    choice = [(options[s.attention][-1 - n], options[s.ffn][1 + n]) for n, s in enumerate(where)]
    job = SimpleNamespace(
        sites=where, runner=lambda: model, table=SimpleNamespace(packed=False), recipe=SimpleNamespace(fusion=UNFUSED)
    )
    stand = stand_in(job, choice)
    wanted = [spec.block for pair in choice for spec in pair if spec.block is not None]
    assert [block.spec for block in stand.blocks] == wanted
    assert torch.isfinite(stand(torch.arange(8)[None])).all()
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
