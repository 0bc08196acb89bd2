"""Which implementation runs, and that the choice is said."""

from types import SimpleNamespace

import pytest
import torch

from intarsia.base.errors import IntarsiaError
from intarsia.ops import backends
from intarsia.ops.gated_norm import gated_norm

ARGUMENTS = (torch.randn(3, 8), torch.randn(3, 8), torch.ones(8), 2, 1e-5)


@pytest.fixture
def native(monkeypatch):
    """A native backend that has one op and takes no float64."""
    module = SimpleNamespace(
        OPS={"gated_norm": lambda y, *rest: torch.full_like(y, 7)},
        refuses=lambda op, tensor, training: "no float64" if tensor.dtype == torch.float64 else "",
    )
    monkeypatch.delenv("INTARSIA_OPS", raising=False)
    monkeypatch.setattr(backends, "_load", lambda name: (module, "") if name == "native" else (None, "not built"))
    monkeypatch.setattr(backends, "_picked", {})
    return module


def test_a_backend_runs_what_it_has_and_torch_the_rest(native):
    assert (gated_norm(*ARGUMENTS) == 7).all()
    said = backends.describe()
    assert set(said) == set(backends.OPS)
    assert said["gated_norm"][0] == "native" and said["ssd"] == ("torch", "native does not have it")


def test_a_refused_call_runs_in_torch(native):
    y, z, weight, *rest = ARGUMENTS
    assert not (gated_norm(y.double(), z.double(), weight.double(), *rest) == 7).any()
    assert backends.choose("gated_norm", y.double()) == "torch"


def test_a_choice_is_made_once_for_a_device_a_dtype_and_a_size(native):
    asked = []
    native.refuses = lambda op, tensor, training: asked.append(len(tensor)) or ("few" if len(tensor) <= 8 else "")
    assert all((gated_norm(torch.ones(n, 8), *ARGUMENTS[1:]) == 7).all() for n in (9, 16, 12)) and asked == [9]
    gated_norm(torch.ones(8, 8), torch.ones(8, 8), *ARGUMENTS[2:])
    assert asked == [9, 8]


def test_the_environment_forces_torch(native, monkeypatch):
    monkeypatch.setenv("INTARSIA_OPS", "torch")
    assert backends.choose("gated_norm", ARGUMENTS[0]) == "torch"
    assert not (gated_norm(*ARGUMENTS) == 7).any()


def test_a_forced_backend_that_is_not_there_is_an_error(native, monkeypatch):
    monkeypatch.setenv("INTARSIA_OPS", "triton")
    with pytest.raises(IntarsiaError, match=r"INTARSIA_OPS=triton, but .* not built"):
        gated_norm(*ARGUMENTS)


def test_an_unknown_name_is_an_error(monkeypatch):
    monkeypatch.setenv("INTARSIA_OPS", "cuda")
    with pytest.raises(IntarsiaError, match="'cuda'; possible: torch, native, triton"):
        gated_norm(*ARGUMENTS)


def test_without_backends_everything_is_torch(monkeypatch):
    monkeypatch.delenv("INTARSIA_OPS", raising=False)
    monkeypatch.setattr(backends, "_load", lambda name: (None, "not built"))
    assert all(name == "torch" and "not built" in why for name, why in backends.describe().values())
