"""A tokenizer of one's own: byte-level BPE, trained on what a training will read, in the proportions of its blend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import atomic_path
from intarsia.data.blend import Blend
from intarsia.data.sources import Paths, Source, documents, sources
from intarsia.formats import Tokenizer

PADDING, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
SPECIAL = (PADDING, BEGIN, END, "<|im_start|>", "<|im_end|>")  # the last two: turns of a conversation
# The pattern of cl100k, which the published tokenizer (TikToken, "pattern v2") follows as well, with single digits.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    inputs: Paths | Mapping[str, Paths], blend: Blend, vocab_size: int, max_bytes: int, folder: Path
) -> Tokenizer:
    """Train on at most about `max_bytes` of `inputs` and write into `folder`; what is there already is read.

    Every category gives text in proportion to its weight in the blend, all phases counting alike; the same inputs give
    the same tokenizer. Raises `IntarsiaError` where the text is too little for so large a vocabulary.
    """
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_folder(folder)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL), show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(_texts(inputs, blend, max_bytes), trainer)
    if backend.get_vocab_size() != vocab_size:
        raise IntarsiaError(
            f"the text gives a vocabulary of {backend.get_vocab_size():,} words and not of {vocab_size:,}: give more "
            "text, or set data.tokenizer.vocab_size lower (the model's own vocabulary may stay larger)."
        )
    special = {"pad_token": PADDING, "bos_token": BEGIN, "eos_token": END}
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        Tokenizer(backend, special | {"tokenizer_class": "PreTrainedTokenizerFast"}).save(temporary)
    return Tokenizer.from_folder(folder)


def _texts(inputs: Paths | Mapping[str, Paths], blend: Blend, max_bytes: int) -> Iterator[str]:
    """Documents of every category up to its share of the bytes."""
    groups: dict[str, list[Source]] = {}
    for source in sources(inputs):
        groups.setdefault(source.category, []).append(source)
    sizes = {category: sum(s.bytes for s in files) for category, files in sorted(groups.items())}
    phases = blend.weights(sizes)
    for category in sizes:
        left = float(sum(phase.get(category, 0) for phase in phases) / len(phases)) * max_bytes
        for text in (text for source in groups[category] for text in documents(source)):
            if left <= 0:
                break
            yield text
            left -= len(text.encode())
