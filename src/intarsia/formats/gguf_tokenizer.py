"""The tokenizer that travels in GGUF metadata, rebuilt for the `tokenizers` library.

Two kinds exist for our families: `gpt2` (byte-level BPE with merges) and `llama` (SentencePiece BPE with scores).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from intarsia.base.errors import IntarsiaError

_UNKNOWN, CONTROL, USER, UNUSED = 2, 3, 4, 5  # tokenizer.ggml.token_type; 1 normal, 6 byte
PRE_TOKENIZERS = ("smollm", "llama-bpe", "qwen2", "gpt-2", "default")

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

Built = tuple[Tokenizer, dict[str, Any], int | None, int | None]


def tokenizer_from_gguf(path: Path, meta: dict[str, Any]) -> Built | None:
    """(tokenizer, content of tokenizer_config.json, bos id, eos id) from metadata; None if that has no vocabulary.

    Raises `IntarsiaError` for kinds and pre-tokenizers that cannot be rebuilt faithfully.
    """
    if "tokenizer.ggml.tokens" not in meta:
        return None
    kind = meta.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(path, meta)
    elif kind == "llama":
        tokenizer = _sentencepiece(path, meta)
    else:
        raise IntarsiaError(
            f"the tokenizer in {path} is of the kind {kind!r}; kinds that are read: gpt2 (byte-level BPE), llama "
            "(SentencePiece). Use the model's Hugging Face folder instead."
        )
    _add_special(tokenizer, meta)
    _add_bos(tokenizer, meta, default=kind == "llama")
    return tokenizer, _config(meta), meta.get("tokenizer.ggml.bos_token_id"), meta.get("tokenizer.ggml.eos_token_id")


def _byte_level(path: Path, meta: dict[str, Any]) -> Tokenizer:
    name = meta.get("tokenizer.ggml.pre", "default")
    vocab = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("tokenizer.ggml.merges", [])]
    # Llama 3 looks a whole word up in the vocabulary before it merges.
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=name in ("llama-bpe", "llama3", "llama-v3")))
    tokenizer.pre_tokenizer = pre_tokenizer(path, name)
    if name in ("qwen2", "qwen35"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pre_tokenizer(path: Path, name: str) -> pre_tokenizers.PreTokenizer:
    """The rule that `tokenizer.ggml.pre` names. Raises `IntarsiaError` for an unknown one."""

    def split(*patterns: str) -> pre_tokenizers.PreTokenizer:
        steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in ("llama-bpe", "llama3", "llama-v3"):
        return split(_LLAMA3)
    if name == "qwen2":
        return split(_QWEN2)
    if name in ("gpt-2", "gpt2"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "default":  # the order of llama.cpp's llm_tokenizer_bpe
        gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
        return split(r"[\p{P}\$\+<=>\^~\|]+", gpt2, r"\p{N}+", r"[0-9][0-9][0-9]")
    raise IntarsiaError(
        f"the tokenizer in {path} cuts words by the rule {name!r}; rules that are known: smollm, llama-bpe, qwen2, "
        "gpt-2, default. Use the model's Hugging Face folder instead."
    )


def _sentencepiece(path: Path, meta: dict[str, Any]) -> Tokenizer:
    """SentencePiece BPE has scores and no merges: every way to cut a piece into two pieces is a merge of its rank."""
    tokens, scores = meta["tokenizer.ggml.tokens"], meta.get("tokenizer.ggml.scores")
    if scores is None:
        raise IntarsiaError(f"the SentencePiece tokenizer in {path} has no scores: use the Hugging Face folder.")
    vocab = {token: i for i, token in enumerate(tokens)}
    types = meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = []
    for i, token in enumerate(tokens):
        if types[i] == 1:
            cuts = ((token[:c], token[c:]) for c in range(1, len(token)))
            merges += sorted(
                ((-scores[i], i, vocab[a], vocab[b], (a, b)) for a, b in cuts if a in vocab and b in vocab)
            )
    merges.sort(key=lambda m: m[:2])
    unknown = tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)]
    model = BPE(vocab, [m[-1] for m in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _add_special(tokenizer: Tokenizer, meta: dict[str, Any]) -> None:
    tokens = meta["tokenizer.ggml.tokens"]
    for token, kind in zip(tokens, meta.get("tokenizer.ggml.token_type", [])):
        if kind in (_UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _add_bos(tokenizer: Tokenizer, meta: dict[str, Any], default: bool) -> None:
    """What transformers adds by itself in front of a text (our own `encode` adds nothing)."""
    bos = meta.get("tokenizer.ggml.bos_token_id")
    if bos is not None and meta.get("tokenizer.ggml.add_bos_token", default):
        token = meta["tokenizer.ggml.tokens"][bos]
        template = processors.TemplateProcessing(
            single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, bos)]
        )
        steps = [tokenizer.post_processor] if tokenizer.post_processor else []
        tokenizer.post_processor = processors.Sequence([*steps, template])


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = meta.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is not None:
            config[f"{ours}_token"] = tokens[index]
    if "tokenizer.chat_template" in meta:
        config["chat_template"] = meta["tokenizer.chat_template"]
    return config
