"""Which way of training a block library is worth more per minute: nested widths, own widths, or the fit alone?

    python bench/library.py [--parent smollm2-135m] [--tokens 16384] [--fit 24576]

Every mode sees the same text; one option of a site is drawn a step in each, so a step costs about the same. Told:
normalised MSE on held-out text, the mean over all sites and FFN widths, before training, after it, after the fit; and
the seconds. The table goes to docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from command import called
from page import DOCS, table, write_section

from intarsia.commands.common import find_model
from intarsia.compress import text
from intarsia.compress.library import Builder
from intarsia.compress.options import options_for
from intarsia.compress.recipe import Library, Options
from intarsia.compress.statistics import collect
from intarsia.formats import load

SCRIPT = "bench/library.py"
COLUMNS = ("mode", "before", "trained", "fitted", "training s", "fit s")
MEANING = (
    "normalised mean square error of a narrowed FFN against the parent's on held-out text, mean over all sites and "
    "widths: as cut, after training, after the closed-form fit of its last matrix."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--fit", type=int, default=24_576)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page that holds the table")
    args = parser.parse_args()
    model, tokenizer = load(find_model(args.parent))
    model.requires_grad_(False)
    options = {i: options_for(b, Options(kv_methods=(), linear=False)) for i, b in enumerate(model.arch.blocks)}
    with tempfile.TemporaryDirectory() as folder:
        corpus = text.open_corpus(None, tokenizer, Path(folder) / "corpus", 600_000, 256)

        def batch(step: int, salt: int, split: str = "train") -> torch.Tensor:
            return text.batch(corpus, 4 * step, 4, 256, split, salt)

        moments = collect(model, (batch(n, 1) for n in range(16)))
        heldout = torch.cat([batch(n, 4, "heldout") for n in range(2)])
        rows: list[list[str]] = []
        for mode, tokens in (("fit alone", 0), ("nested", args.tokens), ("own", args.tokens)):
            recipe = Library(mode="own" if mode == "own" else "nested", tokens=tokens, lr=args.lr)
            builder = Builder(model, options, moments, recipe, "refit", Path(folder))
            before, began = _mean(builder.losses(heldout)), time.perf_counter()
            builder.train(lambda step: batch(step, 2), lambda: None, lambda tokens, note: None)
            trained, middle = _mean(builder.losses(heldout)), time.perf_counter()
            fitted = _mean(builder.fit((batch(n, 3) for n in range(args.fit // 1024)), heldout, lambda *_: None))
            seconds = [f"{middle - began:.0f}", f"{time.perf_counter() - middle:.0f}"]
            rows.append([mode, *(f"{value:.4f}" for value in (before, trained, fitted)), *seconds])
            print(table(COLUMNS, rows[-1:]).splitlines()[-1], flush=True)
    write_section(
        args.docs, SCRIPT, f"{time.strftime('%Y-%m-%d')}, {MEANING}\n\n    {called()}\n\n{table(COLUMNS, rows)}"
    )


def _mean(losses: dict[int, dict[str, float]]) -> float:
    return statistics.fmean(v for row in losses.values() for name, v in row.items() if name.startswith("ffn "))


if __name__ == "__main__":
    main()
