"""`import intarsia.hf`: children of unequal blocks in transformers, with its generation and its caches."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import intarsia.hf
from intarsia import formats
from intarsia.arch import Architecture, Attention, FeedForward, Linear
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
    assert torch.equal(theirs(ids, logits_to_keep=1).logits, ours(ids)[:, -1:])


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
