"""One layer in place of several: the search against every cover, the fit against float64, a child against its parts."""

import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from compress_toys import ALL, PLAIN, SMALL, all_options, sites, statistics, tokens, toy
from intarsia.arch import Architecture, Attention, FeedForward, Linear, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_jsonl
from intarsia.compress.assemble import assemble
from intarsia.compress.baselines import brute_force
from intarsia.compress.controls import control_choice
from intarsia.compress.distill import Boundary, boundaries
from intarsia.compress.importance import RIDGE
from intarsia.compress.library import Builder, Library, stored_losses
from intarsia.compress.measure import PHASES, CostTable, distinct
from intarsia.compress.problem import choice_of, make_problem, name_of, on_its_own, pair_name
from intarsia.compress.recipe import Library as Fitting
from intarsia.compress.recipe import Options
from intarsia.compress.score import Scorer, compose, count_measurements, score_library
from intarsia.compress.search import VIEWS, viewed
from intarsia.compress.solve import Bound, Option, solve
from intarsia.compress.spans import fit_spans, harms, make_spans, places, with_spans
from intarsia.engine.scenario import Scenario

SPANNED = Options(ffn_widths=(), kv_methods=(), spans=(2, 3))
DEEP = PLAIN.replace(blocks=PLAIN.blocks * 2)
HYBRID = Architecture(
    blocks=(
        Mamba2(4, 8, 8), FeedForward(24), Mamba2(4, 8, 8), Attention(4, 2, 8), FeedForward(24, "relu2", gated=False)
    ),
    tied_embeddings=True, **SMALL,
)  # fmt: skip
EVERY = {name: arch.replace(blocks=arch.blocks * 2) for name, arch in ALL.items()} | {"hybrid": HYBRID}
TIME = {"prefill_seconds": 1.0, "decode_seconds": 1.0}


def spanned(model, recipe=SPANNED):
    options = all_options(model, recipe)
    return options, with_spans(sites(model), options, recipe)


def table_of(options, where, arch) -> CostTable:
    blocks = {k: dict.fromkeys(PHASES, 0.01 * (n + 1)) for n, k in enumerate(distinct(options, where))}
    return CostTable(blocks, dict.fromkeys(PHASES, 0.002), {}, parent_blocks=list(arch.blocks))


def drawn(arch, where, options, seed):
    """A problem with random scores, in which spans are often worth it."""
    draw = random.Random(seed)
    scores = {(s.layer, a.name, f.name): draw.uniform(0.2, 1) * ((a.name != "parent") + (f.name != "parent"))
              for s in where for a in options[s.attention] for f in options[s.ffn]}  # fmt: skip
    for site in where:
        for span in site.spans:
            scores[site.layer, span.attention.name, span.ffn.name] = draw.uniform(0.2, 1) * span.length
    return make_problem(arch, where, options, table_of(options, where, arch), Scenario(1, 8, 8), 4, scores)


def covers(where, problem, position=0):
    """Every choice that is one: each layer stands on its own or belongs to exactly one span. Without ties."""
    if position == len(where):
        yield ()
        return
    names = [o.name for o in problem.sites[position]]
    for index, name in enumerate(names):
        if on_its_own(name):
            yield from ((index, *rest) for rest in covers(where, problem, position + 1))
    for span in where[position].spans:
        under = [[o.name for o in problem.sites[position + n]].index(f"covered {span.length - n}")
                 for n in range(1, span.length)]  # fmt: skip
        for rest in covers(where, problem, position + span.length):
            yield (names.index(span.name), *under, *rest)


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_the_best_cover(seed):
    options, where = spanned(toy(DEEP), SPANNED.model_copy(update={"linear": seed % 2 == 0, "span_methods": ("fold",)}))
    problem = drawn(DEEP, where, options, seed)
    parent = sum(problem.parent_costs()[p] for p in PHASES)
    bounds = [Bound("time", TIME, random.Random(seed).uniform(0.3, 0.9) * parent)]
    every = [(sum(s[i].score for s, i in zip(problem.sites, c)), c) for c in covers(where, problem)]
    kept = sorted((score, c) for score, c in every if bounds[0].met(problem_costs(problem, c)))
    found = solve(problem.sites, bounds, fixed=problem.fixed, num_solutions=4)
    assert [s.score for s in found] == pytest.approx([score for score, _ in kept[:4]], abs=1e-6)
    assert all(s.choice in {c for _, c in kept} for s in found)
    if seed < 3:  # ties say the same as covers, over all combinations
        assert brute_force(problem.sites, bounds, fixed=problem.fixed).score == pytest.approx(found[0].score)


def problem_costs(problem, choice):
    names = problem.fixed | problem.sites[0][0].costs
    return {n: problem.fixed.get(n, 0) + sum(s[i].costs[n] for s, i in zip(problem.sites, choice)) for n in names}


def test_spans_are_chosen_and_overlap_in_the_problem():
    options, where = spanned(toy(DEEP))
    problem = drawn(DEEP, where, options, 1)
    assert [s.name for s in where[0].spans] == ["fold 2", "fold 3", "linear 2", "linear 3"]
    assert [[s.name for s in site.spans] for site in where[2:]] == [["fold 2", "linear 2"], []]
    nothing = [[o.name for o in site if o.name.startswith("covered")] for site in problem.sites]
    assert nothing == [[], ["covered 1", "covered 2"], ["covered 1", "covered 2"], ["covered 1"]]
    seen = set()
    for share in (0.35, 0.5, 0.65, 0.8):
        limit = share * sum(problem.parent_costs()[p] for p in PHASES)
        names = solve(problem.sites, [Bound("time", TIME, limit)], fixed=problem.fixed)[0].names
        choice = choice_of(names, where, options)
        assert [name_of(pair) for pair in choice] == list(names)
        seen |= {n.split()[0] for n in names}
    assert "covered" in seen and seen & {"fold", "linear"}


def test_readings_keep_spans_whole():
    options, where = spanned(toy(DEEP))
    problem = drawn(DEEP, where, options, 2)
    for view in VIEWS:
        read = viewed(problem, view)
        for before, after in zip(problem.sites, read):
            for old, new in zip(before, after):
                if old.name.startswith("covered"):
                    assert new.score == 0
                elif not on_its_own(old.name):
                    assert new.score == pytest.approx((view.attention * old.score) ** view.power)
        bound = [Bound("time", TIME, 0.6 * sum(problem.parent_costs()[p] for p in PHASES))]
        picked = solve(read, bound, fixed=problem.fixed)[0].choice
        assert picked in set(covers(where, problem))


@pytest.mark.parametrize("kind", ["depth", "greedy", "random"])
def test_controls_know_no_spans(kind):
    options, where = spanned(toy(DEEP))
    problem = drawn(DEEP, where, options, 3)
    bound = [Bound("time", TIME, 0.6 * sum(problem.parent_costs()[p] for p in PHASES))]
    plain, _ = control_choice(kind, where, options, problem.sites, bound, problem.fixed, None, 0)
    assert all(spec.method not in ("span", "covered") for pair in plain for spec in pair)
    bare = [[Option(o.name, o.score, o.costs) for o in site if on_its_own(o.name)] for site in problem.sites]
    assert control_choice(kind, sites(toy(DEEP)), options, bare, bound, problem.fixed, None, 0)[0] == plain


def by_hand(model, ids, first, last, fold):
    """Features, what the blocks from `first` to `last` add, and roots of weights, float64, from block after block."""
    x = model.embed_tokens(ids)
    rope = model.rope_tables(0, ids.shape[1])
    for index, block in enumerate(model.blocks[: last + 1]):
        if index == first:
            n, begun = F.rms_norm(x, x.shape[-1:], block.norm.weight, block.eps), x
            c = block.mixer.channels(n) if fold else n
        x = block(x, rope.get(getattr(block.spec, "head_dim", 0)))
    root = (2.0 ** -x.double().square().mean(-1, True).log2().round()).sqrt().flatten(0, 1)
    return c.flatten(0, 1).double(), (x - begun).flatten(0, 1).double(), root


@pytest.mark.parametrize("arch", EVERY.values(), ids=EVERY)
def test_the_fit_is_least_squares(arch):
    model = toy(arch)
    _, where = spanned(model)
    batches = [tokens(seed=n) for n in range(4)]
    found = places(model, where, where)
    assert {p.ffn is None for p in found} == {True, False}
    for place, rows in zip(found, fit_spans(model, found, iter(batches))):
        for name, end in place.ends.items():
            parts = [by_hand(model, ids, place.index, end - 1, place.ffn is not None) for ids in batches]
            c, y, root = (torch.cat(each) for each in zip(*parts))
            start = torch.zeros(c.shape[1], y.shape[1]).double()
            if place.ffn is not None:
                start = place.ffn.down.weight.double().T
            if place.block.bias:
                last = torch.zeros(1, y.shape[1]) if place.ffn is None else place.ffn.down.bias[None]
                c, start = torch.cat([c, torch.ones(len(c), 1)], 1), torch.cat([start, last.double()])
            c, y = c * root, y * root
            pull = (RIDGE * c.square().sum(0).mean()).sqrt() * torch.eye(c.shape[1]).double()
            exact = torch.linalg.lstsq(torch.cat([c, pull]), torch.cat([y, pull @ start])).solution
            error, best = ((c @ w - y).square().mean() for w in (rows[name].double(), exact))
            assert (rows[name] - exact).norm() < 2e-2 * exact.norm(), name
            assert error < 1.001 * best + 1e-9 and error < (c @ start - y).square().mean()


def library_of(model, folder, recipe=SPANNED):
    options, where = spanned(model, recipe)
    single = Builder(model, options, statistics(model, 2), Fitting(tokens=0), "independent", folder)
    losses = single.losses(tokens())
    single.store(losses, losses)
    library = Library.open(folder, model)
    library.spans = folder / "spans"
    library.spans.mkdir()
    make_spans(model, places(model, where, where), map(tokens, range(4, 8)), tokens(seed=9), library.spans)
    return options, where, library


def spanning(where, options, at, name):
    """The choice of one span and the parent's own blocks."""
    length = next(s.length for s in where[at].spans if s.name == name)
    names = [pair_name("parent", "parent")] * len(where)
    names[at : at + length] = [name, *(f"covered {length - n}" for n in range(1, length))]
    return choice_of(names, where, options), length


@pytest.mark.parametrize("arch", EVERY.values(), ids=EVERY)
def test_the_child_is_what_its_parts_make(tmp_path, arch):
    model = toy(arch)
    options, where, library = library_of(model, tmp_path)
    ids = tokens(seed=5)
    for at, site in enumerate(where):
        for span in site.spans:
            choice, length = spanning(where, options, at, span.name)
            child = assemble(library, where, choice)
            end = where[at + length - 1].blocks[-1] + 1
            fold = span.name.startswith("fold")
            first = site.ffn if fold else site.blocks[0]
            stored = load_file(library.spans / f"block_{first:03}.safetensors")
            last = "down" if fold else "proj"
            weight, bias = (stored.get(f"{span.name}/{last}.{n}") for n in ("weight", "bias"))
            x = model.run(model.embed_tokens(ids), 0, first)
            block = model.blocks[first]
            n = F.rms_norm(x, x.shape[-1:], block.norm.weight, block.eps)
            x = x + F.linear(block.mixer.channels(n) if fold else n, weight, bias)
            expected = model.final_norm(model.run(x, end)) @ model.head_weight.T
            assert torch.allclose(child(ids), expected, atol=1e-4)
            kinds = [b.spec for b in child.blocks]
            middle = [model.blocks[i].spec for i in site.blocks] if fold else [child.blocks[first].spec]
            assert kinds == [*(b.spec for b in model.blocks[: site.blocks[0]]), *middle, *arch.blocks[end:]]
            assert fold or isinstance(kinds[first], Linear)


def test_a_fit_that_does_not_help_is_taken_back(tmp_path):
    model = toy(DEEP)
    _, where = spanned(model)
    found = places(model, where, where)
    few = torch.randint(0, 61, (1, 2), generator=torch.Generator().manual_seed(3))  # two tokens tell nothing
    make_spans(model, found, iter([few]), tokens(seed=9), tmp_path)
    start = [dict.fromkeys(p.ends, p.start(model.arch.hidden_size)) for p in found]
    own = harms(model, found, tokens(seed=9), start)[0]
    losses, taken = stored_losses(tmp_path), 0
    for place, known in zip(found, own):
        stored = load_file(tmp_path / f"block_{place.index:03}.safetensors")
        for name, harm in known.items():
            before, after = losses[place.index][name]
            assert before == pytest.approx(harm) and after <= before
            if after == before:
                taken += 1
                matrix = stored[f"{name}/{'proj' if place.ffn is None else 'down'}.weight"]
                assert torch.equal(matrix, place.start(model.arch.hidden_size).T)
    assert taken


def test_shares_of_the_work_come_to_the_same(tmp_path):
    model = toy(DEEP)
    _, where = spanned(model)
    for folder, shares in (("one", [where]), ("two", [where[::2], where[1::2]])):
        (tmp_path / folder).mkdir()
        for mine in shares:
            made = places(model, where, mine)
            make_spans(model, made, map(tokens, range(3)), tokens(seed=9), tmp_path / folder)
    assert stored_losses(tmp_path / "one") == stored_losses(tmp_path / "two")
    for file in (tmp_path / "one").glob("*.safetensors"):
        one, two = load_file(file), load_file(tmp_path / "two" / file.name)
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("arch", [DEEP, HYBRID], ids=["deep", "hybrid"])
def test_scores_are_those_of_the_child_and_resume(tmp_path, arch):
    model = toy(arch)
    options, where, library = library_of(model, tmp_path)
    scorer, file, looks = Scorer(model, tokens(4, 24, seed=7), 2), tmp_path / "scores.0.jsonl", []
    rows = score_library(scorer, library, where, options, file, lambda: looks.append(1))
    assert len(looks) == count_measurements(where, options) == len(rows)
    spans = {(r.layer, r.attention, r.ffn): r for r in rows if r.span > 1}
    assert len(spans) == sum(len(site.spans) for site in where)
    scores = compose(rows, "kl")
    for at, site in enumerate(where):
        for span in site.spans:
            names = tuple("parent" if s is None else s.name for s in (span.attention, span.ffn))
            row = spans[site.layer, *names]
            whole = scorer.whole(assemble(library, where, spanning(where, options, at, span.name)[0]))
            assert row.span == span.length and row.kl == pytest.approx(whole["kl"], rel=1e-3, abs=1e-6)
            assert row.kl_se > 0 and scores[site.layer, *names] == max(0.0, row.kl)
    alone = compose([r for r in rows if r.span == 1], "kl")
    assert {key: scores[key] for key in alone} == alone  # spans say nothing of pairs
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: len(lines) // 2]))
    assert score_library(scorer, library, where, options, file) == rows
    assert len(read_jsonl(file)) == len(rows)


def test_streams_are_compared_where_a_span_ends():
    options, where = spanned(toy(DEEP))
    choice, _ = spanning(where, options, 1, "fold 2")
    assert boundaries(where, choice) == [Boundary(2, 2), Boundary(6, 4), Boundary(8, 6)]
    choice, _ = spanning(where, options, 0, "linear 3")
    assert boundaries(where, choice) == [Boundary(6, 1), Boundary(8, 3)]


def test_where_spans_may_begin_in_a_hybrid():
    _, where = spanned(toy(HYBRID))
    assert [(s.attention, s.ffn) for s in where] == [(0, 1), (2, None), (3, 4)]
    assert [[s.name for s in site.spans] for site in where] == [
        ["fold 2", "fold 3", "linear 2", "linear 3"], ["linear 2"], []
    ]  # fmt: skip


def test_what_is_not_possible_is_a_sentence():
    model = toy(DEEP)
    with pytest.raises(IntarsiaError, match=r"options\.spans has 5, but this parent has 4 layers"):
        spanned(model, SPANNED.model_copy(update={"spans": (2, 5)}))
    with pytest.raises(IntarsiaError, match="span_methods has linear, but"):
        spanned(model, SPANNED.model_copy(update={"linear": False}))
    bare = DEEP.replace(blocks=(Attention(4, 2, 8),) * 3)
    with pytest.raises(IntarsiaError, match="span_methods has fold, but no layer of this parent has an FFN"):
        spanned(toy(bare))
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        Options(spans=(1,))
    alone = with_spans(sites(model), all_options(model), Options())
    assert alone == sites(model)  # none are asked for
