"""`intarsia data`: documents to tokens, split into train and held-out, each category on its own.

    out/manifest.json                     categories, counts, hashes, licences, fingerprint; written last
    out/<category>/{train,heldout}.bin    tokens, `.idx` beside it (indexed.py)
    out/<category>/{train,heldout}.bytes.npy   UTF-8 bytes of each document's text, int64
    out/<category>/category.json          what the category was made from; a category is whole or absent
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import atomic_path, fingerprint, hash_file, read_json, write_json
from intarsia.base.progress import Progress
from intarsia.data.indexed import Indexed, writer
from intarsia.data.sources import Source, documents, sources

FORMAT = 1  # raise it when the same inputs give other files
SPLITS = ("train", "heldout")
BATCH_BYTES = 1 << 20  # text given to the tokenizer at once


@dataclass(frozen=True)
class Options:
    """What shapes the result besides inputs and tokenizer."""

    heldout: float = 0.02
    max_bytes: int | Mapping[str, int] | None = None
    separator: int | None = None
    field: str = "text"

    def limit(self, category: str) -> int | None:
        return self.max_bytes.get(category) if isinstance(self.max_bytes, Mapping) else self.max_bytes


def build(
    inputs: str | os.PathLike | Iterable[str | os.PathLike],
    tokenizer: Any,
    out: str | os.PathLike,
    *,
    max_bytes: int | Mapping[str, int] | None = None,
    heldout: float = 0.02,
    sequence_length: int = 0,
    separator: int | None = None,
    field: str = "text",
    log: Callable[[str], None] = print,
) -> Path:
    """Encode the documents of `inputs` (files and folders, see sources.py) into `out`, which is returned.

    `tokenizer` has `.vocab_size`, `.fingerprint`, `.eos_id` (or None) and `.encode_batch(list[str]) -> list[list[int]]`
    or `.encode(str) -> list[int]`. `separator` (by default the end-of-text token) ends every document. Equal texts
    of a category count once. The share `heldout` of documents, chosen by the hash of their text and therefore the
    same whatever else is read, is kept from training: at least one where a category has two. `max_bytes` bounds
    the text of each split of a category, by hash as well, but leaves at least one document: one number, or one per
    category, where a category that is not named stays whole. A category that was already built from the same
    inputs, tokenizer and options is left alone.

    Raises `IntarsiaError` for unreadable inputs, and when the training text is shorter than `sequence_length` tokens.
    """
    out = Path(out)
    separator = tokenizer.eos_id if separator is None else separator
    options = Options(heldout, max_bytes, separator, field)
    groups = _by_category(sources(inputs))
    if isinstance(max_bytes, Mapping) and (unknown := set(max_bytes) - set(groups)):
        raise IntarsiaError(
            f"max_bytes names {', '.join(sorted(unknown))}, which is no category of the inputs: {', '.join(groups)}."
        )
    wanted = {category: _made_from(category, files, tokenizer, options) for category, files in groups.items()}
    manifest = out / "manifest.json"
    known = read_json(manifest)["made_from"] if manifest.exists() else None
    if known == wanted and all(_built(out / c, wanted[c]) for c in wanted):
        log(f"the data in {out} is already built.")
    else:
        manifest.unlink(missing_ok=True)  # until every category is new, the folder is no corpus
        made = {category: _category(out, category, files, tokenizer, options, wanted[category], log)
                for category, files in groups.items()}
        write_json(manifest, _manifest(made, wanted, tokenizer))
    total = sum(c["train"]["tokens"] for c in read_json(manifest)["categories"].values())
    if total < sequence_length:
        raise IntarsiaError(
            f"the training text is {total:,} tokens long, shorter than one sequence of {sequence_length:,}: "
            "give more text or a shorter sequence."
        )
    return out


def _by_category(files: list[Source]) -> dict[str, list[Source]]:
    groups: dict[str, list[Source]] = {}
    for source in files:
        groups.setdefault(source.category, []).append(source)
    return dict(sorted(groups.items()))


def _made_from(category: str, files: list[Source], tokenizer: Any, options: Options) -> str:
    """What a category's tokens depend on. File names are no part of it."""
    hashes = [hash_file(source.path) for source in files]
    chosen = [options.heldout, options.limit(category), options.separator, options.field]
    return fingerprint(FORMAT, category, hashes, tokenizer.fingerprint, tokenizer.vocab_size, chosen)


def _manifest(made: dict[str, Any], wanted: dict[str, str], tokenizer: Any) -> dict[str, Any]:
    content = {c: [stats[s]["sha256"] for s in SPLITS] for c, stats in made.items()}
    return {
        "fingerprint": fingerprint(FORMAT, content, tokenizer.fingerprint),
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "made_from": wanted,
        "categories": made,
    }


def _category(out: Path, category: str, files: list[Source], tokenizer: Any, options: Options, made_from: str,
              log: Callable[[str], None]) -> dict[str, Any]:
    """Build one category's folder, or recognise it; its entry of the manifest."""
    folder = out / category
    if _built(folder, made_from):
        log(f"{category} is already built.")
        return read_json(folder / "category.json")
    chosen = _choose(category, files, options)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        entry = {"made_from": made_from, "sources": _origin(files)}
        entry |= _encode(temporary, category, files, chosen, tokenizer, options)
        write_json(temporary / "category.json", entry)
    counts = [f"{entry[s]['documents']:,} documents, {entry[s]['tokens']:,} tokens {s}" for s in SPLITS]
    alone = "" if entry["heldout"]["documents"] else " (a single document cannot be split)"
    log(f"{category}: {', '.join(counts)}{alone}.")
    return entry


def _built(folder: Path, made_from: str) -> bool:
    """Whether the category is there, whole, and made from the same things."""
    if not (folder / "category.json").exists() or read_json(folder / "category.json")["made_from"] != made_from:
        return False
    try:
        return all(len(Indexed(folder / s)) == len(np.load(folder / f"{s}.bytes.npy")) for s in SPLITS)
    except (IntarsiaError, OSError, ValueError):
        return False


def _origin(files: list[Source]) -> list[dict[str, Any]]:
    """Each file, or for many files their folders, with package and licence where a fetched manifest names them."""
    if len(files) > 20:
        folders = Counter(source.path.parent for source in files)
        return [{"folder": str(folder), "files": count} for folder, count in folders.items()]
    rows = []
    for source in files:
        manifest = source.path.parent / "manifest.json"
        known = read_json(manifest).get("files", []) if manifest.exists() else []
        facts = next((f for f in known if isinstance(f, dict) and f.get("file") == source.path.name), {})
        rows.append({"file": str(source.path)} | {k: facts[k] for k in ("package", "licence") if k in facts})
    return rows


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def _texts(title: str, files: list[Source], field: str) -> Iterator[tuple[str, bytes]]:
    """Every document with its hash, file after file, with progress over the files' bytes."""
    total = sum(s.path.stat().st_size for s in files)
    with Progress(title, total) as progress:
        before = 0
        for source in files:
            size = source.path.stat().st_size
            packed = 4 if source.path.suffix == ".gz" else 1  # text packs to about a quarter
            for text in documents(source, field):
                yield text, _digest(text)
                progress.advance(min(len(text) / packed, before + size - progress.done))
            before += size
            progress.advance(before - progress.done)


def _choose(category: str, files: list[Source], options: Options) -> dict[bytes, tuple[str, int]]:
    """The documents to encode: hash -> (split, bytes). The first half of the hash splits, the second half orders."""
    sizes = {digest: len(text.encode())
             for text, digest in _texts(f"read {category}", files, options.field)}
    place = {digest: int.from_bytes(digest[:8]) / 2**64 for digest in sizes}
    held = {digest for digest in sizes if place[digest] < options.heldout}
    if len(sizes) > 1 and options.heldout > 0:
        held = held or {min(place, key=place.get)}
        if len(held) == len(sizes):
            held.remove(max(place, key=place.get))
    chosen = {}
    for split, members in (("train", sizes.keys() - held), ("heldout", held)):
        room = options.limit(category)
        for rank, digest in enumerate(sorted(members, key=lambda d: d[8:])):
            if room is not None and rank and sizes[digest] > room:
                break
            chosen[digest] = (split, sizes[digest])
            room = None if room is None else room - sizes[digest]
    return chosen


def _encode(folder: Path, category: str, files: list[Source], chosen: dict[bytes, tuple[str, int]], tokenizer: Any,
            options: Options) -> dict[str, Any]:
    """Second reading: encode the chosen documents, each once, into the category's folder."""
    total = sum(size for _, size in chosen.values())
    end = [] if options.separator is None else [options.separator]
    sizes: dict[str, list[int]] = {split: [] for split in SPLITS}
    with Progress(f"encode {category}", total) as progress, \
            writer(folder / "train", tokenizer.vocab_size) as train, \
            writer(folder / "heldout", tokenizer.vocab_size) as heldout:
        to = {"train": train, "heldout": heldout}
        for batch in _batches(files, options.field, dict(chosen)):
            for tokens, (_, split, size) in zip(_tokens(tokenizer, [text for text, *_ in batch]), batch, strict=True):
                to[split].add([*tokens, *end])
                sizes[split].append(size)
            progress.advance(sum(size for *_, size in batch))
        tokens = {split: sum(to[split].lengths) for split in SPLITS}
    for split in SPLITS:
        np.save(folder / f"{split}.bytes.npy", np.asarray(sizes[split], np.int64))
    return {
        split: {
            "documents": len(sizes[split]),
            "tokens": tokens[split],
            "bytes": sum(sizes[split]),
            "sha256": hash_file(folder / f"{split}.bin"),
        }
        for split in SPLITS
    }


def _batches(
    files: list[Source], field: str, left: dict[bytes, tuple[str, int]]
) -> Iterator[list[tuple[str, str, int]]]:
    batch, held = [], 0
    for text in itertools.chain.from_iterable(documents(source, field) for source in files):
        found = left.pop(_digest(text), None)  # gone at its second coming: equal texts count once
        if found:
            batch.append((text, *found))
            held += found[1]
        if held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
        if not left:
            break
    if batch:
        yield batch


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if hasattr(tokenizer, "encode_batch"):
        return tokenizer.encode_batch(texts)
    return [tokenizer.encode(text) for text in texts]
