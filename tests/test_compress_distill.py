"""Distillation of a child: it learns, it resumes to the same bits, and it touches nothing but itself."""

import contextlib
import copy
import functools

import pytest
import torch

from compress_toys import ALL, PLAIN, all_options, sites, statistics, tokens, toy
from intarsia.arch import FeedForward
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_jsonl
from intarsia.compress.answers import Answers, set_aside, store
from intarsia.compress.assemble import assemble, independent
from intarsia.compress.distill import Boundary, Teacher, _backward, boundaries, distill, settling, trainable
from intarsia.compress.library import Builder, Library
from intarsia.compress.recipe import Distill
from intarsia.compress.recipe import Library as Recipe
from intarsia.formats import save
from intarsia.ops.linear import Projection
from intarsia.ops.losses import kl_and_agreement
from intarsia.ops.packed import sparsified

HELDOUT = tokens(8, seed=900)
MIXED = [("attention 2q/1kv", "ffn 12"), ("attention 4q/1kv aligned", "linear")]
GAPS = [("none", "none"), ("none", "ffn 24")]


def batches(step):
    return tokens(4, 24, seed=step)


def recipe(steps=30, **rest):
    return Distill(**({"tokens": 96 * steps, "batch_tokens": 96, "lr": 3e-3, "checkpoint_seconds": 0.0} | rest))


def child_of(model, folder, names=MIXED):
    """A child and its layers' ends, from a library that the surgery alone has made."""
    options, where = all_options(model), sites(model)
    made = Builder(model, options, statistics(model, 4), Recipe(tokens=0), "refit", folder / "library")
    losses = made.losses(HELDOUT)
    made.store(losses, losses)
    choice = [tuple(next(s for s in options[i] if s.name == n) for i, n in zip((site.attention, site.ffn), pair))
              for site, pair in zip(where, names)]  # fmt: skip
    return assemble(Library.open(folder / "library", model), where, choice), boundaries(where, choice)


@torch.no_grad()
def kl(model, child):
    head = [m.head_weight.float() for m in (model, child)]
    return float(kl_and_agreement(model.hidden(HELDOUT).float(), child.hidden(HELDOUT).float(), *head)[0].mean())


def silent(_):
    return {}


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


def test_what_is_to_be_sparse_stays_so_and_is_chosen_anew(tmp_path):
    model = toy(PLAIN, dtype=torch.bfloat16)
    child, ends = child_of(model, tmp_path, [("parent", "parent")] * 2)
    kinds = ["sparse", "", "sparse", "sparse"]
    before = independent(child)
    settling(kinds)(before)

    def settled(student):
        matrices = [(n, m.weight) for n, m in student.blocks.named_modules() if isinstance(m, Projection)]
        return {name: torch.equal(sparsified(w), w) for name, w in matrices}

    teacher, lessons = Teacher(model, batches, ends), recipe(40, evaluations=4)
    student, curve = distill(child, teacher, ends, lessons, tmp_path, settled, settle=settling(kinds))
    assert len(curve) == 5
    assert all(row[name] != name.startswith("1.") for row in curve for name in settled(student))
    assert kl(model, student) < 0.7 * kl(model, before)
    learnt, untrained = (m.blocks[0].mixer.q.weight for m in (student, before))
    assert bool(((learnt != 0) & (untrained == 0)).any())  # what had been left out came back


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


class Killed(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("weight", [0.0, 0.5], ids=["kl", "kl+cosine"])
def test_a_killed_distillation_ends_in_the_same_bits(tmp_path, dtype, weight):
    model = toy(PLAIN, dtype=dtype)
    child, ends = child_of(model, tmp_path)
    given = recipe(12, cosine_weight=weight, evaluations=4)

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
    assert [*seen, last] == [{0, 1, 2}, set(range(2, 8)), {7, 8}, set(range(8, 12))]  # nothing saved is done twice
    for (name, a), b in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert again == curve and len(curve) == 5
    fewer = recipe(6, cosine_weight=weight)
    other, _ = distill(child, Teacher(model, batches, ends), ends, fewer, tmp_path / "fewer", silent)
    assert any(not torch.equal(a, b) for a, b in zip(expected.parameters(), other.parameters()))  # bits can differ


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


# Teacher and losses


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
