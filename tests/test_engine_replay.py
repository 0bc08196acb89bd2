"""Decoding steps of fixed shapes, as a GPU replays them, give what steps of any shape give."""

import pytest

from engine_toys import EVERYTHING, HYBRID, LLAMA, engine, mixed_requests, prompt, tiny
from intarsia.engine import Request, batch
from intarsia.engine import engine as engines
from intarsia.engine.replay import FixedStep


@pytest.fixture(autouse=True)
def not_exact(monkeypatch):
    """float32 models as if they were not exact: rounding then hides nothing."""
    for module in (batch, engines):
        monkeypatch.setattr(module, "is_exact", lambda model: False)


@pytest.fixture
def widths(monkeypatch):
    """How many rows each step had that ran."""
    seen, run = [], FixedStep.run
    monkeypatch.setattr(FixedStep, "run", lambda self, pieces: (seen.append(self.ids.shape[1]), run(self, pieces))[1])
    return seen


@pytest.mark.parametrize("blocks", [LLAMA, HYBRID, EVERYTHING], ids=["llama", "hybrid", "everything"])
def test_the_same_answers(blocks, widths):
    model = tiny(blocks)
    plain = [[a.tokens for a in h.answers] for h in engine(model).generate(mixed_requests())]
    assert not widths
    found = [[a.tokens for a in h.answers] for h in engine(model, replay=True).generate(mixed_requests())]
    assert found == plain
    assert set(widths) <= {1, 2, 4, 6} and len(set(widths)) > 2  # powers of two, up to the batch


def test_the_same_logits_behind_prompts_of_many_lengths():
    model = tiny(EVERYTHING)
    requests = [Request(prompt(n, seed=n), 6, logprobs=3) for n in (1, 5, 23, 64)]
    plain, found = (engine(model, replay=replay).generate(requests) for replay in (False, True))
    for a, b in zip(plain, found):
        for x, y in zip(a.answers[0].logprobs, b.answers[0].logprobs):
            assert x.token == y.token and x.logprob == pytest.approx(y.logprob, abs=1e-4)


def test_spare_rows_touch_nobodys_memory():
    """Three sequences in four rows: slots and pages that nobody holds stay as they were."""
    made = engine(tiny(HYBRID), replay=True)
    storage = made.storage
    for pair in storage.pairs.values():
        for held in pair:
            held.fill_(7)
    made.generate([Request(prompt(9, seed=n), 4) for n in range(3)])
    used_slots, used_pages = 6, 12
    for index, (first, second) in storage.pairs.items():
        untouched = used_slots if index in storage.mamba else used_pages
        for held in (first, second):
            assert held[untouched:-1].eq(7).all() and not held[-1].eq(7).all(), index  # the last is the spare one


def test_a_budget_of_pages_is_the_same_with_and_without():
    sizes = [{w: pool.size for w, pool in engine(tiny(LLAMA), replay=r).storage.pages.items()} for r in (False, True)]
    assert sizes[0] == sizes[1]
