"""The library: training helps, fits never hurt, an interruption leaves no trace, what is stored is what was trained."""

import itertools

import numpy as np
import pytest
import torch

from compress_toys import ALL, LADDER, PLAIN, all_options, relative, statistics, tokens, toy
from intarsia.arch import FeedForward
from intarsia.compress.importance import RIDGE
from intarsia.compress.library import Builder, Library, stored_losses, stream
from intarsia.compress.options import OptionSpec, options_for
from intarsia.compress.recipe import Library as Recipe
from intarsia.compress.trainees import import_option
from intarsia.model import ResidualBlock

STEPS = 24
HELDOUT = tokens(8, seed=900)


def recipe(mode="nested", steps=STEPS, **rest):
    return Recipe(mode=mode, tokens=96 * steps, batch_tokens=96, lr=3e-3, **rest)


def batches(step):
    return tokens(4, 24, seed=step)


def builder(model, folder, mode="nested", steps=STEPS, options=None):
    return Builder(model, options or all_options(model), statistics(model, 4), recipe(mode, steps), "refit", folder)


def nothing(*_):
    pass


def fit(made, count=8, first=500):
    return made.fit((tokens(seed=first + n) for n in range(count)), HELDOUT, nothing)


def finished(model, folder, mode="nested", steps=STEPS):
    made = builder(model, folder, mode, steps)
    before = made.losses(HELDOUT)
    made.train(batches, nothing, nothing)
    after = fit(made)
    made.store(before, after)
    return made, Library.open(folder, model), before, after


@pytest.mark.parametrize("mode", ["nested", "own"])
@pytest.mark.parametrize("arch", ALL.values(), ids=ALL)
def test_a_stored_option_is_the_trained_one(tmp_path, arch, mode):
    model = toy(arch)
    made, library, before, after = finished(model, tmp_path, mode, 6)
    with torch.no_grad():
        for index, parent, n, update, tables in stream(model, HELDOUT):
            trained = {spec.name: y for spec, y in made.trainees[index].outputs(n, tables)}
            x = torch.zeros_like(n)
            for spec in made.options[index]:
                block = library.block(index, spec)
                if spec.method == "parent":
                    assert block is parent
                    continue
                if spec.method == "none":
                    assert block is None
                    continue
                assert block.spec == spec.block and not any(p.requires_grad for p in block.parameters())
                assert torch.equal(block.norm.weight, parent.norm.weight)
                y = block.mixer(n, tables)
                if spec.name in trained:
                    assert relative(y, trained[spec.name]) < 1e-5, spec.name
                loss = float((y - update).square().mean() / update.square().mean())
                assert loss == pytest.approx(after[index][spec.name], rel=1e-3, abs=1e-6)
                x = x + y
            assert x.isfinite().all()
    stored = {str(index): row for index, row in stored_losses(tmp_path).items()}
    for index, rows in after.items():
        assert list(rows) == [s.name for s in made.options[index]]
        assert rows["parent"] == 0.0 and rows["none"] == 1.0
        assert stored[str(index)] == {name: [before[index][name], rows[name]] for name in rows}


def test_losses_are_the_normalised_errors_of_the_blocks(tmp_path):
    """Before any training, of every option, by hand."""
    model = toy(PLAIN)
    made = builder(model, tmp_path, "own")
    losses = made.losses(HELDOUT)
    made.store(losses, losses)
    library, checked = Library.open(tmp_path, model), 0
    with torch.no_grad():
        x = model.embed_tokens(HELDOUT)
        for index, block in enumerate(model.blocks):
            tables = model.rope_tables(0, 24)[8]
            wanted = block.update(x, tables).double()
            for spec in made.options[index]:
                if spec.method not in ("parent", "none"):
                    y = library.block(index, spec).update(x, tables).double()
                    expected = float((y - wanted).square().sum() / wanted.square().sum())
                    assert losses[index][spec.name] == pytest.approx(expected, rel=1e-3), spec.name
                    checked += 1
            x = block(x, tables)
    assert checked == sum(len(o) - 2 for o in made.options.values())


@pytest.mark.parametrize("mode", ["nested", "own"])
def test_training_lowers_the_loss_on_text_it_has_not_seen(tmp_path, mode):
    model = toy(PLAIN)
    options = {i: [s for s in specs if s.method in ("parent", "prefix", "drop", "aligned", "none")]
               for i, specs in all_options(model).items()}  # fmt: skip
    made = builder(model, tmp_path, mode, 300, options)
    before = made.losses(HELDOUT)
    made.train(batches, nothing, nothing)
    learned = made.losses(HELDOUT)
    names = [(i, s.name) for i, specs in options.items() for s in specs if s.method not in ("parent", "none")]
    for i in options:
        mine = [n for j, n in names if j == i]
        # Widths that share their channels lower the mean of their losses, what each has for itself lowers its own.
        for group in [mine] if mode == "nested" and i in (1, 3) else [[n] for n in mine]:
            assert sum(learned[i][n] for n in group) < 0.99 * sum(before[i][n] for n in group), (i, group)
    after = fit(made)
    for i, name in names:
        assert after[i][name] <= learned[i][name]


@pytest.mark.parametrize("mode", ["nested", "own"])
@pytest.mark.parametrize("steps", [0, 6])
def test_a_fit_never_makes_a_loss_worse(tmp_path, mode, steps):
    """Even to text that is one token over and over, whose last matrices would be worthless."""
    model = toy(PLAIN)
    made = builder(model, tmp_path, mode, steps)
    made.train(batches, nothing, nothing)
    before = made.losses(HELDOUT)
    after = made.fit(iter([torch.full((4, 24), 7)] * 3), HELDOUT, nothing)
    again = made.losses(HELDOUT)
    for index, rows in after.items():
        for name, loss in rows.items():
            assert loss <= before[index][name]
            assert loss == pytest.approx(again[index][name], rel=1e-6)  # what is returned is what is kept
    better = fit(made, 16)
    assert sum(sum(r.values()) for r in better.values()) < sum(sum(r.values()) for r in after.values())


def test_a_fit_to_text_with_nan_in_it_is_not_kept(tmp_path):
    model = toy(PLAIN)
    made = builder(model, tmp_path, "nested", 0)
    before = made.losses(HELDOUT)
    for trainee in made.trainees.values():
        refit = trainee.refit
        trainee.refit = lambda moments, refit=refit: refit([(g, c * torch.nan) for g, c in moments])
    after = fit(made)
    assert after == before
    assert all(t.isfinite().all() for trainee in made.trainees.values() for t in trainee.export().values())


class Killed(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["nested", "own"])
def test_an_interrupted_training_ends_in_the_same_bits(tmp_path, mode, dtype):
    model, state = toy(PLAIN, dtype=dtype), tmp_path / "state.safetensors"
    straight = builder(model, tmp_path, mode, 10)
    straight.train(batches, nothing, nothing)
    expected = fit(straight)

    for stop in (3, 7):  # killed some steps after a state was saved, twice
        cut = builder(model, tmp_path, mode, 10)
        if state.exists():
            cut.optimizer.load(state)

        def save(cut=cut, stop=stop):
            if cut.optimizer.steps == stop:
                cut.optimizer.save(state)
            if cut.optimizer.steps == stop + 2:
                raise Killed

        with pytest.raises(Killed):
            cut.train(batches, save, nothing)
    last, seen = builder(model, tmp_path, mode, 10), []
    last.optimizer.load(state)
    assert last.optimizer.steps == 7

    def counted(step):
        seen.append(step)
        return batches(step)

    last.train(counted, nothing, nothing)
    assert seen == [7, 8, 9]
    assert fit(last) == expected
    for index, trainee in straight.trainees.items():
        other = last.trainees[index].export()
        for name, tensor in trainee.export().items():
            assert torch.equal(tensor, other[name]), (index, name)


def test_the_parent_is_not_touched(tmp_path):
    model, untouched = toy(PLAIN), toy(PLAIN)
    finished(model, tmp_path, steps=3)
    for a, b in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad and a.grad is None


def between(width):
    return OptionSpec(f"ffn {width}", FeedForward(width), "prefix")


@pytest.mark.parametrize("mode", ["nested", "own"])
def test_widths_between_those_of_the_library(tmp_path, mode):
    model = toy(PLAIN)
    made, library, _, after = finished(model, tmp_path, mode)
    text = [tokens(seed=700 + n) for n in range(8)]
    found = library.widened({1: between(32), 3: between(20)}, iter(text))
    assert list(found) == [1, 3] and not any(p.requires_grad for b in found.values() for p in b.parameters())
    for index, width, source in ((1, 32, 36), (3, 20, 24)):
        block = found[index]
        wide = ResidualBlock(FeedForward(36 if mode == "nested" else source), model.arch, torch.float32)
        stored = made.trainees[index].export()
        if mode == "nested":
            stored["ffn 36/down.weight"] = torch.zeros(32, 36)
        import_option(stored, between(wide.spec.intermediate_size), wide)
        for name in ("up", "gate"):
            assert torch.equal(getattr(block.mixer, name).weight, getattr(wide.mixer, name).weight[:width])
        assert torch.equal(block.norm.weight, model.blocks[index].norm.weight)
        # The last matrix is the least-squares one of the text.
        with torch.no_grad():
            rows = [(block.mixer.channels(n).flatten(0, 1), update.flatten(0, 1)) for ids in text
                    for i, _, n, update, _ in stream(model, ids) if i == index]  # fmt: skip
            c, y = (torch.cat(part).double().numpy() for part in zip(*rows))
            root = np.sqrt(RIDGE * np.square(c).sum(0).mean())
            system = np.vstack([c, root * np.eye(width)])
            best = np.linalg.lstsq(system, np.vstack([y, np.zeros((width, 32))]), rcond=None)[0]
            np.testing.assert_allclose(block.mixer.down.weight, best.T, atol=2e-3)
            # It stands between its neighbours.
            n, update = next((n, u) for i, _, n, u, _ in stream(model, HELDOUT) if i == index)
            loss = float((block.mixer(n) - update).square().sum() / update.square().sum())
        narrower = max(w for w in (12, 24, 36) if w < width)
        assert loss < after[index][f"ffn {narrower}"]
        assert loss < 1


def test_linear_layers_alone_are_a_library_too(tmp_path):
    """Nothing to train: no widths, no heads."""
    model = toy(PLAIN)
    few = LADDER.model_copy(update={"ffn_widths": (), "kv_methods": ()})
    options = {i: options_for(b, few) for i, b in enumerate(PLAIN.blocks)}
    assert [s.name for s in options[0]] == ["parent", "linear", "none"]
    made = Builder(model, options, statistics(model, 4), recipe(steps=0), "refit", tmp_path)
    losses = made.losses(HELDOUT)
    assert fit(made) == losses
    made.store(losses, losses)
    library = Library.open(tmp_path, model)
    assert all(library.block(i, s[1]).mixer.proj.weight.shape == (32, 32) for i, s in options.items())
    assert all(0 < rows["linear"] < 1.5 for rows in losses.values())


def test_wider_is_better(tmp_path):
    """Losses before training fall with every channel that is kept: the sorted prefixes are in order."""
    losses = builder(toy(PLAIN), tmp_path).losses(HELDOUT)
    for index in (1, 3):
        ladder = [losses[index][f"ffn {w}"] for w in (36, 24, 12)]
        assert all(a < b for a, b in itertools.pairwise(ladder))
