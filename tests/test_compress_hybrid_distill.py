"""Distillation of a hybrid: every parameter learns, what decays stays float32, an interruption leaves no trace."""

import contextlib

import pytest
import torch

from compress_toys import LADDER, PLAIN, sites, statistics, tokens, toy
from intarsia.compress.assemble import assemble
from intarsia.compress.distill import Teacher, boundaries, distill
from intarsia.compress.library import Builder, Library
from intarsia.compress.options import options_for
from intarsia.compress.recipe import Distill
from intarsia.compress.recipe import Library as Recipe
from intarsia.ops.losses import kl_and_agreement

MAMBA = LADDER.model_copy(update={"mamba": True})
HELDOUT = tokens(8, seed=900)
WIDE = ("A_log", ".D", "dt_bias")


def batches(step):
    return tokens(4, 24, seed=step)


def recipe(steps):
    return Distill(tokens=96 * steps, batch_tokens=96, lr=3e-3, checkpoint_seconds=0.0, evaluations=2)


def hybrid(model, folder):
    """Mamba-2 in both layers, as the surgery makes it, with its last matrices fitted."""
    options = {i: options_for(b, MAMBA) for i, b in enumerate(model.arch.blocks)}
    made = Builder(model, options, statistics(model, 4), Recipe(tokens=0), "refit", folder / "library")
    before = made.losses(HELDOUT)
    made.store(before, made.fit((tokens(seed=500 + n) for n in range(8)), HELDOUT, lambda *_: None))
    mamba = [next(s for s in options[i] if s.method == "mamba") for i in (0, 2)]
    choice = [(mamba[0], options[1][0]), (mamba[1], options[3][0])]
    return assemble(Library.open(folder / "library", model), sites(model), choice), boundaries(sites(model), choice)


@torch.no_grad()
def kl(model, child):
    head = [m.head_weight.float() for m in (model, child)]
    return float(kl_and_agreement(model.hidden(HELDOUT).float(), child.hidden(HELDOUT).float(), *head)[0].mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_parameter_learns(tmp_path, dtype):
    model = toy(PLAIN, dtype=dtype)
    child, ends = hybrid(model, tmp_path)
    before = kl(model, child)
    student, _ = distill(child, Teacher(model, batches, ends), ends, recipe(60), tmp_path, lambda _: {})
    assert kl(model, student) < 0.85 * before
    old = dict(child.named_parameters())
    same = {n for n, p in student.named_parameters() if torch.equal(p, old[n])}
    assert same == {"embed.weight"}
    for name, parameter in student.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(WIDE) else dtype), name
    assert sum(n.endswith(WIDE) for n in old) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_killed_distillation_ends_in_the_same_bits(tmp_path, dtype):
    model = toy(PLAIN, dtype=dtype)
    child, ends = hybrid(model, tmp_path)

    def judge(student):
        return {"kl": kl(model, student)}

    def run(folder, stop=None):
        def text(step):
            if step == stop:
                raise KeyboardInterrupt
            return batches(step)

        return distill(child, Teacher(model, text, ends), ends, recipe(8), tmp_path / folder, judge)

    expected, curve = run("straight")
    for stop in (2, 5):
        with contextlib.suppress(KeyboardInterrupt):
            run("killed", stop)
    found, again = run("killed")
    assert again == curve
    for (name, a), b in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b), name
