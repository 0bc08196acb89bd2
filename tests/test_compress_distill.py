"""Distillation of a child: it learns, it resumes to the same bits, and it touches nothing but itself."""

import contextlib
import copy
from functools import partial

import pytest
import torch

from compress_toys import ALL, LADDER, PLAIN, toy
from distill_toys import GAPS, MIXED, Killed, batches, child_of, kl, recipe, silent
from intarsia.base.files import read_jsonl
from intarsia.compress.assemble import independent, with_blocks
from intarsia.compress.distill import Boundary, Teacher, distill, rate_of, settling, shares_of, trainable
from intarsia.compress.options import options_for
from intarsia.compress.statistics import collect
from intarsia.compress.surgery import make_option
from intarsia.model import Decoder
from intarsia.ops.linear import Projection
from intarsia.ops.losses import kl_and_agreement
from intarsia.ops.packed import sparsified


@pytest.mark.parametrize("weight", [0.0, 1.0], ids=["kl", "kl+cosine"])
@pytest.mark.parametrize("arch, names", [
    (PLAIN, MIXED), (PLAIN, GAPS), (ALL["biased"], [("parent", "ffn 20"), ("attention 4q/2kv mean", "none")]),
    (ALL["normed"], [("attention 4q/1kv keep", "parent"), ("linear", "ffn 20")]),
], ids=["mixed", "gaps", "biased", "normed"])  # fmt: skip
def test_the_kl_falls_on_text_it_has_not_seen(tmp_path, arch, names, weight):
    model = toy(arch)
    child, ends = child_of(model, tmp_path, names)
    before = kl(model, child)
    given = recipe(100, cosine_weight=weight, evaluations=4)
    teacher = Teacher(model, batches, ends)
    student, curve = distill(child, teacher, ends, given, tmp_path, lambda m: {"kl": kl(model, m)})
    assert kl(model, student) < 0.85 * before
    assert [r["step"] for r in curve] == [0, 25, 50, 75, 100]
    assert [r["tokens"] for r in curve] == [96 * r["step"] for r in curve]
    assert curve[0]["loss"] is None and curve[0]["kl"] == pytest.approx(before)
    assert curve[-1]["kl"] == pytest.approx(kl(model, student)) and curve[-1]["loss"] < curve[1]["loss"] * 1.2
    assert curve == read_jsonl(tmp_path / "curve.jsonl")
    assert student.arch == child.arch and not any(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_to_be_sparse_stays_so_and_is_chosen_anew(tmp_path, dtype):
    model = toy(PLAIN, dtype=dtype)
    child, ends = child_of(model, tmp_path, [("parent", "parent")] * 2)
    kinds = ["sparse", "", "sparse", "sparse"]
    before, lessons = independent(child), recipe(40, evaluations=4)
    settle = settling(kinds, child, lessons)
    settle(before)

    def settled(student):
        matrices = [(n, m.weight) for n, m in student.blocks.named_modules() if isinstance(m, Projection)]
        return {name: torch.equal(sparsified(w), w) for name, w in matrices}

    teacher = Teacher(model, batches, ends)
    student, curve = distill(child, teacher, ends, lessons, tmp_path, settled, settle=settle)
    assert len(curve) == 5
    assert all(row[name] != name.startswith("1.") for row in curve for name in settled(student))
    assert kl(model, student) < 0.7 * kl(model, before)
    learnt, untrained = (m.blocks[0].mixer.q.weight for m in (student, before))
    assert bool(((learnt != 0) & (untrained == 0)).any())  # what had been left out came back


def test_a_child_that_is_near_learns_in_small_steps(tmp_path):
    """The rate at which a far child learns best harms a near one; in proportion to the distance it helps both."""
    model, ends_at = toy(PLAIN), {}
    rate, near = recipe(40, lr=1e-2, evaluations=1), recipe(40, lr=1e-2, near=1.0, evaluations=1)

    def judge(student):
        return {"kl": kl(model, student)}

    for name, names in (("far", MIXED), ("near", [("parent", "ffn 36"), ("parent", "parent")])):
        child, ends = child_of(model, tmp_path / name, names)
        teacher = Teacher(model, batches, ends)
        with torch.no_grad():
            heads, streams = (model.head_weight, child.head_weight), [m.hidden(batches(0)) for m in (model, child)]
            first = float(kl_and_agreement(*streams, *heads)[0].mean())
        assert rate_of(child, teacher, ends, rate) == 1e-2
        assert rate_of(child, teacher, ends, near) == pytest.approx(1e-2 * min(1.0, first), rel=1e-4)
        for how, given in (("rate", rate), ("near", near)):
            curve = distill(child, teacher, ends, given, tmp_path / name / how, judge)[1]
            ends_at[name, how] = curve[-1]["kl"] / curve[0]["kl"]
    assert ends_at["far", "near"] == ends_at["far", "rate"] < 0.7
    assert ends_at["near", "rate"] > 10 and ends_at["near", "near"] < 0.97


def test_a_steep_block_learns_in_small_steps(tmp_path):
    """The same function, written as small weights behind a large norm, is as much steeper, and has so much less of the
    rate; at one rate for all it throws the child away."""
    model, even = toy(PLAIN), recipe(40, lr=3e-3, even=True, evaluations=1)
    child, ends = child_of(model, tmp_path, MIXED)
    teacher, steep, shares = Teacher(model, batches, ends), independent(child), []
    with torch.no_grad():
        steep.blocks[0].norm.weight.mul_(64)
        for part in ("q", "k", "v"):
            getattr(steep.blocks[0].mixer, part).weight.div_(64)
        torch.testing.assert_close(child.hidden(batches(0)), steep.hidden(batches(0)))
    for given in (child, steep):
        student = independent(given)
        named = trainable(student, False)
        shares.append(shares_of(named, student, teacher, ends, even))
        assert all(p.grad is None for _, p in named)
        assert shares_of(named, student, teacher, ends, recipe(40)) == {}
    plain, scaled = shares
    query = "blocks.0.mixer.q.weight"
    assert plain[query] / 64 < scaled[query] < plain[query] / 32  # three of its four matrices are 64 times as steep
    assert scaled[query] == scaled["blocks.0.norm.weight"] == scaled["blocks.0.mixer.o.weight"]
    assert all(plain[name] == scaled[name] for name in plain if not name.startswith("blocks.0."))
    assert max(plain.values()) == 1.0 and min(plain.values()) < 1.0
    far = {}
    for name, settings in (("even", even), ("one rate", even.model_copy(update={"even": False}))):
        curve = distill(steep, teacher, ends, settings, tmp_path / name, lambda m: {"kl": kl(model, m)})[1]
        far[name] = curve[-1]["kl"] / curve[0]["kl"]
    assert far["even"] < 0.85 and far["one rate"] > 1


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_only_the_student_learns(tmp_path, weight):
    model, untouched = toy(PLAIN), toy(PLAIN)
    child, ends = child_of(model, tmp_path, [("parent", "ffn 24"), ("parent", "parent")])
    start = copy.deepcopy(child)
    student, _ = distill(child, Teacher(model, batches, ends), ends, recipe(4, cosine_weight=weight), tmp_path, silent)
    for a, b in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad and a.grad is None
    for a, b in zip(child.parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b)
    changed = {n for (n, a), b in zip(student.named_parameters(), child.parameters()) if not torch.equal(a, b)}
    assert changed == {n for n, _ in child.named_parameters()} - {"embed.weight"}


def test_embeddings_learn_only_when_asked(tmp_path):
    for name in ("plain", "biased"):
        model = toy(ALL[name])
        child, ends = child_of(model, tmp_path / name, [("parent", "none"), ("parent", "parent")])
        own = {"embed.weight"} if name == "plain" else {"embed.weight", "head.weight"}
        for asked in (False, True):
            twin = independent(child)
            named = dict(trainable(twin, asked))
            assert set(named) == {n for n, _ in twin.named_parameters()} - (set() if asked else own)
            assert {n for n, p in twin.named_parameters() if p.requires_grad} == set(named)
            folder = tmp_path / name / str(asked)
            given = recipe(3, train_embeddings=asked)
            student, _ = distill(child, Teacher(model, batches, ends), ends, given, folder, silent)
            for n in own:
                assert torch.equal(student.get_parameter(n), model.get_parameter(n)) != asked


def test_forward_passes_alone(tmp_path):
    model = toy(PLAIN)
    child, ends = child_of(model, tmp_path)
    before, given = kl(model, child), recipe(150, learning="forward", lr=1e-3, clip=30.0)
    student, curve = distill(child, Teacher(model, batches, ends), ends, given, tmp_path / "whole", silent)
    assert kl(model, student) < 0.97 * before and len(curve) == 5

    def dying(step):
        if step == 60:
            raise Killed
        return batches(step)

    with pytest.raises(Killed):
        distill(child, Teacher(model, dying, ends), ends, given, tmp_path / "killed", silent)
    again, _ = distill(child, Teacher(model, batches, ends), ends, given, tmp_path / "killed", silent)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


# Interruption


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("weight", [0.0, 0.5], ids=["kl", "kl+cosine"])
def test_a_killed_distillation_ends_in_the_same_bits(tmp_path, dtype, weight):
    model = toy(PLAIN, dtype=dtype)
    child, ends = child_of(model, tmp_path)
    given = recipe(12, cosine_weight=weight, evaluations=4, near=10.0 * weight, even=weight > 0)

    def judge(student):
        return {"kl": kl(model, student)}

    expected, curve = distill(child, Teacher(model, batches, ends), ends, given, tmp_path / "straight", judge)

    def attempt(stop):
        seen = set()

        def dying(step):
            seen.add(step)
            if step == stop:
                raise Killed
            return batches(step)

        with contextlib.nullcontext() if stop is None else pytest.raises(Killed):
            return distill(child, Teacher(model, dying, ends), ends, given, tmp_path / "killed", judge), seen
        return None, seen

    seen = [attempt(stop)[1] for stop in (2, 7, 8)]
    (found, again), last = attempt(None)
    done = [{0, 1, 2}, set(range(2, 8)), {7, 8}, set(range(8, 12))]  # nothing saved is done twice, and the first text
    assert [*seen, last] == [steps | ({0} if given.near else set()) for steps in done]  # is read to learn the distance
    for (name, a), b in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert again == curve and len(curve) == 5
    fewer = recipe(6, cosine_weight=weight)
    other, _ = distill(child, Teacher(model, batches, ends), ends, fewer, tmp_path / "fewer", silent)
    assert any(not torch.equal(a, b) for a, b in zip(expected.parameters(), other.parameters()))  # bits can differ


def mixture_of(model):
    """A child whose FFNs are experts, of which a token uses two of eight, and its layers' ends."""
    cut_up = LADDER.model_copy(update={"ffn_widths": (), "kv_methods": (), "moe": ("S2A2E8",)})
    stats = collect(model, [batches(900 + n) for n in range(4)], marks=True)
    blocks = list(model.blocks)
    for index in (1, 3):
        spec = next(s for s in options_for(model.arch.blocks[index], cut_up) if s.method == "cmoe")
        blocks[index] = make_option(model.blocks[index], spec, model.arch, stats[index])
    return with_blocks(model, blocks), [Boundary(2, 2), Boundary(4, 4)]


def test_experts_that_are_not_chosen_answer_less_and_less_while_they_learn(tmp_path):
    """Sparse whenever it is judged and in the end, all experts learning from the first step on, resumed to the same
    bits."""
    model = toy(PLAIN)
    child, ends = mixture_of(model)
    given, counts = recipe(8, dense=0.5, evaluations=8), []

    def judge(student):
        assert not student.blocks[1].mixer.unchosen
        return {"kl": kl(model, student)}

    def watched(step, stop=None):
        if step == stop:
            raise Killed
        return batches(step)

    def learn(folder, stop=None):
        teacher = Teacher(model, partial(watched, stop=stop), ends)
        return distill(child, teacher, ends, given, tmp_path / folder, judge)

    hidden = Decoder.hidden

    def counting(student, *rest):
        if student is not model and torch.is_grad_enabled():
            counts.append(student.blocks[3].mixer.unchosen)
        return hidden(student, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "hidden", counting)
        expected, curve = learn("straight")
    assert counts == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]
    lessons = recipe(80, dense=0.5, lr=1e-3)
    longer, _ = distill(child, Teacher(model, batches, ends), ends, lessons, tmp_path / "longer", judge)
    assert kl(model, longer) < 0.95 * kl(model, child)
    with pytest.raises(Killed):
        learn("killed", stop=3)
    found, again = learn("killed")
    assert again == curve and all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters()))
    one, _ = distill(child, Teacher(model, batches, ends), ends, recipe(1, dense=1.0), tmp_path / "one", silent)
    for index in (1, 3):
        before, after = (m.blocks[index].mixer.experts.up for m in (child, one))
        assert bool((before != after).any((1, 2)).all())


def test_steps_after_the_last_saved_state_are_done_again_to_the_same_curve(tmp_path):
    """Killed after an evaluation whose state was never written."""
    model = toy(PLAIN)
    child, ends = child_of(model, tmp_path)

    def judge(student):
        return {"kl": kl(model, student)}

    rare = recipe(8, evaluations=4, checkpoint_seconds=1e9)
    expected, curve = distill(child, Teacher(model, batches, ends), ends, rare, tmp_path / "straight", judge)

    def dying(step):
        if step == 7:
            raise Killed
        return batches(step)

    for _ in range(2):
        with pytest.raises(Killed):
            distill(child, Teacher(model, dying, ends), ends, rare, tmp_path / "killed", judge)
    found, again = distill(child, Teacher(model, batches, ends), ends, rare, tmp_path / "killed", judge)
    assert again == curve and [r["step"] for r in again] == [0, 2, 4, 6, 8]
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


def test_a_finished_distillation_called_again_does_nothing(tmp_path):
    model = toy(PLAIN)
    child, ends = child_of(model, tmp_path)
    student, curve = distill(child, Teacher(model, batches, ends), ends, recipe(4), tmp_path, silent)

    def never(step):
        raise AssertionError(f"step {step} is done")

    again, row = distill(child, Teacher(model, never, ends), ends, recipe(4), tmp_path, silent)
    assert row == curve
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("lr, undone", [(3e-3, False), (30.0, True)])
def test_a_training_that_does_harm_is_undone(lr, undone, tmp_path, capsys):
    model = toy(PLAIN)
    child, ends = child_of(model, tmp_path)

    def look(student):
        return {"kl": kl(model, student)}

    teacher, settings = Teacher(model, batches, ends), recipe(20, lr=lr, evaluations=1)
    student, curve = distill(child, teacher, ends, settings, tmp_path, look)
    assert curve[-1].get("undone", False) == undone == ("did harm" in capsys.readouterr().out)
    assert not curve[-1]["kl"] <= curve[0]["kl"] if undone else kl(model, student) == curve[-1]["kl"] < curve[0]["kl"]
    same = [torch.equal(a, b) for a, b in zip(child.parameters(), student.parameters(), strict=True)]
    assert all(same) == undone
    assert not {p.data_ptr() for p in child.blocks.parameters()} & {p.data_ptr() for p in student.blocks.parameters()}


@pytest.mark.parametrize("learning", ["gradients", "forward"])
def test_blocks_at_the_beginning_may_stay(learning, tmp_path):
    model = toy(PLAIN)
    child, ends = child_of(model, tmp_path)
    settings = recipe(3, frozen=1, learning=learning, evaluations=0)
    student, _ = distill(child, Teacher(model, batches, ends), ends, settings, tmp_path, silent)
    same = [all(map(torch.equal, a.parameters(), b.parameters())) for a, b in zip(child.blocks, student.blocks)]
    assert same[0] and not any(same[1:])
