"""`intarsia arch`: draw a model, block by block, and say what it costs by arithmetic."""

from __future__ import annotations

import argparse
from pathlib import Path

from intarsia.commands.common import at_least, find_model, print_table

COLOURS = {"mamba2": "green", "mamba1": "cyan", "ffn": "blue", "experts": "magenta", "attention": "red"}
NAMES = {
    "mamba2": "Mamba-2", "mamba1": "Mamba-1", "ffn": "FFN", "experts": "experts", "attention": "attention",
    "linear": "linear",
}  # fmt: skip
ROW = 64  # cells a line


def add(commands) -> None:
    parser = commands.add_parser(
        "arch", help="draw a model and what it costs", description=__doc__,
        epilog="Without a model: the catalog of published ones. Weights and keys count 2 bytes, states of scans 4.",
    )  # fmt: skip
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a name of the catalog, a model folder, a .gguf file, or a run folder"
    )
    parser.add_argument("--context", type=at_least(1), default=8192, help="tokens a sequence (default %(default)s)")
    parser.add_argument("--batch", type=at_least(1), default=1, help="sequences (default %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.model is None:
        list_catalog()
    else:
        draw(*find(args.model), args.context, args.batch)


def find(given: str):
    """A title and the architecture, of the catalog or of a checkpoint."""
    from intarsia.arch import catalog

    if given in catalog.names() and not Path(given).exists():
        return f"{catalog.title(given)} ({catalog.source(given)})", catalog.get(given)
    from intarsia.base.errors import IntarsiaError, did_you_mean
    from intarsia.data import ITEMS

    if not Path(given).expanduser().exists() and given not in ITEMS:
        raise IntarsiaError(
            f"there is no model at '{given}', nor in the catalog, which has {', '.join(catalog.names())}."
            f"{did_you_mean(given, [*catalog.names(), *ITEMS])}"
        )
    from intarsia.formats import open_checkpoint

    path = find_model(given)
    return str(path), open_checkpoint(path).architecture


def list_catalog() -> None:
    from intarsia.arch import catalog, parameters, pattern_of

    rows = []
    for name in catalog.names():
        arch = catalog.get(name)
        counts = [pattern_of(arch).count(letter) or "" for letter in "M-*"]
        rows.append([name, *counts, count(parameters(arch)), *map(size, caches(arch.blocks))])
    print_table("", ["model", "M", "-", "*", "parameters", "a token", "a sequence"], rows)
    print("M Mamba-2, - FFN, * attention; bytes that a token and a sequence add to the cache.")
    print("Draw one with: intarsia arch MODEL")


def draw(title: str, arch, context: int, batch: int) -> None:
    """Pattern, blocks by kind and width, totals, and the design rules that a hybrid breaks."""
    from intarsia.arch import Mamba2, check_nemotron_h, memory_bytes, parameters

    print(f"{title}\nwidth {arch.hidden_size:,}, vocabulary {arch.vocab_size:,}, {positions(arch)}, {arch.family}\n")
    draw_pattern(arch)
    total = ["total", count(parameters(arch)), *map(size, caches(arch.blocks))]
    rows = [*block_rows(arch), *other_rows(arch), total]
    print_table("", ["block", "parameters", "a token", "a sequence"], rows)
    weights, both = 2 * parameters(arch), memory_bytes(arch, context, batch)
    texts = f"{batch} sequence{'s' if batch > 1 else ''} of {context:,} tokens"
    print(f"{texts}: cache {size(both - weights)}, weights {size(weights)}, together {size(both)}")
    if arch.attentions and any(isinstance(block, Mamba2) for block in arch.blocks):
        broken = check_nemotron_h(arch)
        print("Against the design rules of Nemotron-H:" if broken else "The design rules of Nemotron-H are kept.")
        for sentence in broken:
            print(f"  {sentence}")


def draw_pattern(arch) -> None:
    """The blocks as a row of cells, coloured on a terminal, letters elsewhere."""
    from rich.console import Console
    from rich.text import Text

    from intarsia.arch import kind, pattern_of

    console = Console(highlight=False)
    letters = pattern_of(arch)
    for start in range(0, len(letters), ROW):
        line = Text(f"{start:4}  ")
        for letter, block in zip(letters[start : start + ROW], arch.blocks[start : start + ROW]):
            colour = COLOURS.get(kind(block))
            line.append(letter, style=f"bold white on {colour}" if colour else "")
        console.print(line, soft_wrap=True)


def block_rows(arch) -> list[list[str]]:
    """A row for every kind and width, in the order in which they first appear."""
    from intarsia.arch import block_parameters, kind
    from intarsia.arch.pattern import LETTERS

    rows = []
    for block in dict.fromkeys(arch.blocks):
        alike = arch.blocks.count(block)
        label = f"{alike:3} {LETTERS[kind(block)]} {NAMES[kind(block)]} {widths(block)}"
        cost = count(alike * block_parameters(block, arch.hidden_size))
        rows.append([label, cost, *map(size, caches([block] * alike))])
    return rows


def other_rows(arch) -> list[list[str]]:
    """Embedding, final norm and head."""
    matrix = count(arch.vocab_size * arch.hidden_size)
    head = [] if arch.tied_embeddings else [["      head", matrix]]
    return [["      embedding", matrix], ["      final norm", count(arch.hidden_size)], *head]


def caches(blocks) -> tuple[int, int]:
    """Bytes that blocks keep for every further token, and for a sequence however long."""
    from intarsia.arch import block_cache_bytes

    fixed = sum(block_cache_bytes(block, 0) for block in blocks)
    return sum(block_cache_bytes(block, 1) for block in blocks) - fixed, fixed


def widths(block) -> str:
    """The widths of a block in words."""
    from intarsia.arch import Attention, Experts, FeedForward, Mamba1, Mamba2

    if isinstance(block, Attention):
        window = f", window {block.sliding_window:,}" if block.sliding_window else ""
        return f"{block.num_heads}q/{block.num_kv_heads}kv x {block.head_dim}{window}"
    if isinstance(block, Mamba2):
        return f"{block.num_heads}x{block.head_dim}, state {block.state_size}, {block.num_groups} groups"
    if isinstance(block, Mamba1):
        return f"{block.inner_size:,}, state {block.state_size}"
    if isinstance(block, FeedForward):
        return f"{block.intermediate_size:,}, {'gated ' if block.gated else ''}{block.activation}"
    if isinstance(block, Experts):
        shared = f", shared {block.shared_size:,}" if block.shared_size else ""
        return f"{block.experts_per_token} of {block.num_experts} x {block.intermediate_size:,}{shared}"
    return ""


def positions(arch) -> str:
    sees = arch.rope is not None and any(block.rope for block in arch.attentions)
    return f"rotary positions (base {arch.rope.theta:,.0f})" if sees else "no positions"


def count(number: int) -> str:
    """`8.101 B`, `187.2 M`, `768`."""
    if number >= 1e9:
        return f"{number / 1e9:.3f} B"
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number:,}"


def size(number: int) -> str:
    """Bytes for a person; empty for none."""
    if not number:
        return ""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return f"{number} B"
