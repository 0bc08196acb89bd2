"""Tiny models for the engine's tests: one of every kind of memory."""

import torch

from intarsia.arch import Architecture, Attention, FeedForward, Mamba1, Mamba2, Rope
from intarsia.engine import Engine, Request, Sampling
from intarsia.model import Decoder, initialise

VOCAB = 257
LLAMA = (Attention(4, 2, 8), FeedForward(48), Attention(4, 1, 8), FeedForward(48))
HYBRID = (Mamba2(8, 8, 16, num_groups=2), FeedForward(48), Attention(4, 2, 8), FeedForward(48), Mamba2(4, 16, 8))
WINDOW = Attention(4, 1, 8, sliding_window=20)
EVERYTHING = (Mamba1(64, 8, time_step_rank=4), WINDOW, Mamba2(4, 16, 8), Attention(4, 2, 8))


def tiny(blocks, dtype=torch.float32, seed=0, std=0.3, max_positions=512):
    rope = None if blocks is HYBRID else Rope()
    arch = Architecture(hidden_size=32, vocab_size=VOCAB, blocks=blocks, tied_embeddings=True,
                        max_positions=max_positions, rope=rope)  # fmt: skip
    return initialise(Decoder(arch), seed=seed, std=std).to(dtype).eval()


def engine(model, **options):
    """Small enough pages and chunks that short texts cross many of their borders."""
    return Engine(model, **({"page": 8, "chunk": 16, "max_batch": 6, "budget_bytes": 4 << 20} | options))


def prompt(length, seed=0):
    return tuple(torch.randint(0, VOCAB - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def mixed_requests(count=8, new=12):
    """Requests of many lengths and ways to sample."""
    ways = [
        Sampling(),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.8, top_k=20, seed=2),
        Sampling(temperature=1.3, top_p=0.9, min_p=0.02, seed=3),
        Sampling(temperature=1.0, repetition=1.3, presence=0.2, frequency=0.1, seed=4),
    ]
    lengths = (1, 5, 16, 17, 40, 33, 70, 3)
    top = (None, None, 1, None)
    return [
        Request(prompt(lengths[i % 8], i), new + i % 3, ways[i % 5], logprobs=2, prompt_logprobs=top[i % 4])
        for i in range(count)
    ]


def results(handle):
    """All of an answer that can be compared bit for bit."""
    return [(a.tokens, a.logprobs, a.finish) for a in handle.answers], handle.prompt_logprobs
