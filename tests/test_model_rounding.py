"""Weights that are kept as packing will round them: what they become, and that a training with them gains."""

import copy
import math
from collections import Counter

import pytest
import torch

from compress_toys import PLAIN, toy
from distill_toys import Killed, batches, child_of, kl, recipe, silent
from intarsia.compress.assemble import as_run, independent
from intarsia.compress.distill import Teacher, distill, settling
from intarsia.model import quantised, rounding
from intarsia.model.packed import matrices
from intarsia.ops.packed import CODED
from test_model_packed import ARCHITECTURES, model_of

KINDS = (*CODED, "sparse")


def importance_of(block, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(m.weight.shape[1], generator=generator) for name, m in matrices(block)}


@pytest.mark.parametrize("weighed", [False, True], ids=["alike", "weighed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_at_first_it_is_what_packing_makes(name, kind, weighed):
    for dtype in (torch.float32, torch.bfloat16):
        for block in model_of(name, dtype).blocks:
            importance = importance_of(block) if weighed else None
            mine, theirs = copy.deepcopy(block), quantised(block, kind, importance)
            rounding(block, kind, importance)(mine)
            for (where, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
                assert torch.equal(a, b), where
            assert any(not torch.equal(a, b) for a, b in zip(mine.parameters(), block.parameters()))


def scaled(block, by):
    """The same block with the weights of its matrices so many times as large."""
    twin = copy.deepcopy(block)
    with torch.no_grad():
        for _, matrix in matrices(twin):
            matrix.weight.mul_(by)
    return twin


@pytest.mark.parametrize("kind", ["int8", "sparse"])
def test_scales_of_eight_bits_and_what_is_left_out_follow_the_weights(kind):
    block = model_of("llama").blocks[1]
    settle = rounding(block, kind)
    for by in (1.1, -3.0):
        moved, theirs = scaled(block, by), quantised(scaled(block, by), kind)
        settle(moved)
        assert all(map(torch.equal, moved.parameters(), theirs.parameters()))


@pytest.mark.parametrize("kind", ["int4", "int4+"])
def test_scales_of_four_bits_stay(kind):
    """What moves by less than half a code comes back, what moves further goes to another code. What int4+ keeps apart
    moves freely."""
    block = model_of("llama", torch.float32).blocks[1]
    settle, there = rounding(block, kind), copy.deepcopy(block)
    settle(there)
    near, far = scaled(there, 1.001), scaled(there, 0.5)
    settle(near), settle(far)
    for (_, a), (_, b), (_, c) in zip(matrices(there), matrices(near), matrices(far)):
        moved = (a.weight != b.weight).sum(1)
        assert moved.max() <= 1 and (moved.sum() > 0) == (kind == "int4+")  # one of 48 or 72 inputs is kept apart
        assert (c.weight - a.weight / 2).norm() < 0.25 * a.weight.norm() and (c.weight != a.weight).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_child_that_learns_rounded_is_nearer_once_it_is_packed(tmp_path, dtype):
    """Of three parents together; one may be lucky."""
    far = Counter()
    for seed in range(3):
        model = toy(PLAIN, seed, dtype)
        child, ends = child_of(model, tmp_path / str(seed), [("parent", "parent")] * 2)

        def learned(kind, lessons, seed=seed, model=model, child=child, ends=ends):
            settle = settling([kind] * len(child.blocks), child, lessons)
            assert (settle is None) == (not lessons.rounded)
            folder, teacher = tmp_path / f"{seed}{kind}{lessons.rounded}", Teacher(model, batches, ends)
            return distill(child, teacher, ends, lessons, folder, silent, settle=settle)[0]

        plain = learned("int4", recipe(120, lr=1e-3, rounded=False))
        for kind in ("int4", "int4+"):
            student = learned(kind, recipe(120, lr=1e-3))
            for name, each in (("rounded", student), ("after", plain), ("at first", child)):
                far[kind, name] += kl(model, as_run(each, [kind] * len(child.blocks)))
            assert kl(model, student) == pytest.approx(kl(model, as_run(student, [kind] * len(child.blocks))), rel=0.02)
    for kind in ("int4", "int4+"):
        assert far[kind, "rounded"] < 0.8 * min(far[kind, "after"], far[kind, "at first"])


def test_forward_passes_alone_round_nothing_but_sparse_blocks(tmp_path):
    """Nor do they ask for what matters, which would cost the backward passes that they are there to spare."""
    child, _ = child_of(toy(PLAIN), tmp_path)
    lessons = recipe(1, learning="forward")
    assert settling(["int4", "", "int8", ""], child, lessons, pytest.fail) is None
    twin = independent(child)
    settling(["int4", "sparse", "", ""], child, lessons)(twin)
    same = [all(map(torch.equal, a.parameters(), b.parameters())) for a, b in zip(child.blocks, twin.blocks)]
    assert same == [True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_killed_training_on_rounded_weights_ends_in_the_same_bits(tmp_path, dtype):
    model = toy(PLAIN, dtype=dtype)
    child, ends = child_of(model, tmp_path)
    kinds, lessons = ["int4", "int8", "int4+", "sparse"], recipe(10)
    importance = {0: importance_of(child.blocks[0])}

    def matters(asked):
        assert asked == kinds
        return importance

    def learn(folder, text):
        settle = settling(kinds, child, lessons, matters)
        return distill(child, Teacher(model, text, ends), ends, lessons, tmp_path / folder, silent, settle=settle)[0]

    def dying(step):
        if step == 6:
            raise Killed
        return batches(step)

    expected = learn("straight", batches)
    with pytest.raises(Killed):
        learn("killed", dying)
    found = learn("killed", batches)
    assert all(map(torch.equal, expected.parameters(), found.parameters()))
    assert math.isfinite(kl(model, found))
