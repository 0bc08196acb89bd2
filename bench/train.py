"""Training a nano: its speed beside transformers, hybrid against Transformer and Mamba, the order of phases, FP8.

    python bench/train.py [--tokens 2M] [--seeds 3] [--parts speed,control,architectures,order,fp8]
    python bench/train.py --quick

Runs are run folders under --out: an interrupted benchmark goes on where it was. All runs read the same corpus; of one
seed, they see the same samples in the same order (but for the part that is about the order).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from command import called, finish, known_words
from page import DOCS, write_section
from peers.protocol import Peer, PeerError
from training_tables import section

from intarsia.arch import catalog
from intarsia.base.files import write_json, write_text
from intarsia.base.machine import cores, cpu_flags, cpu_model
from intarsia.base.progress import Progress
from intarsia.base.recipe import load_recipe, to_toml
from intarsia.data import Corpus, load_blend, tokens_of
from intarsia.train.recipe import Recipe

HYBRID, CONTROL, MAMBA = "nemotron-h-nano", "nemotron-t-nano", ("mamba1-nano", "mamba2-nano")
PASS = (8, 512)  # samples and length of the step whose speed is compared
CONTEXTS = (1024, 4096, 16384, 65536)  # behind which the architectures decode
PARTS = ("speed", "control", "architectures", "order", "fp8")
# name: (recipe, what is changed in it, the part that asks for it)
RUNS = {
    "hybrid": (HYBRID, [], ("control", "architectures", "order", "fp8")),
    "transformer": (CONTROL, [], ("control", "architectures")),
    "mamba1": (MAMBA[0], [], ("architectures",)),
    "mamba2": (MAMBA[1], [], ("architectures",)),
    "random-order": (HYBRID, [], ("order",)),
    "fp8": (HYBRID, ["precision.fp8=true"], ("fp8",)),
}
QUICK = ["batch_tokens=1024", "micro_tokens=1024", "data.length=128", "evaluate.documents=2"]


def main() -> int:
    args = arguments()
    data = corpus(args)
    results: dict[str, Any] = {
        "machine": {"cpu": cpu_model(), "flags": cpu_flags(), "cores": cores(), "threads": args.threads,
                    "command": called()},
        "tokens": tokens_of(args.tokens), "seeds": args.seeds, "notes": [], "speed": {}, "runs": {},
        "architectures": {},
    }  # fmt: skip
    if "speed" in args.parts:
        speed(args, data, results)
    if "architectures" in args.parts:
        results["architectures"] = architectures(args)
    for name, (recipe, changes, parts) in RUNS.items():
        if set(parts) & set(args.parts):
            for seed in range(args.seeds):
                results["runs"].setdefault(name, []).append(one_run(args, data, name, recipe, changes, seed))
    write_json(args.out / "train.json", results)
    text = section(results)
    print(text)
    if not args.quick:
        parts = "" if set(args.parts) == set(PARTS) else f" --parts {','.join(args.parts)}"
        write_section(args.docs, f"bench/train.py{parts}", text)
    return 0


def corpus(args: argparse.Namespace) -> Path:
    """The recipe's own text and tokenizer, built once for all runs."""
    from intarsia.train.material import open_corpus

    changes = ["data.max_bytes=300_000", "data.tokenizer.max_bytes=1_500_000"] if args.quick else []
    recipe = load_recipe(Recipe, HYBRID, changes)
    return open_corpus(recipe.data, args.out / "data")[0].path


def common(args: argparse.Namespace, data: Path) -> list[str]:
    changes = [f"data.path={json.dumps(str(data))}", f"data.tokens={json.dumps(args.tokens)}", "data.verify=false"]
    return changes + args.set + ([*QUICK, "data.max_epochs=100"] if args.quick else [])


def one_run(
    args: argparse.Namespace, data: Path, name: str, recipe: str, changes: list[str], seed: int
) -> dict[str, Any]:
    """Train once, unless it was done before: the loss of every step, bits per byte at the end."""
    import torch

    from intarsia.base.runfolder import losses
    from intarsia.train.loop import train

    torch.set_num_threads(args.threads)
    every = f"checkpoint.every={max(1, tokens_of(args.tokens) // 10)}"
    changes = [*common(args, data), *changes, f"seed={seed}", "evaluate.every=0", every]
    if name == "random-order":
        changes.append(f"data.blend={json.dumps(str(without_phases(args, recipe, data, changes)))}")
    out = args.out / f"{name}-{seed}"
    print(f"{name}, seed {seed}", file=sys.stderr)
    summary = train(load_recipe(Recipe, recipe, changes), out)
    rows = losses(out)
    return {
        "losses": [row["loss"] for row in rows], "bits_per_byte": summary["bits_per_byte"],
        "skipped": summary["skipped"], "seconds": summary["seconds"],
        "tokens_per_second": [row["tokens_per_second"] for row in rows],
    }  # fmt: skip


def without_phases(args: argparse.Namespace, recipe: str, data: Path, changes: list[str]) -> Path:
    """The blend of one phase that reads as much of every source as all phases together do."""
    settings = load_recipe(Recipe, recipe, changes)
    blend, have = load_blend(settings.data.blend), Corpus(data)
    tokens, start = tokens_of(settings.data.tokens), 0
    weights: dict[str, float] = {}
    shares = blend.weights({c: have.tokens("train", c) for c in have.categories})
    for end, phase in zip(blend.ends(tokens), shares):
        for source, share in phase.items():
            weights[source] = weights.get(source, 0.0) + float(share) * (end - start) / tokens
        start = end
    path = args.out / "without-phases.toml"
    write_text(path, to_toml({"max_epochs": blend.max_epochs, "phases": [{"weights": weights}]}))
    return path


def speed(args: argparse.Namespace, data: Path, results: dict[str, Any]) -> None:
    """Steps of ours and of transformers in turns, each in a process of its own, on one text's length of tokens."""
    import torch

    from intarsia.formats import save
    from intarsia.model import Decoder, initialise

    batch, length = PASS if not args.quick else (2, 128)
    turns, steps = (2, 1) if args.quick else (5, 3)
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights")
        save(initialise(Decoder(catalog.get(HYBRID), torch.float32)), weights, family="nemotron_h")
        ours = Peer("Intarsia", "peers.training", threads=args.threads)
        stock = Peer("transformers", "peers.stock", threads=args.threads)
        changes = [*common(args, data.absolute()), f"data.length={length}", f"batch_tokens={batch * length}",
                   f"micro_tokens={batch * length}"]  # fmt: skip
        try:
            ours.ask("load", recipe=HYBRID, changes=changes, out=str(Path(folder) / "run"))
            ours.ask("train", steps=1)
            with Progress("speed", 2 * turns) as progress:
                for _ in range(turns):
                    for name, ask in (
                        ("Intarsia", lambda: ours.ask("train", steps=steps)),
                        ("transformers", lambda: stock.ask(
                            "train", weights=weights, device="cpu", batch=batch, length=length, steps=steps)),
                    ):  # fmt: skip
                        each = [batch * length / s for s in ask()["seconds"]]
                        results["speed"].setdefault(name, []).append(sorted(each)[len(each) // 2])
                        progress.advance()
        except PeerError as error:
            results["notes"].append(f"{error}.")
            print(f"bench/train.py: {error}", file=sys.stderr)
        finally:
            ours.stop()
            stock.stop()
    results["speed_shape"] = [batch, length]


def architectures(args: argparse.Namespace) -> dict[str, Any]:
    """Steps, decoding and scans of the four kinds of model, in turns."""
    import torch
    from architectures import compared

    from intarsia.train.precision import compute_dtype
    from intarsia.train.recipe import Precision

    torch.set_num_threads(args.threads)
    models = {name: recipe for name, (recipe, _, parts) in RUNS.items() if "architectures" in parts}
    dtype = compute_dtype(Precision(), torch.device("cpu"))
    if args.quick:
        return compared(models, dtype, (2, 128), CONTEXTS[:2], 2, 2)
    return compared(models, dtype, PASS, CONTEXTS, 5, 8)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="2M", help="of every run (default: 2M)")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one value of every recipe")
    parser.add_argument("--parts", type=known_words(PARTS), default=PARTS, help=f"default: {','.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=cores(), help="default: every core")
    parser.add_argument("--quick", action="store_true", help="does it run? 16K tokens, one seed, no page written")
    parser.add_argument("--out", type=Path, help="default: runs/bench/train, with --quick runs/bench/train-quick")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page that holds the tables")
    args = parser.parse_args()
    args.out = args.out or Path("runs/bench/train-quick" if args.quick else "runs/bench/train")
    if args.quick:
        args.tokens, args.seeds = "16K", 1
    return args


if __name__ == "__main__":
    finish(main)
