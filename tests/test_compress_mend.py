"""Blocks fitted to each other: against least squares in float64, against the child as it was, and where nothing is."""

import pytest
import torch
from scipy.optimize import minimize

from compress_toys import ALL, SMALL, all_options, statistics, tokens, toy
from intarsia.arch import Architecture, Attention, Experts, FeedForward, Linear, Mamba2
from intarsia.base.files import read_json
from intarsia.compress import mend as mending
from intarsia.compress.assemble import with_blocks
from intarsia.compress.mend import reach, with_matrices
from intarsia.compress.options import COVERED, NONE, PARENT, OptionSpec, Site
from intarsia.compress.recipe import Options
from intarsia.compress.ridges import CHECKED, RIDGES
from intarsia.compress.surgery import make_option
from intarsia.compress.trainees import channels_of, last_matrix
from intarsia.evaluate import compare
from intarsia.ops.norm import rms_norm
from tiny_compression import compress, make_parent, make_recipe, make_text

MIXED = Architecture(
    blocks=(Mamba2(4, 8, 8), FeedForward(24), Attention(4, 2, 8), FeedForward(24, "relu2", gated=False)) * 2,
    tied_embeddings=True, **SMALL,
)  # fmt: skip
EVERY = {name: arch.replace(blocks=arch.blocks * 2) for name, arch in ALL.items()} | {"mixed": MIXED}


def mend(parent, child, ends, rows, **how):
    """One child alone."""
    return mending.mend(parent, [(child.blocks, ends)], rows, **how)[0]


def narrower(model, index):
    """The block with half of its FFN's channels."""
    found = statistics(model)
    spec = next(s for s in all_options(model, Options(ffn_widths=(0.5,), multiple=4))[index] if s.method == "prefix")
    order = torch.arange(spec.block.intermediate_size * 2)
    return make_option(model.blocks[index], spec, model.arch, found[index], order).eval()


def cut(model):
    """A child whose second FFN is half as wide and whose last but one layer has no attention; where its blocks end."""
    ffns = [i for i, block in enumerate(model.arch.blocks) if isinstance(block, FeedForward)]
    gone = len(model.blocks) - 4
    kept = [i for i in range(len(model.blocks)) if i != gone]
    blocks = [narrower(model, i) if i == ffns[1] else model.blocks[i] for i in kept]
    return with_blocks(model, blocks), [*kept[1:], len(model.blocks)]


def stream(model, ids, ends):
    """The parent's stream at every end."""
    x, found, at = model.embed_tokens(ids), [], 0
    for end in ends:
        x, at = model.run(x, at, end), end
        found.append(x)
    return found


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_a_mended_child_is_nearer_to_its_parent_on_other_text(name):
    model = toy(EVERY[name])
    child, ends = cut(model)
    matrices = mend(model, child, ends, tokens(256, 32))
    made = with_matrices(child, matrices)
    other = tokens(64, 32, seed=9)
    before, after = (compare(model, m, other)["kl"]["value"] for m in (child, made))
    assert after < 0.95 * before
    # Block by block: behind each that was fitted, the stream is nearer than behind the one that was not, on its input.
    wanted, x = stream(model, other, ends), model.embed_tokens(other)
    rope = made.rope_tables(0, 32)
    for index, (old, new, p) in enumerate(zip(child.blocks, made.blocks, wanted)):
        tables = rope.get(getattr(old.spec, "head_dim", 0))
        if index in matrices:
            size = p.square().mean(-1, keepdim=True).sqrt()
            far = [float(((p - block(x, tables)) / size).square().sum()) for block in (old, new)]
            assert far[1] < far[0]
        x = new(x, tables)


@pytest.mark.parametrize("name", EVERY)
def test_beside_one_pass_of_the_parent_each_comes_to_what_it_comes_to_alone(name):
    model, rows = toy(EVERY[name]), tokens(32, 32)
    whole = list(range(1, len(model.blocks) + 1))
    several = [cut(model), (model, whole), (with_blocks(model, model.blocks[1:]), whole[1:]),
               (with_blocks(model, [*model.blocks[:1], *model.blocks[3:]]), [3, *whole[3:]])]  # fmt: skip
    found = mending.mend(model, [(iter(child.blocks), ends) for child, ends in several], rows)
    assert not found[1] and all(map(len, (found[0], found[3])))
    for (child, ends), matrices in zip(several, found, strict=True):
        alone = mend(model, child, ends, rows)
        assert alone.keys() == matrices.keys() and all(torch.equal(alone[n], matrices[n]) for n in alone)


@torch.no_grad()
def test_the_first_block_that_is_not_the_parents_is_the_first_that_moves():
    model = toy(EVERY["plain"])
    child, ends = cut(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    matrices = mend(model, child, ends, tokens(64, 32))
    assert min(matrices) == 3 and set(matrices) <= set(range(3, len(child.blocks)))
    made = with_matrices(child, matrices)
    assert all(made.blocks[i] is model.blocks[i] for i in range(3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert mend(model, model, range(1, len(model.blocks) + 1), tokens(8, 32)) == {}


@torch.no_grad()
@pytest.mark.parametrize("sinks", [False, True])
def test_the_first_fit_in_float64(sinks):
    """Of one block with all rows in one fit: the mixture of ridge regressions of the weighed errors."""
    model = toy(EVERY["biased"])
    child, ends = cut(model)
    ids = tokens(64, 32)
    matrices = mend(model, child, ends, ids, sinks=sinks)
    index = min(matrices)
    block, start = child.blocks[index], child.run(child.embed_tokens(ids), 0, index)
    c = channels_of(block.mixer, rms_norm(start, block.norm.weight, block.eps), None)
    p = model.run(model.embed_tokens(ids), 0, ends[index])
    missing = p - start - last_matrix(block.mixer)(c)
    size = p.double().square().mean(-1, keepdim=True)
    if sinks:
        size[:, 0] /= 32
    weight = torch.exp2(-(size.log2() / 2).round())
    checked = torch.arange(64) % CHECKED == CHECKED - 1

    def moments(some):
        x, e = ((t[some].double() * weight[some]).flatten(0, 1) for t in (c, missing))
        return x.T @ x, x.T @ e

    (gram, cross), (other, told) = moments(~checked), moments(checked)

    def solved(g, r):
        eye = torch.eye(len(g), dtype=torch.float64)
        return [torch.linalg.solve(g + ridge * g.diagonal().mean() * eye, r) for ridge in RIDGES]

    made = solved(gram, cross)
    alike = torch.tensor([[float((a * (other @ b)).sum()) for b in made] for a in made], dtype=torch.float64)
    gain = torch.tensor([float((a * told).sum()) for a in made], dtype=torch.float64)
    scale, limits = float(alike.diagonal().mean()), [{"type": "ineq", "fun": lambda mix: 1 - mix.sum()}]
    left = lambda mix: float(mix @ alike.numpy() @ mix - 2 * mix @ gain.numpy()) / scale  # noqa: E731
    mix = minimize(left, [0.25] * 4, method="SLSQP", bounds=[(0, 1)] * 4, constraints=limits, tol=1e-12).x
    moved = sum(share * fit for share, fit in zip(mix, solved(gram + other, cross + told)))
    wanted = last_matrix(block.mixer).weight.double() + moved.T
    torch.testing.assert_close(matrices[index].double(), wanted, rtol=2e-2, atol=2e-3)


def test_a_block_answers_for_all_that_left_behind_it():
    kept, none = OptionSpec("ffn 8", FeedForward(8), PARENT), OptionSpec("none", None, NONE)
    where = [Site(n, 2 * n, 2 * n + 1) for n in range(4)]
    assert reach(where, [(kept, kept)] * 4, 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert reach(where, [(kept, none), (none, none), (none, kept), (kept, none)], 8) == [5, 6, 8]
    covered = OptionSpec("covered", None, COVERED)
    assert reach(where, [(kept, kept), (covered, covered), (kept, kept), (kept, kept)], 8) == [1, 4, 5, 6, 7, 8]
    assert reach([Site(0, None, 0), Site(1, 1, 2)], [(None, kept), (kept, none)], 3) == [1, 3]


@torch.no_grad()
def test_linear_blocks_are_fitted_and_experts_pass():
    model = toy(EVERY["plain"])
    line, experts = toy(model.arch.replace(blocks=(Linear(bias=True), Experts(4, 2, 8)))).blocks
    child = with_blocks(model, [{2: line, 3: experts}.get(i, b) for i, b in enumerate(model.blocks)])
    ends = list(range(1, len(model.blocks) + 1))
    assert set(mend(model, child, ends, tokens(64, 32))) & {2, 3} == {2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mending")
    parent, data = make_parent(folder / "parent"), make_text(folder / "text")
    recipe = make_recipe(folder / "tiny.toml", data, target="memory = '70%'")
    words = (parent, "--recipe", recipe, "--controls", "--set", "tournament.finalists=1")
    for name, tokens_ in (("mended", 4096), ("not", 0)):
        status, _, err = compress(*words, "--set", f"mend.tokens={tokens_}", "--out", folder / name)
        assert status == 0, err
    return folder, words


def test_every_model_of_a_run_is_mended_and_says_so(finished):
    folder, words = finished
    mended, plain = (read_json(folder / name / "summary.json") for name in ("mended", "not"))
    for one, other in [(mended, plain), *((mended["controls"][n], plain["controls"][n]) for n in plain["controls"])]:
        assert one["kl_assembled"] == pytest.approx(other["kl_assembled"]) == other["kl_before_distillation"]
        assert one["kl_before_distillation"] <= one["kl_assembled"]
    assert mended["kl_before_distillation"] < 0.98 * plain["kl_before_distillation"]
    # What stands is asked for once: the same command has nothing to do.
    status, out, _ = compress(*words, "--set", "mend.tokens=4096", "--out", folder / "mended")
    assert status == 0 and "mend-child: already done" in out and "distill-child: already done" in out


@pytest.mark.parametrize("saved", [False, True])
def test_what_does_harm_is_done_again_for_first_tokens_or_undone(saved, finished, monkeypatch, capsys, tmp_path):
    from intarsia.cli import main
    from intarsia.compress import children

    _, words = finished

    def spoilt(*args, sinks):
        found = mending.mended(*args, sinks=sinks)
        return found if sinks and saved else {index: 3 * matrix for index, matrix in found.items()}

    monkeypatch.setattr(children, "mended", spoilt)
    assert main(["compress", *map(str, words), "--set", "mend.tokens=4096", "--out", str(tmp_path / "run")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "mending child did harm" in line]
    ways = [line.split(" nats, and is ")[1] for line in lines]
    assert ways == ["done again for its first tokens.", "undone."][: 2 - saved]
    told = read_json(tmp_path / "run" / "summary.json")
    assert (told["kl_before_distillation"] < told["kl_assembled"]) == saved


def test_a_finalist_that_wins_is_not_mended_again(finished, monkeypatch, tmp_path):
    """Its matrices are those that it learned from in the tournament, and nothing of it stays in the run."""
    from intarsia.cli import main

    _, words = finished
    made, real = [], mending.mend

    def counted(*args):
        found = real(*args)
        made.extend(found)
        return found

    monkeypatch.setattr(mending, "mend", counted)
    settings = ("--set", "mend.tokens=4096", "--set", "mend.search_tokens=0", "--set", "tournament.finalists=2")
    assert main(["compress", *map(str, words), *settings, "--out", str(tmp_path / "run")]) == 0
    controls = read_json(tmp_path / "run" / "summary.json")["controls"]
    assert len(made) == 2 + len(controls)
    child = mending.stored_matrices(tmp_path / "run" / "stages" / "mend-child")
    assert any(child.keys() == each.keys() and all(torch.equal(child[n], each[n]) for n in child) for each in made[:2])
    assert not (tmp_path / "run" / mending.KEPT).exists()
