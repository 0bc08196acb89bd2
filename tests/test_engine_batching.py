"""Continuous batching: every sequence gets what it gets alone, and no request is lost."""

import pytest
import torch

from engine_toys import EVERYTHING, HYBRID, LLAMA, engine, mixed_requests, prompt, results, tiny
from intarsia.arch import Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.engine import Request, Sampling, generate

MODELS = {"llama": LLAMA, "hybrid": HYBRID, "everything": EVERYTHING, "mamba": (Mamba2(4, 16, 8),)}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return tiny(MODELS[request.param])


def alone(model, requests, **options):
    return [results(engine(model, **options).generate([r])[0]) for r in requests]


def test_a_batch_gives_what_each_request_gives_alone_bit_for_bit(model):
    requests = mixed_requests()
    together = engine(model).generate(requests)
    assert [results(h) for h in together] == alone(model, requests)
    assert len({tuple(h.answers[0].tokens) for h in together}) == len(requests)


def test_greedy_answers_are_those_of_plain_generation(model):
    requests = [Request(prompt(n, n), 20) for n in (1, 15, 16, 50)]
    for handle in engine(model).generate(requests):
        assert handle.answers[0].tokens == generate(model, handle.request.prompt, 20)
        assert handle.answers[0].finish == "length"


def test_requests_that_come_and_go_between_steps_change_nothing(model):
    requests = mixed_requests()
    busy = engine(model, max_batch=3)
    handles, left = [], None
    for i, request in enumerate(requests):
        handles.append(busy.submit(request))
        if i == 3:
            left = busy.submit(Request(prompt(30), 40))
        busy.step()
    busy.cancel(left)
    while busy.step():
        pass
    assert [results(h) for h in handles] == alone(model, requests)
    assert left.answers[0].finish == "cancelled" and len(left.answers[0].tokens) < 40
    assert busy.stats()["running"] == 0


@pytest.mark.parametrize("blocks", [LLAMA, HYBRID, EVERYTHING], ids=("llama", "hybrid", "everything"))
def test_a_preempted_sequence_reads_its_text_again_and_goes_on_as_if_nothing_had_been(blocks):
    model = tiny(blocks)
    requests = [Request(prompt(20 + i, i), 40, Sampling(temperature=1.0, seed=i), logprobs=1) for i in range(6)]
    small = engine(model, snapshots=0)
    page = sum(small.storage.page_bytes.values())
    small = engine(model, snapshots=0, budget_bytes=small.storage.slot_bytes * 6 + 16 * page)
    assert small.storage.pages[None].size == 16  # 128 tokens for texts of 60
    handles = small.generate(requests)
    assert small.stats()["preemptions"] > 0
    assert [results(h) for h in handles] == alone(model, requests)
    small.tree.clear()
    assert small.storage.bytes == {"pages": 0, "slots": 0}


def test_several_answers_share_the_reading_of_their_prompt(model):
    ask = Request(prompt(45), 10, Sampling(temperature=1.0, seed=7), n=4, logprobs=0)
    one = engine(model)
    handle = one.generate([ask])[0]
    assert one.stats()["read_tokens"] == 45
    assert len({tuple(a.tokens) for a in handle.answers}) == 4
    crowded = engine(model, max_batch=4)
    others = [crowded.submit(r) for r in mixed_requests(3)]
    again = crowded.submit(ask)
    while crowded.step():
        pass
    assert results(again) == results(handle)
    assert all(h.done for h in others)


def test_a_window_gives_its_pages_back():
    model = tiny(EVERYTHING)
    running = engine(model, prefix_bytes=0)
    running.submit(Request(prompt(100), 60))
    most = 0
    while running.step():
        most = max(most, running.storage.pages[20].used)
        assert running.storage.pages[20].used <= running.scheduler.most_pages(160)[20]
    assert 0 < most < 160 // 8
    assert running.storage.bytes == {"pages": 0, "slots": 0}


def test_bfloat16_runs_everything_in_one_pass_a_step():
    model = tiny(EVERYTHING, torch.bfloat16)
    running = engine(model)
    handles = running.generate([Request(prompt(n, n), 10) for n in (1, 7, 20, 40)])
    assert all(len(h.answers[0].tokens) == 10 for h in handles)
    assert running.statistics.passes == running.statistics.steps


def test_a_full_house_queues():
    running = engine(tiny(LLAMA), max_batch=2)
    handles = [running.submit(Request(prompt(5, i), 5)) for i in range(7)]
    running.step()
    assert running.stats()["running"] == 2 and running.stats()["queued"] == 5
    while running.step():
        pass
    assert all(h.done for h in handles)


@pytest.mark.parametrize(
    "request_, sentence",
    [
        (Request((), 5), "nothing to do"),
        (Request((1,), 0), "nothing to do"),
        (Request((1, 400), 5), "use the model's own tokenizer"),
        (Request((1,) * 500, 50), "the model's context is 512"),
        (Request((1,), 5, n=99), "ask for 1 to 6"),
        (Request((1,), 5, stop=("a",)), "need a tokenizer"),
    ],
)
def test_what_can_never_be_answered_is_refused_in_a_sentence(request_, sentence):
    with pytest.raises(IntarsiaError, match=sentence):
        engine(tiny(LLAMA)).submit(request_)


def test_a_text_longer_than_the_cache_is_refused():
    model = tiny(LLAMA)
    small = engine(model, snapshots=0, budget_bytes=8 * sum(engine(model).storage.page_bytes.values()))
    with pytest.raises(IntarsiaError, match="ask for at most 64 tokens"):
        small.submit(Request(prompt(60), 10))
    with pytest.raises(IntarsiaError, match="is too small"):
        engine(model, budget_bytes=100)
