"""Every native op gives the same bits, forward and backward, on any number of threads and every time."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from intarsia.arch import Rope
from intarsia.ops import rope
from intarsia.ops.native import kernels, library
from native_levels import level  # noqa: F401

NO_GRADIENT = {
    "attend", "causal_conv_step", "decode_step", "linear", "packed_linear", "paged_attention", "selective_step",
    "ssd_step",
}  # fmt: skip


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def scan(heads, groups, batch=2):
    x, b, c = draw(batch, 300, heads, 32), draw(batch, 300, groups, 16), draw(batch, 301, groups, 16)[:, 1:]
    a, d = -1 - draw(heads).float().abs(), draw(heads).float()
    return "ssd", kernels.OPS["ssd"], [x, draw(batch, 300, heads).float().abs(), a, b, c, d]


def selective():
    x, b, c = draw(2, 300, 150), draw(2, 300, 16), draw(2, 301, 16)[:, 1:]
    a, d = -1 - draw(150, 16).float().abs(), draw(150).float()
    return "selective_scan", kernels.OPS["selective_scan"], [x, draw(2, 300, 150).float().abs(), a, b, c, d]


def rotated(x):
    return kernels.OPS["rotate"](x, *(t.bfloat16() for t in rope.tables(Rope(), 64, 99, 0, 700)))


CASES = [
    ("causal_conv", kernels.OPS["causal_conv"], [draw(2, 700, 80), draw(80, 4), draw(80), draw(2, 3, 80)]),
    ("gated_norm", partial(kernels.OPS["gated_norm"], groups=2, eps=1e-5), [*draw(2, 700, 96), draw(96)]),
    ("rms_norm", partial(kernels.OPS["rms_norm"], eps=1e-5), [draw(2, 700, 96), draw(96)]),
    scan(4, 2),
    scan(12, 1, batch=1),
    selective(),
    ("silu_mul", kernels.OPS["silu_mul"], [draw(700, 96), draw(701, 96)[1:]]),
    ("relu_squared", kernels.OPS["relu_squared"], [draw(700, 96)]),
    ("rotate", rotated, [draw(1, 2, 700, 64)]),
    ("kl_rows", lambda p, q: kernels.OPS["kl_rows"](p, q.clone(), True), [draw(70, 999), draw(71, 999)[1:]]),
    ("nll_rows", lambda x: kernels.OPS["nll_rows"](x.clone(), torch.arange(70), True), [draw(70, 999)]),
]


def test_every_op_with_a_gradient_is_here():
    assert {name for name, *_ in CASES} == set(kernels.OPS) - NO_GRADIENT


def results(call, inputs):
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = call(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    seeded = [(t, draw(*t.shape).to(t.dtype)) for t in out if t.requires_grad and t.is_floating_point()]
    if seeded:
        torch.autograd.backward(*zip(*seeded))
    return [*out, *(t.grad for t in inputs if t.grad is not None)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name, call, inputs", CASES, ids=[name for name, *_ in CASES])
def test_the_same_bits(name, call, inputs, level, threads):  # noqa: F811
    found = []
    for count in (1, 2, 3, 2, 5):
        threads(count)
        found.append(results(call, inputs))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("count, columns", [(1, 5), (3, 1), (7, 2050), (300, 1024)])
def test_sums_are_those_of_the_rows_in_their_order(count, columns, level, threads):  # noqa: F811
    rows = torch.randn(count, columns)
    threads(3)
    one_by_one = torch.zeros(columns)
    for row in rows:
        one_by_one += row
    assert torch.equal(library.summed(rows), one_by_one)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted as Linux tells them")
@pytest.mark.parametrize("first, more", [("intarsia", 1), ("torch", 0)])
def test_whose_threads_run_it(first, more):
    """Where torch came first its threads spin for milliseconds, and native code takes them instead of its own."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = f"""
import os
import {first}
import torch
from intarsia.ops.native import norm
torch.set_num_threads(2)
x = torch.randn(4000, 512)
x = x + x.exp()  # from now on torch has its threads
before = len(os.listdir("/proc/self/task"))
norm.rms_norm(x, torch.ones(512), 1e-5)
print(len(os.listdir("/proc/self/task")) - before)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, timeout=60)
    assert (told.stdout.strip(), told.stderr) == (str(more), "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
@pytest.mark.parametrize("first", ["intarsia", "torch"])
def test_a_forked_process_has_threads_of_its_own(first):
    """None of its parent's are there; OpenMP would wait for them forever."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = f"""
import os
import {first}
import torch
from intarsia.ops.native import norm
torch.set_num_threads(2)
x, weight = torch.randn(4000, 512), torch.ones(512)
wanted = norm.rms_norm(x, weight, 1e-5).numpy().tobytes()
child = os.fork()
if not child:
    os._exit(norm.rms_norm(x, weight, 1e-5).numpy().tobytes() != wanted)
print(os.waitpid(child, 0)[1])
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, timeout=60)
    assert told.stdout.strip() == "0", told.stderr
