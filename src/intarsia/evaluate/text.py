"""Bits per byte: what a model needs to write down held-out text, comparable between tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from intarsia.base.errors import IntarsiaError
from intarsia.base.progress import Progress
from intarsia.evaluate.likelihood import token_scores
from intarsia.model import Decoder

Document = tuple[np.ndarray, int]  # token ids (T,) and the UTF-8 bytes of the text


def bits_per_byte(
    model: Decoder,
    documents: Mapping[str, Sequence[Document]],
    length: int = 1024,
    separator: int | None = None,
    title: str = "bits per byte",
    scores: Callable[..., Sequence[tuple]] | None = None,
    counted: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> dict[str, dict]:
    """Bits per byte of each category and of `all` documents: {value, se, n} with n documents.

    A document is cut into windows of `length` tokens; each window sees the one token before it and nothing further.
    `separator` (the corpus's end-of-document token) is not scored, and stands before each document; without one the
    first token of a document is not scored, though its bytes count. The error is that of a ratio of two sums over
    documents (Cochran, Sampling Techniques, section 2.11). `scores` stands for `token_scores` of all tokens but the
    first where the model can only be asked in its own way: (sequences, advance) -> [(nll, hits)]. `counted` says of
    every token of the same documents, 1 or 0, whether it counts (where there is no separator); the bytes are of those.
    """
    length = min(length, model.arch.max_positions)
    sequences, owners, sizes, names = [], [], [], []
    for category, texts in documents.items():
        for tokens, size in texts:
            cut = _windows(_framed(tokens, separator), length)
            sequences += cut
            owners += [len(sizes)] * len(cut)
            sizes.append(size)
            names.append(category)
    if not sequences:
        raise IntarsiaError("there is no held-out text to measure: every document is empty or a single token.")
    bits = np.zeros(len(sizes))
    with Progress(title, len(sequences)) as progress:
        if scores is None:
            scored = token_scores(model, sequences, [1] * len(sequences), progress.advance)
        else:
            scored = scores(sequences, progress.advance)
    keep = [None] * len(sequences)
    if counted is not None:
        keep = [window[1:] for texts in counted.values() for mask in texts for window in _windows(mask, length)]
    for owner, (nll, _), counts in zip(owners, scored, keep):
        nll = nll.double() if counts is None else nll.double() * torch.from_numpy(np.array(counts)).to(nll.device)
        bits[owner] += nll.sum().item() / math.log(2)
    sizes, names = np.array(sizes, float), np.array(names)
    found = {c: ratio(bits[names == c], sizes[names == c]) for c in documents if (names == c).any()}
    return {**found, "all": ratio(bits, sizes)}


def ratio(above: np.ndarray, below: np.ndarray) -> dict:
    """sum(above) / sum(below) with its standard error over the n pairs (None for a single pair)."""
    n, value = len(above), above.sum() / below.sum()
    rest = np.square(above - value * below).sum()
    return {"value": float(value), "se": float(math.sqrt(n / (n - 1) * rest) / below.sum()) if n > 1 else None, "n": n}


def shorten(document: Document, tokens: int, tokenizer) -> Document:
    """The document's first `tokens` tokens with the bytes that they stand for; itself when it is no longer."""
    ids, size = document
    if len(ids) <= tokens:
        return document
    return ids[:tokens], min(size, len(tokenizer.decode(ids[:tokens]).encode()))


def _framed(tokens: np.ndarray, separator: int | None) -> list[int]:
    ids = [int(t) for t in tokens]
    if separator is None:
        return ids
    return [separator, *(ids[:-1] if ids and ids[-1] == separator else ids)]


def _windows(ids: Sequence[int], length: int) -> list[Sequence[int]]:
    """Cut so that every token but the first is predicted exactly once, up to `length` of them in a window."""
    return [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]
