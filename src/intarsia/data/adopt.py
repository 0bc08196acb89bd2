"""Tokens that others made: Megatron `.bin/.idx` pairs become the categories of a corpus. (The other direction needs no
step: a built category's `train.bin` and `train.idx` are such a pair.)"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from intarsia.base.files import atomic_path, fingerprint, hash_file, read_json
from intarsia.base.progress import Progress
from intarsia.data.build import Options, built, choose, describe, finish
from intarsia.data.indexed import Indexed, writer
from intarsia.data.shards import DIGEST, SPLITS

FORMAT = "megatron 1"


def adopt(
    stems: Mapping[str, str | os.PathLike],
    tokenizer: Any,
    out: str | os.PathLike,
    *,
    heldout: float = 0.02,
    licences: Mapping[str, str] | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Make `out`, as `build` would, of pairs `<stem>.bin` and `<stem>.idx`: a category for each key of `stems`.

    `tokenizer` is the one that made them; it has `.vocab_size`, `.fingerprint` and `.decode(ids) -> str`, which counts
    the bytes of the text. Documents are what the pair calls documents, whatever sequences they are of; equal ones count
    once, and the share `heldout` is chosen by the hash of their tokens. Raises `IntarsiaError` for a pair that is
    damaged, and for ids that the tokenizer does not have.
    """
    out, made, made_from = Path(out), {}, {}
    for category, stem in stems.items():
        data, files = Indexed(stem), [Path(f"{stem}.bin"), Path(f"{stem}.idx")]
        made_from[category] = fingerprint(FORMAT, [hash_file(f) for f in files], tokenizer.fingerprint, heldout)
        if built(out / category, made_from[category]):
            log(f"{category} is already built.")
            made[category] = read_json(out / category / "category.json")
            continue
        (out / "manifest.json").unlink(missing_ok=True)
        entry = {"made_from": made_from[category], "sources": [{"file": str(files[0])}]}
        with atomic_path(out / category) as folder:
            entry |= _copy(category, data, tokenizer, folder, heldout)
            made[category] = describe(folder, entry)
        told = [f"{made[category][s]['documents']:,} documents, {made[category][s]['tokens']:,} tokens {s}"
                for s in SPLITS]
        log(f"{category}: {', '.join(told)}.")
    if hasattr(tokenizer, "save"):
        tokenizer.save(out / "tokenizer")
    finish(out, dict(sorted(made.items())), dict(sorted(made_from.items())), tokenizer, licences or {})
    return out


def _copy(category: str, data: Indexed, tokenizer: Any, folder: Path, heldout: float) -> dict[str, Any]:
    """Write the documents of `data` into the category's new folder; counts for the manifest."""
    spans = [(int(a), int(b)) for a, b in itertools.pairwise(data.edges) if b > a]
    digests = b"".join(hashlib.sha256(data.tokens[a:b].astype("<i4").tobytes()).digest()[:DIGEST] for a, b in spans)
    keys = np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)
    nothing = np.zeros(len(spans), np.int64)
    split, counts = choose(category, keys, nothing, nothing, Options(heldout))
    sizes: tuple[list[int], list[int]] = ([], [])
    folder.mkdir()
    with Progress(f"copy {category}", data.tokens.size) as progress, \
            writer(folder / "train", tokenizer.vocab_size) as train, \
            writer(folder / "heldout", tokenizer.vocab_size) as held:
        for (a, b), to in zip(spans, split):
            if to >= 0:
                tokens = data.tokens[a:b]
                (train, held)[to].add(tokens)
                text = tokens[:-1] if tokens[-1] == tokenizer.eos_id else tokens
                sizes[to].append(len(tokenizer.decode(text.tolist()).encode()))
            progress.advance(b - a)
    for name, values in zip(SPLITS, sizes):
        np.save(folder / f"{name}.bytes.npy", np.asarray(values, np.int64))
    return counts
