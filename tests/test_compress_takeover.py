"""What is left out is taken over: against models put together by hand, where nothing can be, and when resumed."""

import pytest
import torch

from compress_toys import SMALL, all_options, sites, tokens, toy
from intarsia.arch import Architecture, Attention, Experts, FeedForward
from intarsia.compress.assemble import with_blocks
from intarsia.compress.mend import with_matrices
from intarsia.compress.ridges import checked_rows, fitted, inner
from intarsia.compress.score import Scorer, score_library
from intarsia.compress.takeover import Takeover
from intarsia.compress.trainees import last_matrix
from test_compress_mend import EVERY
from test_compress_score import library_of

SEEN, ROWS, STRIDE = tokens(16, 24, seed=5), tokens(128, 24), 1


def scored(model, folder, rows=ROWS, **more):
    library, where = library_of(model, folder), sites(model)
    takeover = None if rows is None else Takeover(model, SEEN, rows)
    file = folder / f"{'alone' if rows is None else 'taken'}.jsonl"
    given = (Scorer(model, SEEN, STRIDE), library, where, all_options(model), file)
    found = score_library(*given, takeover=takeover, **more)
    return {(r.layer, r.attention, r.ffn): r for r in found}


@torch.no_grad()
def by_hand(model, gone):
    """The model without neighbouring blocks, the one before them fitted to what is missing."""
    before, end = gone[0] - 1, gone[-1] + 1
    block, x = model.blocks[before], model.run(model.embed_tokens(ROWS), 0, before)
    tables = model.rope_tables(0, ROWS.shape[1]).get(getattr(block.spec, "head_dim", 0))
    here, there = block(x, tables), model.run(x, before, end)
    matrix = fitted(inner(block, x, tables), [there - here], here, checked_rows(len(ROWS), x.device))[0]
    child = with_blocks(model, [b for n, b in enumerate(model.blocks) if n not in gone])
    return child if matrix is None else with_matrices(child, {before: last_matrix(block.mixer).weight + matrix.T})


@pytest.mark.parametrize("name", EVERY)
def test_a_score_is_that_of_the_model_whose_block_before_was_fitted(tmp_path, name):
    model = toy(EVERY[name])
    taken, alone = scored(model, tmp_path), scored(model, tmp_path, None)
    better, scorer = 0, Scorer(model, SEEN, STRIDE)
    for (layer, attention, ffn), row in taken.items():
        if not {attention, ffn} & {"none"} or not {attention, ffn} <= {"none", "parent"}:
            continue
        site = sites(model)[layer]
        left = [i for i, name in ((site.attention, attention), (site.ffn, ffn)) if name == "none"]
        if left[0] == 0:  # nothing stands before the first block
            assert row.kl == pytest.approx(alone[layer, attention, ffn].kl, rel=1e-3)
        else:
            assert row.kl == pytest.approx(scorer.whole(by_hand(model, left))["kl"], rel=5e-3, abs=1e-4)
            better += row.kl < alone[layer, attention, ffn].kl
    assert better >= 0.7 * 3 * (len(sites(model)) - 1)


def test_what_is_left_out_before_another_option_is_taken_over_as_well(tmp_path):
    model = toy(EVERY["plain"])
    site, library = sites(model)[1], library_of(model, tmp_path)
    narrow = library.block(site.ffn, next(s for s in all_options(model)[site.ffn] if s.method == "prefix"))
    takeover = Takeover(model, SEEN, ROWS)
    for each in sites(model)[:2]:
        takeover.enter(each)
    child = by_hand(model, [site.attention])
    with torch.no_grad():
        wanted = child.run(child.embed_tokens(SEEN), 0, site.attention)
        torch.testing.assert_close(takeover.stream([None, narrow]), narrow(wanted, None), rtol=1e-4, atol=1e-4)
        # An option of the attention takes over what is left out behind it, with its own channels.
        thin = library.block(site.attention, next(s for s in all_options(model)[site.attention] if s.method == "drop"))
        moved, plain = takeover.stream([thin, None]), takeover.stream([thin, model.blocks[site.ffn]])
    x = model.run(model.embed_tokens(SEEN), 0, site.attention)
    bare = thin(x, model.rope_tables(0, SEEN.shape[1])[8])
    assert 0 < (moved - plain).norm() < (bare - plain).norm()


def test_experts_take_nothing_over(tmp_path):
    experts = Experts(4, 2, 8)
    model = toy(Architecture(blocks=(Attention(4, 2, 8), experts, Attention(4, 2, 8), FeedForward(24)), **SMALL))
    takeover = Takeover(model, SEEN, ROWS)
    for site in sites(model):
        takeover.enter(site)
    with torch.no_grad():
        x = model.run(model.embed_tokens(SEEN), 0, 2)
    torch.testing.assert_close(takeover.stream([None, None]), x)


def test_ranks_and_resumed_runs_find_the_same(tmp_path):
    model = toy(EVERY["plain"])
    whole, where = scored(model, tmp_path), sites(model)
    file = tmp_path / "taken.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: len(lines) // 2]))
    assert scored(model, tmp_path) == whole and file.read_text() == "".join(lines)
    file.unlink()
    parts = {}
    for mine in (where[::2], where[1::2]):
        parts |= scored(model, tmp_path, mine=mine)
        file.unlink()
    assert parts == whole
