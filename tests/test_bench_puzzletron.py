"""What bench/puzzletron.py makes of Puzzletron's answers: its checkpoints as ours, memory as both count it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from intarsia.arch import Architecture, Attention, FeedForward, memory_bytes
from intarsia.base.errors import IntarsiaError
from intarsia.engine.scenario import Scenario
from intarsia.formats import load, save
from intarsia.model import Decoder, initialise

BENCH = str(Path(__file__).parents[1] / "bench")
FULL = Architecture.transformer(
    3, Attention(4, 2, 16), FeedForward(96), hidden_size=64, vocab_size=50, max_positions=32, tied_embeddings=True
)


def layer(kv: int | None, width: int | None) -> dict:
    """One entry of block_configs, None for a block that is absent."""
    rest = {"replace_with_linear": False, "sparsify": None, "weights_precision": "bf16"}
    return {
        "attention": {"no_op": kv is None, "num_key_value_heads": kv, "llama4": None, "mamba": None, **rest},
        "ffn": {"no_op": width is None, "intermediate_size": width, "moe": None, **rest},
        "parallel_blocks": None,
    }


# The second and third layer have one block each, which a folding by pairs would take for one layer.
LAYERS = [layer(1, 32), layer(2, None), layer(None, 96)]
BLOCKS = (Attention(4, 1, 16), FeedForward(32), Attention(4, 2, 16), FeedForward(96))
ORIGINS = [0, 1, 2, 5]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import puzzletron

    return puzzletron


def written(folder: Path, model: Decoder) -> None:
    """A checkpoint as Puzzletron realises it: config.json, and a file for every sub-block behind an index."""
    slots = {"norm": ("input_layernorm", "post_attention_layernorm"), "mixer": ("self_attn", "mlp")}
    outer = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    tensors = {}
    for name, parameter in model.named_parameters():
        if name.startswith("blocks."):
            _, block, part, *rest = name.split(".")
            place, second = divmod(ORIGINS[int(block)], 2)
            part = slots[part][second] + "".join(f".{word}_proj" for word in rest[:-1])
            name = f"model.layers.{place}.{part}.weight"
        tensors[outer.get(name, name)] = parameter.detach()
    (folder / "subblocks_safetensors").mkdir(parents=True)
    weight_map = {name: f"subblocks_safetensors/{n}.safetensors" for n, name in enumerate(tensors)}
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"block_configs": LAYERS}))


def test_block_configs_become_blocks_and_where_they_come_from(bench):
    arch, origins = bench.child_of(FULL, LAYERS)
    assert arch.blocks == BLOCKS and origins == ORIGINS
    assert arch.replace(blocks=FULL.blocks, family=FULL.family) == FULL


@pytest.mark.parametrize("change", [{"replace_with_linear": True}, {"moe": {"num_local_experts": 4}}])
def test_other_blocks_are_refused(bench, change):
    odd = layer(2, 96)
    odd["ffn"] |= change
    with pytest.raises(IntarsiaError, match="layer 1 has a block that is not read"):
        bench.child_of(FULL, [LAYERS[0], odd, LAYERS[2]])
    with pytest.raises(IntarsiaError, match="2 layers, the parent has 3"):
        bench.child_of(FULL, LAYERS[:2])


def test_its_checkpoint_is_the_same_model_in_ours(bench, tmp_path):
    torch.manual_seed(0)
    model = initialise(Decoder(FULL.replace(blocks=BLOCKS), torch.bfloat16))
    written(tmp_path / "theirs", model)
    save(bench.read_child(FULL, tmp_path / "theirs"), tmp_path / "ours")
    ids = torch.randint(50, (2, 16))
    assert torch.equal(load(tmp_path / "ours")[0](ids), model(ids))


def test_a_tensor_that_does_not_fit_is_named(bench, tmp_path):
    written(tmp_path, initialise(Decoder(FULL.replace(blocks=BLOCKS), torch.bfloat16)))
    (tmp_path / "config.json").write_text(json.dumps({"block_configs": [layer(1, 48), *LAYERS[1:]]}))
    with pytest.raises(IntarsiaError, match=r"model\.layers\.0\.mlp\.\w+_proj\.weight .* is needed"):
        bench.read_child(FULL, tmp_path)


def test_memory_as_puzzletron_counts_it(bench):
    scenario = Scenario(2, 20, 4)
    mib = bench.budget_mib(FULL, scenario, 0.5)
    assert mib * 2**20 == 0.5 * memory_bytes(FULL, 24, 2) + 50 * 64 * 2  # the head that it counts and nobody stores
    untied = FULL.replace(tied_embeddings=False)
    assert bench.budget_mib(untied, scenario, 0.5) * 2**20 == 0.5 * memory_bytes(untied, 24, 2)


def test_fewer_kv_heads_as_group_sizes(bench):
    assert bench.fewer_kv_heads(Attention(9, 3, 64)) == [9]
    assert bench.fewer_kv_heads(Attention(32, 8, 64)) == [8, 16, 32]
    assert bench.fewer_kv_heads(Attention(4, 1, 64)) == []
