"""The native selective scan against its definition in float64, forward and backward, on every level."""

import pytest
import torch

from intarsia.ops.native.selective import selective_scan, selective_step
from intarsia.ops.reference import selective_reference
from native_levels import BOUND, check, distance, documents, level  # noqa: F401

DTYPES = list(BOUND)


@pytest.fixture(autouse=True)
def seeded(level):  # noqa: F811
    torch.manual_seed(0)


def draw(length, dtype=torch.float32, batch=2, channels=70, width=16, step=0.3, decay=4.0, skip=True, state=True):
    return {
        "x": torch.randn(batch, length, channels).to(dtype),
        "dt": step * torch.rand(batch, length, channels),
        "A": -decay * (0.1 + torch.rand(channels, width)),
        "B": torch.randn(batch, length, width).to(dtype),
        "C": torch.randn(batch, length, width).to(dtype),
        "D": torch.randn(channels) if skip else None,
        "state": torch.randn(batch, channels, width) if state else None,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 70])
@pytest.mark.parametrize("cut", [False, True])
def test_scan(length, cut, dtype):
    segments = None
    if cut:
        row = documents(*[1, 2, 1, 20, 3, 8, 30][: length // 2], 99)[:length]
        segments = torch.stack([row, torch.zeros_like(row)])
    check(selective_scan, selective_reference, draw(length, dtype), BOUND[dtype], segments=segments)


@pytest.mark.parametrize("channels, width", [(1, 1), (5, 3), (64, 16), (130, 7), (16, 64)])
def test_scan_of_other_sizes_without_skip_and_state(channels, width):
    inputs = draw(37, channels=channels, width=width, skip=False, state=False)
    check(selective_scan, selective_reference, inputs, 1e-5)


@pytest.mark.parametrize("step", [0.0, 1e-6, 1e3])
@pytest.mark.parametrize("decay", [1e-6, 4.0])
def test_adversarial_steps_and_decays(step, decay):
    segments = documents(7, 20, 6).expand(2, -1)
    check(selective_scan, selective_reference, draw(33, step=step, decay=decay), 1e-5, segments=segments)


def test_scan_reads_views_and_leaves_the_state_it_was_given():
    inputs = draw(40)
    wide = torch.randn(2, 80, 100)
    inputs["x"], inputs["B"] = wide[:, ::2, 3:73], wide[:, 40:, 80:96]
    before = inputs["state"].clone()
    y, last = selective_scan(**inputs)
    wanted, wanted_last = selective_reference(**inputs)
    assert distance(y, wanted) < 1e-5 and distance(last, wanted_last) < 1e-5
    assert torch.equal(inputs["state"], before) and last.shape == before.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 16, 40])
def test_step(width, dtype):
    inputs = draw(9, dtype, width=width)
    wanted, last = selective_reference(**{k: v.double() for k, v in inputs.items()})
    x, dt, A, B, C, D, state = inputs.values()
    held = state.mT.contiguous().mT  # not contiguous: it is written all the same
    y = torch.stack([selective_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, held) for t in range(9)], 1)
    assert distance(y, wanted) < BOUND[dtype] and distance(held, last) < 1e-5
