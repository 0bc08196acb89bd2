"""Bad checkpoints get a sentence that names the file and what to do."""

import json

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from intarsia import formats
from intarsia.arch import Architecture, Attention, FeedForward
from intarsia.base.errors import IntarsiaError
from intarsia.model import Decoder, initialise

ARCH = Architecture.transformer(2, Attention(4, 2, 8), FeedForward(40), hidden_size=32, vocab_size=50)


@pytest.fixture
def folder(tmp_path):
    return formats.save(initialise(Decoder(ARCH)), tmp_path / "model")


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def refused(path, *words, **options):
    with pytest.raises(IntarsiaError) as caught:
        formats.load(path, **options)
    for word in words:
        assert word in str(caught.value)


def test_no_checkpoint(tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist")
    refused(tmp_path, "is no checkpoint", "config.json")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "is no checkpoint")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path, "lacks 'num_hidden_layers'")


def test_unknown_architecture(folder):
    change_config(folder, model_type="mamba9")
    refused(folder, "'mamba9' is not known", "llama, mistral, qwen2, qwen3, nemotron-nas, nemotron_h,", "intarsia")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"hidden_act": "tanhshrink"}, "hidden_act 'tanhshrink' is not known"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "RoPE scaling 'dynamic' is not known"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantised (gptq)"),
        ({"num_attention_heads": 3}, "attention with 3 heads over 2 KV heads"),
    ],
)
def test_unsupported_features(folder, fields, words):
    change_config(folder, **fields)
    refused(folder, words)


def test_truncated_file_names_both_sizes(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    refused(folder, "model.safetensors is cut short", str(len(data)), str(len(data) - 100))
    path.write_bytes(data[:40])
    refused(folder, "is cut short", "the file has 40")
    path.write_bytes(b"")
    refused(folder, "is cut short")
    path.write_bytes((4).to_bytes(8, "little") + b"what" + data)
    refused(folder, "header is not readable")


def test_missing_shard(tmp_path):
    folder = formats.save(initialise(Decoder(ARCH)), tmp_path / "model", shard_bytes=9_000)
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.rename(tmp_path / "elsewhere")
    refused(folder, f"lacks the shard {lost.name}")


def test_missing_extra_and_misshapen_tensors(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    whole = load_file(folder / "model.safetensors")
    change_weights(folder, lambda t: t.pop(name))
    refused(folder, "lacks 1 tensor: blocks.3.mixer.up.weight")
    change_weights(folder, lambda t: t.update({name: torch.zeros(39, 32)}))
    refused(folder, name, "(39, 32)", "(40, 32)")
    save_file({**whole, "model.layers.7.surprise": torch.zeros(1)}, folder / "model.safetensors")
    refused(folder, "model.layers.7.surprise", "no place for")
    save_file({**whole, name: torch.zeros(40, 32, dtype=torch.int8)}, folder / "model.safetensors")
    refused(folder, "is stored as I8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite(folder, value, dtype):
    def poison(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors["model.layers.0.self_attn.k_proj.weight"][3, 4] = value

    change_weights(folder, poison)
    refused(folder, "model.layers.0.self_attn.k_proj.weight", "model.safetensors", "1 values")
    model, _ = formats.load(folder, check=False)
    assert not model.blocks[0].mixer.k.weight.isfinite().all()


def test_large_finite_values_pass(folder):
    change_weights(folder, lambda t: t["lm_head.weight"].fill_(3e38))
    model, _ = formats.load(folder)  # their sum overflows, and they are finite
    assert float(model.head.weight.detach()[0, 0]) == pytest.approx(3e38)


def test_tokenizer_that_does_not_fit(folder):
    vocab = {f"t{i}": i for i in range(77)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="t0"))
    backend.save(str(folder / "tokenizer.json"))
    refused(folder, "ids up to 76", "vocabulary has 50")
    with pytest.raises(IntarsiaError, match="ids up to 76"):
        formats.save(Decoder(ARCH), folder.parent / "other", formats.Tokenizer(backend))
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer.json is not readable")


def test_a_failed_save_leaves_what_was_there(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()
    def full_disk(*_):
        raise OSError(28, "No space left")

    monkeypatch.setattr("intarsia.formats.writer.write_shards", full_disk)
    with pytest.raises(IntarsiaError, match="No space left"):
        formats.save(initialise(Decoder(ARCH), seed=1), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_other_peoples_folders_are_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("precious")
    with pytest.raises(IntarsiaError, match="folder of something else"):
        formats.save(Decoder(ARCH), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "precious"
