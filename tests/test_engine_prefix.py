"""The memory of read prompts: the same answers with it, and much less to read."""

import pytest
import torch

from engine_toys import EVERYTHING, HYBRID, LLAMA, engine, prompt, results, tiny
from intarsia.engine import Request, Sampling

MODELS = {"llama": LLAMA, "hybrid": HYBRID, "everything": EVERYTHING}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return tiny(MODELS[request.param])


def conversation(running, turns=3, opening=150):
    """Every turn's prompt is all that was said before, and a little more."""
    text, handles = prompt(opening), []
    for turn in range(turns):
        handle = running.generate([Request(text, 10, Sampling(temperature=1.0, seed=turn), logprobs=1)])[0]
        handles.append(handle)
        text = (*text, *handle.answers[0].tokens, *prompt(9, 100 + turn))
    return handles


def test_a_conversation_reads_only_what_is_new_and_says_the_same(model):
    with_memory, without = engine(model), engine(model, prefix_bytes=0)
    handles, plain = conversation(with_memory), conversation(without)
    assert [results(h) for h in handles] == [results(h) for h in plain]
    assert [h.cached_tokens for h in plain] == [0, 0, 0]
    assert [h.cached_tokens for h in handles] == [0, 144, 160]  # whole chunks of 16 of 150 and 169 tokens
    read = [len(h.request.prompt) - h.cached_tokens for h in handles]
    assert max(read[1:]) * 5 <= read[0]
    assert with_memory.stats()["read_tokens"] == sum(read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_token_of_a_second_turn_comes_after_a_fifth_of_the_work(dtype):
    """Counted in tokens that the hybrid reads and in steps until the token is there."""
    model, read, steps = tiny(HYBRID, dtype), [], []
    for prefix_bytes in (None, 0):
        running = engine(model, prefix_bytes=prefix_bytes)
        first = running.generate([Request(prompt(200), 10)])[0]
        before = running.stats()
        second = running.submit(Request((*prompt(200), *first.answers[0].tokens, *prompt(9, 1)), 5))
        while not second.answers[0].tokens:
            running.step()
        read.append(running.stats()["read_tokens"] - before["read_tokens"])
        steps.append(running.stats()["passes"] - before["passes"])
    assert 5 * read[0] <= read[1] == 219 and 5 * steps[0] <= steps[1]


def test_an_answer_is_remembered_too_where_bits_need_not_be_the_same():
    for blocks in MODELS.values():
        running, text = engine(tiny(blocks, torch.bfloat16)), prompt(40)
        first = running.generate([Request(text, 60)])[0]
        second = running.generate([Request((*text, *first.answers[0].tokens, 1, 2), 5)])[0]
        assert second.cached_tokens == 96  # whole chunks of the 99 tokens that were fed
        snapshots = sum(node.snapshot is not None for node in running.tree._nodes())
        assert snapshots <= 3  # after the two prompts and after the answer, not after each of its chunks


@pytest.mark.parametrize("blocks, ends", [(LLAMA, [64, 100]), (HYBRID, [64, 96, 100])])
def test_a_step_reads_several_chunks_up_to_where_a_state_is_kept(blocks, ends):
    """A hybrid's state is kept behind the last whole chunk, and a prompt that goes on from there is read from there."""
    running, text = engine(tiny(blocks, torch.bfloat16), read=64), prompt(100)
    handle, read = running.submit(Request(text, 3)), []
    while not handle.answers[0].tokens:
        running.step()
        read.append(running.stats()["read_tokens"])
    assert read == ends
    longer = running.generate([Request((*text, *prompt(20, 1)), 3)])[0]
    assert longer.cached_tokens == 96
    exact = engine(tiny(blocks), read=64)
    exact.submit(Request(text, 3))
    exact.step()
    assert exact.stats()["read_tokens"] == 16


def test_prompts_that_share_a_beginning_meet_where_they_part(model):
    """The first two show where they part; a snapshot is kept there, and the third starts from it."""
    running, shared = engine(model), prompt(64)
    handles = [running.generate([Request((*shared, *prompt(30, i)), 3)])[0] for i in range(1, 4)]
    assert handles[2].cached_tokens == 64
    plain = engine(model, prefix_bytes=0)
    for handle in handles:
        assert results(plain.generate([handle.request])[0]) == results(handle)


def test_the_budget_is_kept_and_everything_can_be_given_back(model):
    one = engine(model)
    each = sum(one.storage.page_bytes.values()) * 2
    running = engine(model, prefix_bytes=4 * each + 2 * one.storage.slot_bytes)
    for i in range(8):
        running.generate([Request(prompt(70, i), 2)])
        assert sum(running.tree.bytes.values()) <= running.tree.budget
    held = running.storage.bytes
    assert held == {"pages": running.tree.bytes["pages"], "slots": running.tree.bytes["states"]}
    running.tree.clear()
    assert running.storage.bytes == {"pages": 0, "slots": 0}


def test_the_tree_gives_way_to_running_sequences(model):
    one = engine(model)
    page = sum(one.storage.page_bytes.values())
    running = engine(model, snapshots=1, max_batch=2, budget_bytes=3 * one.storage.slot_bytes + 20 * page)
    handles = [running.submit(Request(prompt(60 + i, i), 30)) for i in range(8)]
    while running.step():
        pass
    plain = engine(model, prefix_bytes=0)
    assert [results(h) for h in handles] == [results(h) for h in plain.generate([h.request for h in handles])]


def test_a_prompt_whose_logprobs_are_wanted_is_read_whole(model):
    running = engine(model)
    first = running.generate([Request(prompt(50), 3, prompt_logprobs=1)])[0]
    again = running.generate([Request(prompt(50), 3, prompt_logprobs=1)])[0]
    assert again.cached_tokens == 0 and results(again) == results(first)
    assert running.generate([Request(prompt(50), 3)])[0].cached_tokens == 48
