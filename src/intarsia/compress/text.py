"""The text of a run: a corpus, and batches of it that depend on nothing but their index."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import fingerprint, read_json
from intarsia.data import Corpus, build, fetch

# Each use of the text draws samples of its own.
CALIBRATION, TRAINING, FITTING, HELDOUT, SCORING, SENSING, MENDING, DISTILLING, EVALUATING = 1, 2, 3, 4, 5, 6, 7, 11, 12
PASS_TOKENS = 2048  # of one forward pass where nothing else decides


def open_corpus(path: str | None, tokenizer, folder: Path, max_bytes: int, length: int) -> Corpus:
    """The corpus of a recipe: one that is already built, text to build from, or (None) the text that `fetch` brings."""
    manifest = Path(path or "") / "manifest.json"
    if path is not None and manifest.exists() and "made_from" in read_json(manifest):
        corpus = Corpus(path)
        made_with = corpus.manifest.get("tokenizer", tokenizer.fingerprint)
        if made_with != tokenizer.fingerprint:
            raise IntarsiaError(
                f"the corpus {path} was built with another tokenizer than the model's: build it again with "
                "`intarsia data build --tokenizer MODEL`, or give the text itself."
            )
        return corpus
    return Corpus(build(path or fetch("text"), tokenizer, folder, max_bytes=max_bytes, sequence_length=length))


def check_length(corpus: Corpus, length: int) -> None:
    """Raise `IntarsiaError` unless both splits have a category of at least one sequence."""
    for split in ("train", "heldout"):
        _long_enough(corpus, length, split)


def _long_enough(corpus: Corpus, length: int, split: str) -> list[str]:
    names = [c for c in corpus.categories if corpus.tokens(split, c) >= length]
    if not names:
        longest = max(corpus.tokens(split, c) for c in corpus.categories)
        name = "held-out" if split == "heldout" else "training"
        raise IntarsiaError(
            f"no category of the text has a {name} part of {length:,} tokens, which is one sequence (the longest has "
            f"{longest:,}): give more text, in several documents, or set data.length lower."
        )
    return names


def batch(corpus: Corpus, first: int, rows: int, length: int, split: str, seed: int) -> torch.Tensor:
    """(rows, length) int64 from the sample `first` on; every category has the same share of the samples."""
    weights = dict.fromkeys(_long_enough(corpus, length, split), 1.0)
    return torch.from_numpy(corpus.batch(first, rows, length, split=split, seed=seed, weights=weights))


def sampled_hash(path: Path, samples: int = 256, size: int = 1 << 16) -> str:
    """SHA-256 over `samples` pieces of `size` bytes, evenly spread over a file from its first byte to its last; over
    all of it where it is no longer than that. Whole checkpoints would take minutes to read; any training moves them
    all over."""
    digest, length = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as handle:
        if length <= samples * size:
            digest.update(handle.read())
        for n in range(samples if length > samples * size else 0):
            handle.seek((length - size) * n // (samples - 1))
            digest.update(handle.read(size))
    return digest.hexdigest()


def checkpoint_print(path: Path) -> str:
    """Fingerprint of a checkpoint's files: names, sizes, and samples of the bytes of each."""
    kinds = (".safetensors", ".gguf", ".json")
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in kinds)
    return fingerprint([[f.name, f.stat().st_size, sampled_hash(f)] for f in files if f.name != "manifest.json"])


def parts(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows (N, L, ...) that go through a model together."""
    return rows.split(max(1, PASS_TOKENS // rows.shape[1]))
