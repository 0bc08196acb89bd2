"""Models on packed weights: the same answers, in torch and in the native step of decoding."""

import copy

import pytest
import torch

from engine_toys import engine
from intarsia.arch import Architecture, Attention, FeedForward, Linear, Mamba2, Rope
from intarsia.base.errors import IntarsiaError
from intarsia.compress.assemble import with_blocks
from intarsia.engine import Request, generate
from intarsia.engine.generate import next_logits
from intarsia.model import Cache, Decoder, initialise, pack_weights, ready, weight_bytes
from intarsia.model.decode import refusal
from intarsia.model.packed import kinds_of
from intarsia.ops.packed import KINDS
from native_levels import distance, level  # noqa: F401

SIZES = {"hidden_size": 48, "vocab_size": 97, "max_positions": 700}
ARCHITECTURES = {
    "llama": Architecture.transformer(2, Attention(6, 2, 16), FeedForward(72), tied_embeddings=True, **SIZES),
    "biased": Architecture.transformer(
        2, Attention(3, 3, 8, qkv_bias=True, out_bias=True, qk_norm=True), FeedForward(40, "gelu", bias=True), **SIZES
    ),
    "hybrid": Architecture(
        blocks=(Mamba2(4, 24, 16, 2), FeedForward(72, "relu2", gated=False), Attention(6, 2, 16, rope=False),
                Mamba2(6, 8, 16, 3, conv_bias=False, dt_min=0.01, dt_max=0.5), FeedForward(50, "gelu_tanh")),
        rope=None, **SIZES,
    ),
    "mixed windows": Architecture(
        blocks=(Attention(6, 2, 16, sliding_window=600), FeedForward(72), Attention(6, 1, 16, rope=False)),
        rope=Rope(500.0), **SIZES,
    ),
}  # fmt: skip


def model_of(name: str, dtype=torch.bfloat16) -> Decoder:
    model = initialise(Decoder(ARCHITECTURES[name], torch.float32), std=0.2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model.to(dtype).eval()


def exact(model: Decoder) -> Decoder:
    """The float32 model that a packed one stands for."""
    plain = Decoder(model.arch, torch.float32)
    found = dict(model.named_parameters())
    for name, module in model.named_modules():
        if hasattr(module, "packed"):
            found[f"{name}.weight"] = module.weight
            if module.packed.bias is not None:
                found[f"{name}.bias"] = module.packed.bias[: module.packed.outputs]
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(found[name])
    return plain.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(ARCHITECTURES))
@torch.inference_mode()
def test_the_native_step_is_the_model(name, kind, level):  # noqa: F811
    model = pack_weights(model_of(name), kind)
    assert model.native is not None
    plain, ids = exact(model), torch.randint(97, (3, 9), generator=torch.Generator().manual_seed(1))
    cache, held = Cache(model.arch, 3, 12, torch.bfloat16), Cache(model.arch, 3, 12)
    model.hidden(ids[:, :5], cache), plain.hidden(ids[:, :5], held)
    for i in range(5, 9):
        got, wanted = next_logits(model, ids[:, i : i + 1], cache), next_logits(plain, ids[:, i : i + 1], held)
        assert got.dtype == torch.float32 and distance(got, wanted) < 0.03  # the prompt went through bfloat16
    assert cache.length == held.length == 9


@torch.inference_mode()
def test_blocks_of_several_kinds_and_blocks_that_models_share():
    """Bits differ from block to block; a block in two models stays what it is in both."""
    model = model_of("llama")
    first = pack_weights(copy.deepcopy(model), ["int4", "bf16", "int8", "int4"])
    wanted, ids = exact(first), torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(1))
    second = with_blocks(first, [first.blocks[0], first.blocks[3]])
    ready(second)
    less = exact(second)
    for packed, plain in ((first, wanted), (second, less)):
        cache, held = Cache(packed.arch, 2, 12, torch.bfloat16), Cache(packed.arch, 2, 12)
        packed.hidden(ids[:, :5], cache), plain.hidden(ids[:, :5], held)
        for i in range(5, 7):
            got, right = next_logits(packed, ids[:, i : i + 1], cache), next_logits(plain, ids[:, i : i + 1], held)
            assert distance(got, right) < 0.03
    assert first.blocks[0].mixer.q.packed.kind == "int4" and first.embed.packed.kind == "bf16"
    assert first.blocks[0].mixer.q.packed.codes.data_ptr() == second.blocks[0].mixer.q.packed.codes.data_ptr()
    for wrong, part in ((["int4"], "1 kinds of weights are given for 4 blocks"), (["int4"] * 3 + ["int2"], "'int2'")):
        with pytest.raises(IntarsiaError, match=part):
            pack_weights(copy.deepcopy(model), wrong)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "hybrid"])
def test_a_sequence_gets_in_a_batch_what_it_gets_alone(name, level):  # noqa: F811
    model = pack_weights(model_of(name), "int8")
    ids = torch.randint(97, (5, 4), generator=torch.Generator().manual_seed(1))
    together = Cache(model.arch, 5, 8, torch.bfloat16)
    alone = [Cache(model.arch, 1, 8, torch.bfloat16) for _ in range(5)]
    for i in range(4):
        batch = next_logits(model, ids[:, i : i + 1], together)
        single = [next_logits(model, ids[r : r + 1, i : i + 1], cache) for r, cache in enumerate(alone)]
        assert torch.equal(batch, torch.cat(single))


def test_what_is_fragile_is_not_in_four_bits():
    model = pack_weights(model_of("hybrid"), "int4")
    kinds = [block.mixer.out_proj.packed.kind if isinstance(block.spec, Mamba2) else
             (block.mixer.o if isinstance(block.spec, Attention) else block.mixer.down).packed.kind
             for block in model.blocks]  # fmt: skip
    assert kinds == ["int8", "int4", "int4", "int8", "int4"] and model.embed.packed.kind == "int8"
    assert kinds_of(model.arch, "sparse") == ["sparse"] * 5
    assert kinds_of(ARCHITECTURES["llama"], "int4") == ["int8", "int4", "int4", "int4"]


@torch.inference_mode()
def test_pages_in_any_order_and_texts_of_different_length():
    model = pack_weights(model_of("llama"), "int4")
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(97, (n,), generator=generator) for n in (3, 19, 8)]
    pairs = {i: (torch.full((12, 4, 2, 16), torch.nan).bfloat16(), torch.full((12, 4, 2, 16), torch.nan).bfloat16())
             for i in (0, 2)}  # fmt: skip
    tables = torch.randperm(12, generator=generator)[: 3 * 4].view(3, 4).int()
    tables = torch.cat([tables, tables[:, :1]], 1)  # the fifth page of the second text is its own below
    tables[1, 4] = tables[0, 3]
    memory, slots = model.native.memory_of(model, lambda: pairs), torch.zeros(1, dtype=torch.int32)
    for row, text in enumerate(texts):
        cache = Cache(model.arch, 1, 20, torch.bfloat16)
        for i, token in enumerate(text):
            length = torch.tensor([i + 1], dtype=torch.int32)
            paged = model.native(token[None], length, memory, [tables[row][None]], slots)
            assert torch.equal(paged, next_logits(model, token[None, None], cache))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "hybrid"])
def test_the_engine_decodes_natively_what_generation_does(name):
    model = pack_weights(model_of(name), "bf16")
    prompts = [(1, 2, 3), (50, 60, 70, 80, 90, 7), (9,)]
    for prompt, handle in zip(prompts, engine(model).generate([Request(p, 12) for p in prompts])):
        assert handle.answers[0].tokens == generate(model, prompt, 12)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "hybrid"])
def test_prompts_that_are_read_meanwhile_do_not_touch_what_is_decoded(name):
    model = pack_weights(model_of(name), "int8")
    running = engine(model)
    first = running.submit(Request((1, 2, 3), 20))
    for length in (40, 70):
        running.step()
        running.submit(Request(tuple(range(length)), 3))
    while running.step():
        pass
    assert first.answers[0].tokens == generate(model, (1, 2, 3), 20)


@torch.inference_mode()
def test_long_texts_are_read_in_stretches():
    model, plain = pack_weights(model_of("mixed windows"), "int8"), None
    plain = exact(model)
    ids = torch.randint(97, (1, 650), generator=torch.Generator().manual_seed(1))
    cache, held = Cache(model.arch, 1, 600, torch.bfloat16), Cache(model.arch, 1, 600)
    model.hidden(ids[:, :590], cache), plain.hidden(ids[:, :590], held)
    assert model.native.takes(cache)
    assert distance(next_logits(model, ids[:, 590:591], cache), next_logits(plain, ids[:, 590:591], held)) < 0.03
    assert not model.native.takes(Cache(model.arch, 1, 650, torch.bfloat16))  # its window would slide


def test_generation_and_what_packing_refuses():
    model = model_of("llama")
    before, packed = weight_bytes(model), pack_weights(copy.deepcopy(model), "int8")
    assert weight_bytes(packed) < 0.9 * before and packed.dtype == torch.bfloat16
    assert len(generate(packed, [[1, 2, 3], [4, 5, 6]], 20)[1]) == 20
    with pytest.raises(IntarsiaError, match="packed already, as int8"):
        pack_weights(packed, "int4")
    with pytest.raises(IntarsiaError, match="'int2' are not known"):
        pack_weights(model, "int2")
    with pytest.raises(IntarsiaError, match="the cache holds 2 tokens and was asked for 3"):
        cache = Cache(packed.arch, 1, 2, torch.bfloat16)
        for _ in range(3):
            next_logits(packed, torch.tensor([[1]]), cache)


def test_what_the_native_step_refuses(monkeypatch):
    assert "float32" in refusal(pack_weights(model_of("llama", torch.float32), "int8"))
    blocks = (Linear(), Attention(4, 2, 8))
    odd = initialise(Decoder(Architecture(hidden_size=32, vocab_size=97, blocks=blocks), torch.bfloat16))
    assert pack_weights(odd, "int8").native is None and "Linear" in refusal(odd)
    assert len(generate(odd, [1, 2, 3], 4)) == 4
    monkeypatch.setenv("INTARSIA_OPS", "torch")
    assert pack_weights(model_of("llama"), "int8").native is None
