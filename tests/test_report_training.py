"""The picture of trainings: every point where it belongs, through the command line, from the files of a run alone."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from intarsia import cli
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import append_jsonl
from intarsia.base.runfolder import losses
from intarsia.report.training import BOTTOM, LEFT, POINTS, RIGHT, TOP, curves, draw
from tiny_training import shared_recipe, undisturbed

SVG = "{http://www.w3.org/2000/svg}"


def rows(steps: int, slope: float = 1.0) -> list[dict]:
    draw = np.random.default_rng(steps)
    return [{"step": n, "tokens": 512 * (n + 1), "loss": 9 - slope * math.log10(n + 1) + draw.normal(0, 0.1)}
            for n in range(steps)]  # fmt: skip


def drawn(svg: str) -> dict[str, list[np.ndarray]]:
    """The points of all curves, by class."""
    found: dict[str, list[np.ndarray]] = {}
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        points = [list(map(float, pair.split())) for pair in re.split("[ML]", path.get("d"))[1:]]
        found.setdefault(path.get("class"), []).append(np.array(points))
    return found


@pytest.mark.parametrize("steps", [1, 2, 50, 3000])
def test_every_curve_falls_as_its_losses_do(steps):
    given = {"short": rows(steps), "other": rows(max(1, steps // 2), 0.5)}
    paths = drawn(curves(given))
    assert len(paths["curve"]) == len(paths["curve raw"]) == 2
    for name, mean in zip(given, paths["curve"]):
        assert len(mean) <= POINTS and (np.diff(mean[:, 0]) >= 0).all()
        assert mean[0, 0] >= LEFT and mean[-1, 0] <= RIGHT + 0.1 and mean[:, 1].min() >= TOP - 0.1
        assert mean[:, 1].max() <= BOTTOM + 0.1
        width = max(1, round(0.08 * len(given[name])))
        assert f"{name} {np.mean([row['loss'] for row in given[name]][-width:]):.2f}" in curves(given)
    if steps == 3000:  # a logarithm of tokens is a straight line here
        mean = paths["curve"][0][100:]
        line = np.polyval(np.polyfit(mean[:, 0], mean[:, 1], 1), mean[:, 0])
        assert abs(line - mean[:, 1]).max() < 0.05 * np.ptp(mean[:, 1])


def test_steps_that_were_left_out_are_not_drawn():
    some = rows(20)
    some[7] |= {"loss": None}
    some[9] |= {"loss": math.nan}
    assert len(drawn(curves({"run": some}))["curve raw"][0]) == 18


def test_a_step_done_again_counts_as_it_came_out_last(tmp_path):
    for step, loss in ((0, 5.0), (1, 4.0), (1, 3.5), (2, 3.0)):
        append_jsonl(tmp_path / "metrics.jsonl", {"step": step, "tokens": 100 * step + 100, "loss": loss})
    append_jsonl(tmp_path / "metrics.jsonl", {"step": 2, "tokens": 300, "bits_per_byte": {"all": 2.0}})
    assert [row["loss"] for row in losses(tmp_path)] == [5.0, 3.5, 3.0]
    assert draw([tmp_path]) == tmp_path / "curve.svg"


def test_training_leaves_its_curve_and_several_are_drawn_together(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", str(shared_recipe()), "--out", str(out), "--set", "seed=1"]) == 0
    assert f"curve:   {out / 'curve.svg'}" in capsys.readouterr().out
    assert len(drawn((out / "curve.svg").read_text())["curve"]) == 1
    both = tmp_path / "both.svg"
    assert cli.main(["report", str(out), str(undisturbed()), "--out", str(both)]) == 0
    assert len(drawn(both.read_text())["curve"]) == 2 and "undisturbed" in both.read_text()


def test_what_is_no_training_is_a_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(IntarsiaError, match="empty holds no losses: give the run folder of an `intarsia train`"):
        draw([tmp_path / "empty"])
    assert cli.main(["report", str(tmp_path / "empty"), str(undisturbed())]) != 0
    assert "several runs, or a file to draw to, are for trainings" in capsys.readouterr().err
