"""`import intarsia.hf`: children of unequal blocks in transformers, with its generation and its caches."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import intarsia.hf
from intarsia import formats
from intarsia.arch import Architecture, Attention, Experts, FeedForward, Linear, Mamba1, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.model import Decoder, initialise

CHILD = Architecture(
    hidden_size=32,
    vocab_size=61,
    blocks=(
        FeedForward(24), Attention(4, 2, 8), Linear(), Attention(4, 1, 8, sliding_window=5), FeedForward(40),
        FeedForward(8), Attention(2, 2, 16),
    ),
)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory):
    ours = initialise(Decoder(CHILD.replace(tied_embeddings=request.param)), std=0.3).eval()
    folder = formats.save(ours, tmp_path_factory.mktemp("child") / "child")
    return ours, AutoModelForCausalLM.from_pretrained(folder), folder


def greedy(model, ids, count):
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids


@torch.no_grad()
def test_logits_and_loss(pair):
    ours, theirs, folder = pair
    assert isinstance(theirs, intarsia.hf.IntarsiaForCausalLM)
    assert AutoConfig.from_pretrained(folder).vocab_size == 61
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    out = theirs(ids, labels=ids)
    assert torch.equal(out.logits, ours(ids))
    wanted = torch.nn.functional.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(out.loss) == pytest.approx(float(wanted), abs=1e-5)
    last = torch.nn.functional.linear(ours.hidden(ids)[:, -1:], ours.head_weight)  # rows round as their number is
    assert torch.equal(theirs(ids, logits_to_keep=1).logits, last)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_greedy_decoding(pair, use_cache):
    ours, theirs, _ = pair
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    out = theirs.generate(
        ids, max_new_tokens=12, do_sample=False, use_cache=use_cache, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(out, greedy(ours, ids, 12))


@torch.no_grad()
def test_left_padding_is_invisible(pair):
    ours, theirs, _ = pair
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(2))
    ids[0, :4] = 0
    mask = (ids != 0).long()
    out = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(out[:1, 4:], greedy(ours, ids[:1, 4:], 8))
    assert torch.equal(out[1:], greedy(ours, ids[1:], 8))


@torch.no_grad()
def test_saved_by_transformers_loads_with_us(pair, tmp_path):
    ours, theirs, _ = pair
    theirs.save_pretrained(tmp_path / "again")
    back, _ = formats.load(tmp_path / "again")
    assert back.arch == ours.arch
    assert all(torch.equal(p, dict(ours.named_parameters())[n]) for n, p in back.named_parameters())


HYBRID = CHILD.replace(
    blocks=(
        Mamba2(4, 8, 8, num_groups=2), FeedForward(24), Attention(4, 2, 8), Mamba1(40, time_step_rank=3),
        Attention(2, 1, 16, sliding_window=5), Mamba2(2, 16, 4), FeedForward(8),
    ),
)  # fmt: skip
PUZZLE = CHILD.replace(
    blocks=(
        Mamba2(4, 8, 8), FeedForward(24, "relu2", gated=False), Attention(4, 2, 8, rope=False), Mamba2(2, 8, 12),
        Experts(4, 2, 8, shared_size=12), FeedForward(16, "relu2", gated=False),
    ),
    rope=None, family="nemotron_h_puzzle",
)  # fmt: skip
SCANS = {
    "hybrid": HYBRID, "puzzle": PUZZLE,
    "without attention": HYBRID.replace(blocks=(HYBRID.blocks[0], HYBRID.blocks[3], FeedForward(9))),
}


@pytest.fixture(params=SCANS)
def scans(request, tmp_path):
    ours = initialise(Decoder(SCANS[request.param]), std=0.3).eval()
    folder = formats.save(ours, tmp_path / "child")
    return ours, AutoModelForCausalLM.from_pretrained(folder), folder


@torch.no_grad()
def test_hybrids_generate_from_their_states(scans):
    ours, theirs, _ = scans
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    assert torch.equal(theirs(ids).logits, ours(ids))
    seen = []
    forward = theirs.forward
    theirs.forward = lambda *args, **kwargs: seen.append(kwargs["input_ids"].shape[1]) or forward(*args, **kwargs)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(theirs.generate(ids, **options), greedy(ours, ids, 12))
    assert seen == [9] + [1] * 11
    assert torch.equal(theirs.generate(ids, use_cache=False, **options), greedy(ours, ids, 12))
    ids[0, :4] = 0
    out = theirs.generate(ids, attention_mask=(ids != 0).long(), **options)
    assert torch.equal(out[:1, 4:], greedy(ours, ids[:1, 4:], 12))
    assert torch.equal(out[1:], greedy(ours, ids[1:], 12))


@torch.no_grad()
def test_beams_carry_their_states(scans):
    _, theirs, _ = scans
    ids = torch.randint(1, 61, (2, 7), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(theirs.generate(ids, **options), theirs.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_hybrids_saved_by_transformers_load_with_us(scans, tmp_path):
    ours, theirs, folder = scans
    theirs.save_pretrained(tmp_path / "again")
    back, _ = formats.load(tmp_path / "again")
    assert back.arch == ours.arch
    assert all(torch.equal(p, dict(ours.named_parameters())[n]) for n, p in back.named_parameters())
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.decoder.dtype == torch.bfloat16
    wide = {name.rpartition(".")[2] for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert {"A_log", "D"} <= wide <= {"A_log", "D", "dt_bias", "bias"}
    for name, parameter in ours.named_parameters():
        if name.endswith("A_log"):
            assert torch.equal(half.decoder.get_parameter(name), parameter)


def test_a_cache_without_room_for_states_is_refused(scans):
    _, theirs, _ = scans
    with pytest.raises(IntarsiaError, match="DynamicCache has no place for the state"):
        theirs(torch.ones(1, 3, dtype=torch.long), past_key_values=DynamicCache())
