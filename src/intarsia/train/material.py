"""What a training reads: tokenizer, corpus, and the samples of a blend, made once and kept in the run folder."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intarsia.arch import Architecture
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import atomic_path, fingerprint, hash_file, read_json, write_json
from intarsia.data import Blend, Change, Corpus, Samples, build, fetch, load_blend, mix, tokens_of
from intarsia.data.conversations import FIELDS, read_messages
from intarsia.data.extend import Extension, extended
from intarsia.data.sources import Source, documents, sources
from intarsia.formats import Tokenizer, open_checkpoint
from intarsia.formats.tokenizer import check_vocabulary
from intarsia.train.dialogues import Dialogues
from intarsia.train.recipe import Data, Recipe
from intarsia.train.tokenizer import train_tokenizer

EXTENDED = 1  # raise it when the same conversations are joined to others
BLENDS = "blends.json"  # of a run folder: which blend held from which sample on


@dataclass(frozen=True)
class Material:
    corpus: Corpus
    tokenizer: Tokenizer | None  # None: the corpus does not hold its own
    samples: Samples


def blend_of(data: Data) -> Blend:
    """The blend of a recipe."""
    blend = load_blend(data.blend)
    return blend if data.max_epochs is None else blend.model_copy(update={"max_epochs": data.max_epochs})


def open_corpus(data: Data, folder: Path, init: str | None = None) -> tuple[Corpus, Tokenizer | None]:
    """The corpus and its tokenizer: one that is built, or text that is built now into `folder`, with the tokenizer of
    the checkpoint `init` where no other is named."""
    if data.path is not None and _is_corpus(Path(data.path)):
        corpus = Corpus(data.path)
    else:
        if data.path is None and not data.fetched:
            raise IntarsiaError(
                f"this recipe brings no text of its own: give a corpus of `intarsia data build`, or {data.kind}, with "
                f"--data DIR (data.fetched = true takes what `intarsia fetch {data.kind}` brings)."
            )
        text = data.path or fetch(data.kind)
        tokenizer = _tokenizer(data, text, folder / "tokenizer", init)
        if data.kind != "text":
            tokenizer = Dialogues(tokenizer, data.kind, data.template, data.length)
        if tokens_of(data.extend.length):
            text = _extended(data, text, tokenizer, folder / "extended")
        build(text, tokenizer, folder / "corpus", max_bytes=data.max_bytes, heldout=data.heldout,
              field=FIELDS[data.kind], sequence_length=data.length)  # fmt: skip
        corpus = Corpus(folder / "corpus")
    own = corpus.path / "tokenizer"
    return corpus, Tokenizer.from_folder(own) if own.is_dir() else None


def _is_corpus(path: Path) -> bool:
    manifest = path / "manifest.json"
    return manifest.is_file() and "made_from" in read_json(manifest)


def _extended(data: Data, inputs: Any, dialogues: Dialogues, folder: Path) -> Path:
    """A folder with the conversations of every category, some of them joined; made once."""
    found: dict[str, list[Source]] = {}
    for source in sources(inputs):
        found.setdefault(source.category, []).append(source)
    hashes = {category: [hash_file(s.path) for s in files] for category, files in found.items()}
    target = folder / fingerprint(EXTENDED, hashes, data.extend, dialogues.manner, dialogues.fingerprint)
    if target.is_dir():
        return target
    settings = Extension(tokens_of(data.extend.length), data.extend.share, data.extend.turns)
    with atomic_path(target) as temporary:
        temporary.mkdir()
        for category, files in found.items():
            rows = (read_messages(text) for s in files for text in documents(s, FIELDS[data.kind]))
            with open(temporary / f"{category}.jsonl", "w", encoding="utf-8") as out:
                for messages in extended(rows, dialogues.count, settings):
                    out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return target


def _tokenizer(data: Data, text: Any, folder: Path, init: str | None) -> Tokenizer:
    given = data.tokenizer
    if given.path is None and init is None:
        return train_tokenizer(text, blend_of(data), given.vocab_size, given.max_bytes, folder)
    path = Path(given.path or init).expanduser()
    if (path / "tokenizer.json").is_file():
        return Tokenizer.from_folder(path)
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(path))
    if tokenizer is None:
        raise IntarsiaError(f"{path} has no tokenizer: name a folder that has one with data.tokenizer.path.")
    return tokenizer


def gather(recipe: Recipe, arch: Architecture, folder: Path, changes: list[Change], verify: bool) -> Material:
    """Everything that is read; `changes` are the blends that held, the last of them now; with `verify` every byte of
    the corpus is compared first. Raises `IntarsiaError` for a corpus that does not fit the model, is damaged, or is
    read more often than the blend allows."""
    data = recipe.data
    if data.length > arch.max_positions:
        raise IntarsiaError(f"data.length is {data.length:,} and the context of {recipe.model} {arch.max_positions:,}: "
                            "choose less.")
    corpus, tokenizer = open_corpus(data, folder, recipe.init)
    if verify:
        corpus.verify()
    if corpus.vocab_size > arch.vocab_size:
        raise IntarsiaError(f"the corpus {corpus.path} has a vocabulary of {corpus.vocab_size:,}, and {recipe.model} "
                            f"one of {arch.vocab_size:,}: build it with a smaller tokenizer.")
    if tokenizer is not None:
        check_vocabulary(tokenizer, arch)
    *before, now = changes
    samples = mix(
        corpus, now.blend, now.tokens, data.length, packing=data.packing, cross=data.cross, seed=recipe.seed,
        before=before, start=now.start,
    )  # fmt: skip
    if recipe.prefers:
        _check_pairs(corpus, samples, recipe.loss.preference.kind)
    return Material(corpus, tokenizer, samples)


def _check_pairs(corpus: Corpus, samples: Samples, kind: str) -> None:
    """Raise `IntarsiaError` where preferences would be tuned on what is no pairs, or on rewards that are not there."""
    for source in samples.order.sources:
        pairs = corpus.pairs(samples.split, source)
        if pairs is None:
            raise IntarsiaError(f"{source} of {corpus.path} is no pairs of answers: build it of rows with prompt, "
                                'chosen and rejected (data.kind = "preferences").')
        if left_out := int((pairs[:, 0] == 0).sum()):
            print(f"{source}: {left_out:,} of {len(pairs):,} pairs are longer than a sample and left out",
                  file=sys.stderr)  # fmt: skip
        if kind == "rpo" and np.isnan(pairs[:, 1:]).any():
            raise IntarsiaError(f"some pairs of {source} in {corpus.path} have no rewards, which RPO is about: give "
                                '"rewards": [of the chosen, of the rejected], or take loss.preference.kind = "dpo".')


def blends_so_far(recipe: Recipe, folder: Path, sample: int) -> list[Change]:
    """The blends of a run, from its beginning: one that is new in the recipe holds from `sample` on, and is noted."""
    file = folder / BLENDS
    rows = read_json(file) if file.exists() else []
    known = [Change(row["start"], Blend.model_validate_json(row["blend"]), row["tokens"]) for row in rows]
    known = [change for change in known if change.start <= sample]
    now = Change(sample if known else 0, blend_of(recipe.data), tokens_of(recipe.data.tokens))
    if not known or (known[-1].blend, known[-1].tokens) != (now.blend, now.tokens):
        known = [change for change in known if change.start < now.start] + [now]
        write_json(file, [{"start": c.start, "blend": c.blend.model_dump_json(), "tokens": c.tokens} for c in known])
    return known
