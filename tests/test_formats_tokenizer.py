"""Tokenizers: from folders, and rebuilt from GGUF metadata with the same ids as the one that was put in."""

import json

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from intarsia import formats
from intarsia.base.errors import IntarsiaError
from intarsia.formats import gguf_tokenizer

TEXTS = [
    "The cat sat on 1234567 mats, didn't it? I'LL see.\n\n  def f(x):\n\treturn x**2  # café 数学 🙂 naïve",
    " leading and trailing  ", "", "A\u030angstro\u0308m", "<|end|>ok<|end|>",
]
CORPUS = [
    "the cat sat on the mat and didn't see 12345 dogs", "def f(x): return x + 1  # naïve café", "we'll see, I'LL",
] * 40


def byte_level(split):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", "<|end|>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special, show_progress=False)
    # Trained on words, so that no piece spans two of them, as SentencePiece does.
    tokenizer.train_from_iterator([word for line in CORPUS for word in line.split()], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    return tokenizer


def metadata(tokenizer, kind, **fields):
    state = json.loads(tokenizer.to_str())
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = {t["content"] for t in state["added_tokens"]}
    merges = [" ".join(m) if isinstance(m, list) else m for m in state["model"]["merges"]]
    rank = {m.replace(" ", "", 1): i for i, m in reversed(list(enumerate(merges)))}
    types = [3 if t in special else 6 if t.startswith("<0x") else 1 for t, _ in vocab]
    meta = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": [t for t, _ in vocab],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eos_token_id": tokenizer.token_to_id("<|end|>"),
    }
    extra = {"tokenizer.ggml.merges": merges} if kind == "gpt2" else {
        "tokenizer.ggml.scores": [-float(rank.get(t, 10**6)) for t, _ in vocab], "tokenizer.ggml.bos_token_id": 1,
    }
    return {**meta, **extra, **{f"tokenizer.ggml.{k}": v for k, v in fields.items()}}


def rebuild(meta):
    backend, config, bos, eos = gguf_tokenizer.tokenizer_from_gguf("m.gguf", meta)
    return formats.Tokenizer(backend, config, bos, eos)


def split(pattern):
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte])


RULES = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": split(gguf_tokenizer._LLAMA3),
    "qwen2": split(gguf_tokenizer._QWEN2),
}


@pytest.mark.parametrize("rule", RULES)
def test_byte_level_bpe_keeps_its_ids(rule):
    original = byte_level(RULES[rule])
    if rule == "qwen2":
        original.normalizer = normalizers.NFC()
    rebuilt = rebuild(metadata(original, "gpt2", pre=rule))
    for text in TEXTS:
        assert rebuilt.encode(text) == original.encode(text).ids
        if rule != "qwen2":
            assert rebuilt.decode(rebuilt.encode(text)) == text
    assert rebuilt.encode_batch(TEXTS) == [rebuilt.encode(text) for text in TEXTS]
    assert rebuilt.eos_id == 0 and rebuilt.bos_id is None and rebuilt.vocab_size == original.get_vocab_size()


def test_rules_differ():
    """Digits one by one, in threes or in a run: the wrong rule would not go unnoticed."""
    cuts = {rule: [piece for piece, _ in RULES[rule].pre_tokenize_str("x 12345")] for rule in RULES}
    assert cuts["smollm"] != cuts["gpt-2"] != cuts["llama-bpe"] != cuts["qwen2"]
    default = rebuild(metadata(byte_level(RULES["gpt-2"]), "gpt2"))
    assert [default.decode(default.encode(text)) for text in TEXTS] == TEXTS


def test_sentencepiece_keeps_its_ids():
    original = sentencepiece()
    rebuilt = rebuild(metadata(original, "llama"))
    for text in TEXTS:
        assert rebuilt.encode(text) == original.encode(text, add_special_tokens=False).ids
    assert rebuilt.decode(rebuilt.encode(TEXTS[0])) == TEXTS[0]
    assert rebuilt.bos_id == 1
    assert rebuilt.backend.encode("the").ids[0] == 1  # as transformers would; our encode adds nothing


def test_what_cannot_be_rebuilt_is_a_sentence():
    meta = metadata(byte_level(RULES["gpt-2"]), "gpt2", pre="deepseek-v9")
    with pytest.raises(IntarsiaError, match="'deepseek-v9'; rules that are known: smollm"):
        rebuild(meta)
    with pytest.raises(IntarsiaError, match="kind 'bert'"):
        rebuild({**meta, "tokenizer.ggml.model": "bert"})
    assert gguf_tokenizer.tokenizer_from_gguf("m.gguf", {}) is None


def test_folder_and_back(tmp_path):
    byte_level(RULES["smollm"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|end|>"}, "chat_template": "{{ messages }}", "model_max_length": 99})
    )
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": [7, 8]}))
    one = formats.Tokenizer.from_folder(tmp_path)
    assert (one.eos_id, one.bos_id, one.chat_template) == (0, 7, "{{ messages }}")
    (tmp_path / "copy").mkdir()
    one.save(tmp_path / "copy")
    other = formats.Tokenizer.from_folder(tmp_path / "copy")
    assert other.fingerprint == one.fingerprint and other.config == one.config
    assert other.encode(TEXTS[0]) == one.encode(TEXTS[0])
    changed = formats.Tokenizer(byte_level(RULES["gpt-2"]))
    assert changed.fingerprint != one.fingerprint


def test_through_a_real_file(tmp_path):
    meta = metadata(byte_level(RULES["smollm"]), "gpt2", pre="smollm")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(meta["tokenizer.ggml.tokens"])
    writer.add_token_types(meta["tokenizer.ggml.token_type"])
    writer.add_token_merges(meta["tokenizer.ggml.merges"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ x }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = formats.Tokenizer.from_gguf(tmp_path / "m.gguf")
    assert found.chat_template == "{{ x }}"
    assert found.encode(TEXTS[0]) == rebuild(meta).encode(TEXTS[0])
