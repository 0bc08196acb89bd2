"""What a training reads: tokenizer, corpus, and the samples of a blend, made once and kept in the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.arch import Architecture
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json, write_json
from intarsia.data import Blend, Change, Corpus, Samples, build, fetch, load_blend, mix, tokens_of
from intarsia.formats import Tokenizer, open_checkpoint
from intarsia.formats.tokenizer import check_vocabulary
from intarsia.train.recipe import Data, Recipe
from intarsia.train.tokenizer import train_tokenizer

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


def open_corpus(data: Data, folder: Path) -> tuple[Corpus, Tokenizer | None]:
    """The corpus and its tokenizer: one that is built, or text that is built now into `folder`."""
    if data.path is not None and _is_corpus(Path(data.path)):
        corpus = Corpus(data.path)
    else:
        if data.path is None and not data.fetched:
            raise IntarsiaError(
                "this recipe brings no text of its own: give a corpus of `intarsia data build`, or text, with "
                "--data DIR (data.fetched = true takes what `intarsia fetch text` brings)."
            )
        text = data.path or fetch("text")
        tokenizer = _tokenizer(data, text, folder / "tokenizer")
        build(text, tokenizer, folder / "corpus", max_bytes=data.max_bytes, heldout=data.heldout,
              sequence_length=data.length)  # fmt: skip
        corpus = Corpus(folder / "corpus")
    own = corpus.path / "tokenizer"
    return corpus, Tokenizer.from_folder(own) if own.is_dir() else None


def _is_corpus(path: Path) -> bool:
    manifest = path / "manifest.json"
    return manifest.is_file() and "made_from" in read_json(manifest)


def _tokenizer(data: Data, text: Any, folder: Path) -> Tokenizer:
    given = data.tokenizer
    if given.path is None:
        return train_tokenizer(text, blend_of(data), given.vocab_size, given.max_bytes, folder)
    path = Path(given.path).expanduser()
    if (path / "tokenizer.json").is_file():
        return Tokenizer.from_folder(path)
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(path))
    if tokenizer is None:
        raise IntarsiaError(f"data.tokenizer.path names {path}, which has no tokenizer: name a folder that has one.")
    return tokenizer


def gather(recipe: Recipe, arch: Architecture, folder: Path, changes: list[Change], verify: bool) -> Material:
    """Everything that is read; `changes` are the blends that held, the last of them now; with `verify` every byte of
    the corpus is compared first. Raises `IntarsiaError` for a corpus that does not fit the model, is damaged, or is
    read more often than the blend allows."""
    data = recipe.data
    if data.length > arch.max_positions:
        raise IntarsiaError(f"data.length is {data.length:,} and the context of {recipe.model} {arch.max_positions:,}: "
                            "choose less.")
    corpus, tokenizer = open_corpus(data, folder)
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
    return Material(corpus, tokenizer, samples)


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
