"""What the tests of the native code share: every level that this processor runs, and distances."""

import pytest
import torch

from intarsia.ops import backends

MODULE, ABSENT = backends._load("native")
if MODULE is None:
    pytest.skip(f"no native library: {ABSENT}", allow_module_level=True)

from intarsia.ops.native import build, library  # noqa: E402

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def available() -> list[str]:
    """The levels that were built and that this processor runs."""
    names = list(build.LEVELS)
    reached = names[library.open_level("plain").code.intarsia_level()]
    return [level for level in names[: names.index(reached) + 1] if build.library_path(level).exists()]


@pytest.fixture(params=available())
def level(request, monkeypatch):
    """Runs the test on this level."""
    monkeypatch.setattr(library, "loaded", library.open_level(request.param))
    return request.param


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm().clamp_min(1e-30))


def documents(*lengths: int) -> torch.Tensor:
    """(L,) the number of the document that each token belongs to."""
    return torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))


def check(op, reference, inputs: dict, bound: float, **rest) -> None:
    """Outputs and the gradients of every tensor in `inputs` against the float64 reference."""
    mine = {k: None if v is None else v.clone().requires_grad_() for k, v in inputs.items()}
    exact = {k: None if v is None else v.double().requires_grad_() for k, v in inputs.items()}
    got, wanted = op(**mine, **rest), reference(**exact, **rest)
    got, wanted = (out if isinstance(out, tuple) else (out,) for out in (got, wanted))
    seeds = [torch.randn(out.shape).to(out.dtype) for out in got]
    torch.autograd.backward(got, seeds)
    torch.autograd.backward(wanted, [seed.double() for seed in seeds])
    for g, w in zip(got, wanted, strict=True):
        assert distance(g, w) < bound
    for name, tensor in mine.items():
        if tensor is not None:
            assert tensor.grad.dtype == tensor.dtype
            assert distance(tensor.grad, exact[name].grad) < bound, f"gradient of {name}"
