"""The tokenizer as GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE with byte fallback (`llama`).

llama.cpp knows how a text is cut into words only by a name. The name is found by cutting a text that is hard to cut and
comparing, as llama.cpp's converter does with a checksum.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from intarsia.base.errors import IntarsiaError
from intarsia.formats.gguf_tokenizer import CONTROL, PRE_TOKENIZERS, UNUSED, USER, pre_tokenizer
from intarsia.formats.tokenizer import Tokenizer

_NORMAL, _BYTE = 1, 6
_PROBE = (
    "Hello, World's 3 + 4567 x² == 12.5%\n\n  def f(a_b):\treturn a['key']  # ok\r\n Été naïve, I'LL we've DON'T "
    "你好,世界 привет 100000 $5 <|x|> ~^ 😀🚀!!  \n \n\n end  "
)


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """`tokenizer.ggml.*` for a model of `vocab_size` tokens.

    Raises `IntarsiaError` for a tokenizer that has no name in GGUF.
    """
    told = json.loads(tokenizer.backend.to_str())
    model = told["model"]
    if model["type"] != "BPE":
        raise IntarsiaError(f"a tokenizer of the kind {model['type']} is not written to GGUF; known: BPE.")
    tokens, types = _tokens(tokenizer, told, vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        fields = _sentencepiece(told, tokens, types, merges)
    else:
        name = _pre_name(tokenizer, bool(model.get("ignore_merges")))
        fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}
    fields = {**fields, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    ids = {
        "bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unknown": _special(tokenizer, "unk_token"),
        "padding": _special(tokenizer, "pad_token"),
    }  # fmt: skip
    fields.update({f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items() if value is not None})
    first = tokenizer.backend.encode("a").ids[:1]
    fields["tokenizer.ggml.add_bos_token"] = tokenizer.bos_id is not None and first == [tokenizer.bos_id]
    if tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    return fields


def _special(tokenizer: Tokenizer, key: str) -> int | None:
    token = tokenizer.config.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    return None if token is None else tokenizer.backend.token_to_id(token)


def _tokens(tokenizer: Tokenizer, told: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every id's token and type; ids that the model has and the tokenizer does not are unused."""
    added = {entry["id"]: entry for entry in told["added_tokens"]}
    names = {index: token for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    tokens, types = [], []
    for index in range(vocab_size):
        tokens.append(names.get(index, f"[PAD{index}]"))
        if index not in names:
            types.append(UNUSED)
        elif index in added:
            types.append(CONTROL if added[index]["special"] else USER)
        else:
            byte = told["model"].get("byte_fallback") and len(names[index]) == 6 and names[index].startswith("<0x")
            types.append(_BYTE if byte else _NORMAL)
    return tokens, types


def _pre_name(tokenizer: Tokenizer, ignore_merges: bool) -> str:
    backend = tokenizer.backend

    def cut(by: Any) -> list[str]:
        return [piece for piece, _ in by.pre_tokenize_str(_PROBE)]

    wanted = cut(backend.pre_tokenizer) if backend.pre_tokenizer is not None else None
    for name in PRE_TOKENIZERS:
        # Llama 3 alone looks whole words up before it merges.
        if wanted == cut(pre_tokenizer(Path(name), name)) and ignore_merges == (name == "llama-bpe"):
            return name
    raise IntarsiaError(
        "this tokenizer cuts words by a rule that has no name in GGUF here; rules that are known: "
        f"{', '.join(PRE_TOKENIZERS)}. Export without a tokenizer, or keep the Hugging Face folder."
    )


def _sentencepiece(told: dict[str, Any], tokens: list[str], types: list[int], merges: list[str]) -> dict[str, Any]:
    """The rank of a merge becomes the score of what it makes: the best score merges first."""
    scores = dict.fromkeys(tokens, -1e9)
    for rank, merge in reversed(list(enumerate(merges))):
        scores[merge.replace(" ", "")] = -float(rank)
    steps = json.dumps(told.get("normalizer"))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [scores[token] if kind == _NORMAL else 0.0 for token, kind in zip(tokens, types)],
        "tokenizer.ggml.add_space_prefix": '"Prepend"' in steps or '"prepend_scheme": "first"' in json.dumps(told),
    }
