"""Whom a student learns from: the parent, or its stored answers; and what the loss is."""

import functools

import pytest
import torch

from compress_toys import PLAIN, all_options, sites, tokens, toy
from distill_toys import GAPS, HELDOUT, Killed, batches, child_of, kl, recipe, silent
from intarsia.arch import FeedForward
from intarsia.base.errors import IntarsiaError
from intarsia.compress.answers import Answers, set_aside, store
from intarsia.compress.assemble import independent
from intarsia.compress.distill import Boundary, Teacher, _backward, boundaries, distill, trainable
from intarsia.formats import save


def gradients_of(child, teacher):
    """The losses of three steps and the gradients that they leave."""
    student = independent(child)
    trainable(student, False)
    losses = [_backward(student, teacher, teacher.ends, recipe(), step) for step in range(3)]
    return losses, {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def stored(folder, model, ends, steps, top=0, parent=None, **rest):
    """A teacher that reads what `model` has answered."""
    folder.mkdir(exist_ok=True)
    store(folder, steps, model.arch.vocab_size, Teacher(model, batches, [], top=top).answer)
    return Teacher(parent, batches, ends, Answers(folder), top, **rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("top", [0, 7], ids=["hidden", "top"])
def test_stored_answers_give_the_gradients_of_the_parent(tmp_path, dtype, top):
    model = toy(PLAIN, dtype=dtype)
    child, ends = child_of(model, tmp_path)
    live = gradients_of(child, Teacher(model, batches, ends, top=top))
    teacher = stored(tmp_path / "teacher", model, ends, 3, top, None if top else model)
    losses, gradients = gradients_of(child, teacher)
    assert losses == live[0] and len(set(losses)) == 3
    assert gradients.keys() == live[1].keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        assert torch.equal(gradient, live[1][name]) and gradient.any(), name


def test_all_logits_teach_as_the_parent_does_and_few_less(tmp_path):
    model = toy(PLAIN)
    child, ends = child_of(model, tmp_path)
    full, wanted = gradients_of(child, Teacher(model, batches, ends))
    for top in (2, 20, 61):
        losses, gradients = gradients_of(child, stored(tmp_path / str(top), model, ends, 3, top))
        if top == 61:
            assert losses == pytest.approx(full, rel=5e-3)  # gaps are stored in float16
            for name, gradient in gradients.items():
                assert (gradient - wanted[name]).norm() < 1e-2 * wanted[name].norm(), name
        assert sum(losses) < sum(full) * (0.9 if top == 2 else 1.005)


def test_a_killed_teacher_goes_on_where_it_stopped(tmp_path):
    model = toy(PLAIN)
    asked = []

    def answer(step):
        asked.append(step)
        if len(asked) in (4, 7):
            raise Killed
        return Teacher(model, batches, [], top=5).answer(step)

    store(tmp_path / "straight", 6, 61, Teacher(model, batches, [], top=5).answer)
    for _ in range(2):
        with pytest.raises(Killed):
            store(tmp_path / "killed", 6, 61, answer)
        with open(tmp_path / "killed" / "answers.bin", "ab") as file:
            file.write(b"half a record")
    store(tmp_path / "killed", 6, 61, answer)
    assert asked == [0, 0, 1, 2, 2, 3, 4, 4, 5]  # the first look is for the shapes alone
    for name in ("answers.bin", "answers.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_student_learns_from_stored_logits_while_the_parent_is_set_aside(tmp_path):
    """The parent's blocks hold nothing meanwhile, and are as before afterwards."""
    model = toy(PLAIN)
    child, ends = child_of(model, tmp_path)
    before, untouched = kl(model, child), toy(PLAIN)
    save(model, tmp_path / "parent")
    seen = []

    def judge(student):
        seen.append(sum(p.numel() for p in model.blocks.parameters()))
        return {}

    rest = functools.partial(set_aside, model, tmp_path / "parent")
    teacher = stored(tmp_path / "teacher", model, ends, 60, 16, rest=rest)
    student, _ = distill(child, teacher, ends, recipe(60, evaluations=2), tmp_path, judge)
    assert seen[0] > 0 and seen[1:] == [0, 0]
    for a, b in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    assert kl(model, student) < 0.85 * before


def test_another_vocabulary_is_refused_in_a_sentence(tmp_path):
    model = toy(PLAIN)
    child, ends = child_of(model, tmp_path)
    other = toy(PLAIN.replace(vocab_size=59))
    for teacher in (Teacher(other, batches, ends), stored(tmp_path / "teacher", model, ends, 1, 4)):
        student = child if teacher.parent is other else other
        with pytest.raises(IntarsiaError, match=r"teacher has a vocabulary of (59|61) and the student one of (61|59)"):
            distill(student, teacher, ends, recipe(1), tmp_path / "never", silent)


def test_streams_are_not_stored():
    with pytest.raises(ValueError, match="streams, which are not stored"):
        recipe(1, teacher="stored", cosine_weight=0.5)
    assert recipe(1, teacher="stored").stores and recipe(1).stores
    assert not recipe(1, teacher="live").stores and not recipe(1, cosine_weight=0.5).stores


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, weight, monkeypatch):
    model = toy(PLAIN)
    child, ends = child_of(model, tmp_path)
    found = []
    for micro in (10_000, 48, 1):
        monkeypatch.setattr("intarsia.compress.distill.MICRO_TOKENS", micro)
        student = independent(child)
        trainable(student, False)
        teacher = Teacher(model, lambda step: tokens(5, 24, seed=step), ends)
        loss = _backward(student, teacher, ends, recipe(cosine_weight=weight), 0)
        found.append((loss, {n: p.grad for n, p in student.named_parameters() if p.grad is not None}))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], atol=1e-6, rtol=1e-3)


def test_the_loss_is_kl_plus_the_cosines_of_all_layers(tmp_path):
    """By hand, in float64, with a layer that is not there at all."""
    model = toy(PLAIN)
    child, ends = child_of(model, tmp_path, GAPS)
    assert ends == [Boundary(2, 0), Boundary(4, 1)]
    student = independent(child)
    trainable(student, False)
    loss = _backward(student, Teacher(model, batches, ends), ends, recipe(cosine_weight=0.3), 5)
    p, q = (independent(m).double() for m in (model, child))
    ids = batches(5)
    with torch.no_grad():
        logs = [torch.log_softmax(m(ids), -1) for m in (p, q)]
        expected = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
        for end in ends:
            a, b = p.run(p.embed_tokens(ids), 0, end.parent), q.run(q.embed_tokens(ids), 0, end.child)
            expected += 0.3 * float(1 - torch.cosine_similarity(a, b, dim=-1).mean())
    assert loss == pytest.approx(expected, rel=1e-4)


def test_boundaries_follow_what_is_there():
    model = toy(PLAIN)
    options, where = all_options(model), sites(model)

    def ends(*names):
        choice = [tuple(next(s for s in options[i] if s.name == n) for i, n in zip((site.attention, site.ffn), pair))
                  for site, pair in zip(where, names)]  # fmt: skip
        return [(b.parent, b.child) for b in boundaries(where, choice)]

    assert ends(("parent", "parent"), ("parent", "parent")) == [(2, 2), (4, 4)]
    assert ends(("none", "ffn 12"), ("linear", "none")) == [(2, 1), (4, 2)]
    assert ends(("none", "none"), ("none", "none")) == [(2, 0), (4, 0)]
    arch = PLAIN.replace(blocks=(FeedForward(24), *PLAIN.blocks[:2]))
    odd = toy(arch)
    given = all_options(odd)
    choice = [(None, given[0][0]), (given[1][-1], given[2][0])]
    assert [(b.parent, b.child) for b in boundaries(sites(odd), choice)] == [(1, 1), (3, 2)]


def test_the_teachers_streams_are_the_parents():
    model = toy(PLAIN)
    ends = [Boundary(2, 0), Boundary(4, 1)]
    streams, hidden = Teacher(model, batches, ends).streams(HELDOUT)
    assert torch.equal(streams[0], model.run(model.embed_tokens(HELDOUT), 0, 2))
    assert torch.equal(streams[1], model.run(model.embed_tokens(HELDOUT), 0, 4))
    assert torch.equal(hidden, model.hidden(HELDOUT))
