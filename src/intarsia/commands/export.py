"""`intarsia export`: write a model in another format."""

from __future__ import annotations

import argparse
from pathlib import Path

from intarsia.commands.common import MODEL_HELP, find_model

# Those of formats.writer, which would import torch for --help.
TARGETS = (
    "hf", "gguf", "llama", "mistral", "qwen2", "qwen3", "nemotron-nas", "nemotron_h", "nemotron_h_puzzle",
    "granitemoehybrid", "mamba", "mamba2", "intarsia",
)  # fmt: skip


def add(commands) -> None:
    parser = commands.add_parser("export", help="write a model in another format", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; for gguf the file")
    parser.add_argument(
        "--to", choices=TARGETS, default="hf", metavar="TARGET",
        help="hf: a family that stock transformers loads, for models of uniform widths (default); nemotron-nas or "
        "nemotron_h_puzzle: widths that differ from layer to layer, for servers; gguf: for llama.cpp; intarsia: "
        f"anything; or a family by its name. All: {', '.join(TARGETS)}",
    )  # fmt: skip
    parser.add_argument("--type", choices=("f32", "bf16", "q8_0"), help="how gguf keeps the weights (default: bf16)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from intarsia.base.errors import IntarsiaError
    from intarsia.formats import export

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise IntarsiaError(f"{args.out} exists already and will not be overwritten: name a new one.")
    export(find_model(args.model), args.out, to=args.to, quantisation=args.type)
    print(f"written: {args.out}")
