"""`intarsia data build`: documents to tokens, split into train and held-out, each category on its own.

    out/manifest.json                     categories, counts, hashes, licences, fingerprint; written last
    out/tokenizer/                        the tokenizer's files, where it can save itself
    out/<category>/{train,heldout}.bin    tokens, `.idx` beside it (indexed.py)
    out/<category>/{train,heldout}.bytes.npy   UTF-8 bytes of each document's text, and what else is known (marks.py)
    out/<category>/category.json          what the category was made from; a category is whole or absent
    out/.pieces/                          what an unfinished build has done so far (shards.py)
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import atomic_path, fingerprint, hash_file, read_json, remove_leftovers, write_json
from intarsia.data.filters import RULES, Filters
from intarsia.data.indexed import Indexed, merge
from intarsia.data.marks import FILES, join, load_mask
from intarsia.data.shards import SPLITS, Encode, Scan, Workers, pieces
from intarsia.data.sources import Field, Paths, Source, sources

NO_FILTERS = Filters()
FORMAT = 1  # raise it when the same inputs give other files


@dataclass(frozen=True)
class Options:
    """What shapes the result besides inputs and tokenizer."""

    heldout: float = 0.02
    max_bytes: int | Mapping[str, int] | None = None
    separator: int | None = None
    field: Field = "text"
    filters: Filters = NO_FILTERS

    def limit(self, category: str) -> int | None:
        return self.max_bytes.get(category) if isinstance(self.max_bytes, Mapping) else self.max_bytes


def build(
    inputs: Paths | Mapping[str, Paths],
    tokenizer: Any,
    out: str | os.PathLike,
    *,
    max_bytes: int | Mapping[str, int] | None = None,
    heldout: float = 0.02,
    sequence_length: int = 0,
    separator: int | None = None,
    field: Field = "text",
    filters: Filters | None = None,
    licences: Mapping[str, str] | None = None,
    workers: int = 1,
    log: Callable[[str], None] = print,
) -> Path:
    """Encode the documents of `inputs` (files and folders, see sources.py) into `out`, which is returned.

    `tokenizer` has `.vocab_size`, `.fingerprint`, `.eos_id` (or None) and `.encode_batch(list[str]) -> list[list[int]]`
    or `.encode(str) -> list[int]`; one that has a `.kind` of conversations.py makes documents of rows of JSON, with
    `.encode_documents(list[str]) -> list[Encoded]` and a `.manner` that names how. `separator` (by default the
    end-of-text token) ends every document. Equal texts of a category count once. The share `heldout` of documents,
    chosen by the hash of their text and therefore the same whatever else is read, is kept from training: at least one
    where a category has two. `max_bytes` bounds the text of each split of a category, by hash as well, but leaves at
    least one document: one number, or one per category, where a category that is not named stays whole. `filters` drop
    documents, `licences` name a licence for a category, over what the inputs' own manifest says.

    With `workers` over 1 that many processes read and encode; with 1 the tokenizer's own threads work. The result is
    the same. A category that was already built from the same inputs, tokenizer and options is left alone, and a build
    that was interrupted, even killed, goes on where it was.

    Raises `IntarsiaError` for unreadable inputs, a full disk, a category that the filters leave empty, and when the
    training text is shorter than `sequence_length` tokens.
    """
    out = Path(out)
    separator = tokenizer.eos_id if separator is None else separator
    options = Options(heldout, max_bytes, separator, field, filters or NO_FILTERS)
    groups = _by_category(sources(inputs))
    _check_names(groups, max_bytes=max_bytes, licences=licences)
    with ThreadPoolExecutor(max(1, workers)) as threads:
        wanted = {category: _made_from(category, files, tokenizer, options, threads)
                  for category, files in groups.items()}
    manifest = out / "manifest.json"
    known = read_json(manifest) if manifest.exists() else {}
    if known.get("made_from") == wanted and all(built(out / c, wanted[c]) for c in wanted):
        log(f"the data in {out} is already built.")
        made = known["categories"]
    else:
        remove_leftovers(out)
        manifest.unlink(missing_ok=True)  # until every category is new, the folder is no corpus
        with Workers(tokenizer, workers) as crew:
            made = {category: _category(out, category, files, options, wanted[category], crew, log)
                    for category, files in groups.items()}
        shutil.rmtree(out / ".pieces", ignore_errors=True)
        if hasattr(tokenizer, "save"):
            tokenizer.save(out / "tokenizer")
    said = finish(out, made, wanted, tokenizer, licences or {})
    _check_length(sum(c["train"]["tokens"] for c in said["categories"].values()), sequence_length)
    return out


def _check_length(total: int, sequence_length: int) -> None:
    if total < sequence_length:
        raise IntarsiaError(
            f"the training text is {total:,} tokens long, shorter than one sequence of {sequence_length:,}: "
            "give more text or a shorter sequence."
        )


def _check_names(groups: Mapping[str, Any], **options: Any) -> None:
    """Raise `IntarsiaError` where an option by category names one that the inputs do not have."""
    for name, option in options.items():
        if isinstance(option, Mapping) and (unknown := set(option) - set(groups)):
            raise IntarsiaError(
                f"{name} names {', '.join(sorted(unknown))}, which is no category of the inputs: {', '.join(groups)}."
            )


def finish(out: Path, made: dict[str, Any], made_from: dict[str, str], tokenizer: Any,
           licences: Mapping[str, str]) -> dict[str, Any]:
    """Write the manifest over finished categories, if it says anything new, and return it."""
    content = {c: [entry[s]["sha256"] for s in SPLITS] for c, entry in made.items()}
    for category, entry in made.items():
        stated = {s["licence"] for s in entry.get("sources", []) if "licence" in s}
        entry["licence"] = licences.get(category) or entry.get("licence") or "; ".join(sorted(stated)) or "not stated"
    said = {
        "fingerprint": fingerprint(FORMAT, content, tokenizer.fingerprint),
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "made_from": made_from,
        "categories": made,
    }
    path = out / "manifest.json"
    if not path.exists() or read_json(path) != said:
        write_json(path, said)
    return said


def _by_category(files: list[Source]) -> dict[str, list[Source]]:
    groups: dict[str, list[Source]] = {}
    for source in files:
        groups.setdefault(source.category, []).append(source)
    return dict(sorted(groups.items()))


def _made_from(category: str, files: list[Source], tokenizer: Any, options: Options, threads: ThreadPoolExecutor
               ) -> str:
    """What a category's tokens depend on. File names are no part of it."""
    hashes = list(threads.map(hash_file, [source.path for source in files]))
    chosen = [options.heldout, options.limit(category), options.separator, options.field]
    if options.filters != NO_FILTERS:
        chosen.append(options.filters)
    if hasattr(tokenizer, "manner"):
        chosen.append(tokenizer.manner)
    return fingerprint(FORMAT, category, hashes, tokenizer.fingerprint, tokenizer.vocab_size, chosen)


def _category(out: Path, category: str, files: list[Source], options: Options, made_from: str, crew: Workers,
              log: Callable[[str], None]) -> dict[str, Any]:
    """Build one category's folder, or recognise it; its entry of the manifest."""
    folder = out / category
    if built(folder, made_from):
        log(f"{category} is already built.")
        return read_json(folder / "category.json")
    work = out / ".pieces" / f"{category}-{made_from}"
    cut = pieces(files)
    scans = [Scan(piece, options.field, options.filters, work / f"{i:06}.scan.npz") for i, piece in enumerate(cut)]
    crew.run(scans, f"read {category}")
    found = [np.load(scan.target, allow_pickle=False) for scan in scans]
    digests, sizes, broken = (np.concatenate([f[k] for f in found]) for k in ("digests", "sizes", "broken"))
    split, counts = choose(category, digests, sizes, broken, options)
    cuts = np.cumsum([len(f["sizes"]) for f in found])[:-1]
    each = zip(cut, np.split(split, cuts), np.split(sizes, cuts), strict=True)
    shards = [Encode(piece, options.field, options.separator, to, int(size[to >= 0].sum()), work / f"{i:06}.shard")
              for i, (piece, to, size) in enumerate(each)]
    crew.run(shards, f"encode {category}")
    entry = {"made_from": made_from, "sources": _origin(files), **counts}
    entry = assemble(folder, [shard.target for shard in shards], entry)
    shutil.rmtree(work)
    told = [f"{entry[s]['documents']:,} documents, {entry[s]['tokens']:,} tokens {s}" for s in SPLITS]
    alone = "" if entry["heldout"]["documents"] else " (a single document cannot be split)"
    log(f"{category}: {', '.join(told)}{alone}.")
    return entry


def choose(category: str, digests: np.ndarray, sizes: np.ndarray, broken: np.ndarray, options: Options
           ) -> tuple[np.ndarray, dict[str, Any]]:
    """Which documents to encode: split (N,) int8 (0 train, 1 held out, -1 neither), and counts for the manifest.

    Digests are (N, 2) uint64: the first half splits, the second half orders. `broken` (N,) is 1 + the number of the
    filter that a document breaks, or 0. Of equal documents the first counts.
    """
    kept = np.flatnonzero(broken == 0)
    if not len(sizes):
        raise IntarsiaError(f"{category} has no documents: give it text or leave it out.")
    if not kept.size:
        raise IntarsiaError(f"the filters leave nothing of {category}: all of its {len(sizes):,} documents break "
                            f"{' or '.join(RULES[r - 1] for r in np.unique(broken))}. Loosen them or leave it out.")
    order = kept[np.lexsort((digests[kept, 1], digests[kept, 0]))]  # stable: equal ones stay in order
    new = np.concatenate([[True], (digests[order[1:]] != digests[order[:-1]]).any(1)])
    unique = np.sort(order[new])
    place = digests[unique, 0] / 2.0**64
    held = place < options.heldout
    if len(unique) > 1 and options.heldout > 0:
        if not held.any():
            held[place.argmin()] = True
        if held.all():
            held[place.argmax()] = False
    split = np.full(len(sizes), -1, np.int8)
    for number, members in enumerate((unique[~held], unique[held])):
        if (limit := options.limit(category)) is not None and members.size:
            members = members[np.argsort(digests[members, 1], kind="stable")]
            fits = np.cumsum(sizes[members]) <= limit
            fits[0] = True
            members = members[: fits.size if fits.all() else int(fits.argmin())]
        split[members] = number
    dropped = {RULES[r - 1]: int(n) for r, n in zip(*np.unique(broken[broken > 0], return_counts=True))}
    counts = {"documents_read": len(sizes), "duplicates": int(kept.size - unique.size)}
    return split, counts | ({"filtered": dropped} if dropped else {})


def assemble(folder: Path, shards: list[Path], entry: dict[str, Any]) -> dict[str, Any]:
    """Join the shards into the category's folder, whole or not at all; its entry of the manifest."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for split in SPLITS:
            merge([shard / split for shard in shards], temporary / split)
            join(shards, split, temporary)
        return describe(temporary, entry)


def describe(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Write `category.json` beside finished tokens: `entry` with counts and hashes of each split, which is returned."""
    for split in SPLITS:
        sizes = np.load(folder / f"{split}.bytes.npy", allow_pickle=False)
        entry = entry | {split: {
            "documents": len(sizes),
            "tokens": len(Indexed(folder / split).tokens),
            "bytes": int(sizes.sum()),
            "sha256": hash_file(folder / f"{split}.bin"),
            "index_sha256": hash_file(folder / f"{split}.idx"),
        } | {f"{name}_sha256": hash_file(folder / f"{split}.{file}") for name, file in FILES.items()
             if (folder / f"{split}.{file}").exists()}}
    write_json(folder / "category.json", entry)
    return entry


def built(folder: Path, made_from: str) -> bool:
    """Whether the category is there, whole, and made from the same things."""
    if not (folder / "category.json").exists() or read_json(folder / "category.json")["made_from"] != made_from:
        return False
    try:
        for split in SPLITS:
            tokens = Indexed(folder / split)
            load_mask(folder, split, len(tokens.tokens))
            if len(tokens) != len(np.load(folder / f"{split}.bytes.npy")):
                return False
        return True
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
