"""A Nemotron-H with random weights beside its peers, in bfloat16: prefill, decode, training, cost of length, kernels.

    python bench/hybrid.py [--lengths 512,2048,8192] [--peers transformers,llama.cpp] [--llama VENV/bin/python]
    python bench/hybrid.py --device cuda

Peers run in processes of their own, in turns with us: what is slow for a second is slow for all. `--llama` names a
Python that has llama-cpp-python. A peer that is missing or crashes is a sentence and an empty cell. On a GPU the 8B
shape runs, beside no peer unless one is asked for. Everything measured goes to --out, the tables to docs/benchmarks.md
between their markers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from command import called, finish, whole_numbers
from page import DOCS, write_section
from peers.protocol import Peer, PeerError
from peers.tables import section

from intarsia.arch import catalog, parameters
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import write_json
from intarsia.base.machine import cores, cpu_model, memory_bytes
from intarsia.base.progress import Progress

QUANTISATIONS = ("Q8_0", "Q4_0", "Q4_K_M")
OURS, STOCK, LLAMA = "Intarsia", "transformers", "llama.cpp"
MODELS = {"cpu": "nemotron-h-187m", "cuda": "nemotron-h-8b"}
BYTES_TO_TRAIN = 20  # a parameter: bfloat16 weight and gradient, float32 master, gradient and two moments


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    lengths: tuple[int, ...]  # prompts read, and contexts decoded behind
    turns: int
    decoded: int  # tokens a turn
    train: tuple[int, int]  # batch, length
    long: tuple[int, ...]  # prompts of which the cost per token is told, ours alone
    kernels: tuple[int, int]  # prompt, and sequences of a step


@dataclass
class Results:
    """Everything measured, seconds as they came."""

    plan: dict[str, Any]
    machine: dict[str, Any]
    about: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ceilings: list[dict[str, float]] = field(default_factory=list)
    prefill: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    decode: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    train: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    long: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    kernels: list[dict[str, Any]] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
            print(f"bench/hybrid.py: {sentence}", file=sys.stderr, flush=True)


def main() -> int:
    args = arguments()
    plan = plan_of(args)
    machine = {
        "device": args.device, "cpu": cpu_model(), "threads": args.threads, "model": args.model,
        "command": called(),
    }  # fmt: skip
    results = Results(asdict(plan), machine)
    with tempfile.TemporaryDirectory() as folder:
        inference(args, plan, results, Path(folder))
        if "train" in args.parts:
            training(args, plan, results, Path(folder) / "weights")
    write_json(args.out, asdict(results))
    text = section(asdict(results))
    print(text)
    if not args.quick:
        write_section(args.docs, "bench/hybrid.py", text)
    return 0


def inference(args: argparse.Namespace, plan: Plan, results: Results, folder: Path) -> None:
    """Prefill and decode of everybody, then what only we can tell: cost of length, kernels."""
    peers = {name: peer_of(name, args) for name in [OURS, *args.peers]}
    try:
        for name, peer in peers.items():
            attempt(results, lambda name=name, peer=peer: load(name, peer, args, plan, results, folder))
        if OURS not in results.about:
            raise IntarsiaError("our own side does not run, so there is nothing to compare.")
        ours = peers[OURS]
        for length in plan.lengths if "speed" in args.parts else ():
            side_by_side(peers, length, plan, results, args.device)
        for name in args.peers:
            peers.pop(name).stop()
        if "long" in args.parts:
            attempt(results, lambda: lengths(ours, plan, results))
        if "kernels" in args.parts:
            prompt, batch = plan.kernels
            attempt(results, lambda: results.ceilings.append(ours.ask("ceilings", device=args.device)))
            attempt(results, lambda: results.kernels.extend(
                ours.ask("kernels", model=args.model, device=args.device, length=prompt, batch=batch)
            ))  # fmt: skip
    finally:
        for peer in peers.values():
            peer.stop()


def peer_of(name: str, args: argparse.Namespace) -> Peer:
    if name.startswith(LLAMA):
        return Peer(name, "peers.llama", args.llama, args.threads)
    return Peer(name, "peers.ours" if name == OURS else "peers.stock", threads=args.threads)


def load(name: str, peer: Peer, args: argparse.Namespace, plan: Plan, results: Results, folder: Path) -> None:
    """Every peer gets the same weights: ours are drawn, and written for the others."""
    weights, gguf = str(folder / "weights"), str(folder / "model.gguf")
    if name == OURS:
        wanted = {"weights": weights} if STOCK in args.peers else {}
        wanted |= {"gguf": gguf} if any(p.startswith(LLAMA) for p in args.peers) else {}
        about = peer.ask("load", model=args.model, device=args.device, **wanted)
    elif name == STOCK:
        about = peer.ask("load", weights=weights, device=args.device)
    else:
        room = max(plan.lengths) + plan.turns * plan.decoded + 64
        kind = name.removeprefix(f"{LLAMA} ")
        about = peer.ask("load", gguf=gguf, kind=kind, room=room, threads=args.threads)
    results.about[name] = about


def side_by_side(peers: dict[str, Peer], length: int, plan: Plan, results: Results, device: str) -> None:
    """Prompts of one length in turns, then tokens behind them in turns; the machine's ceilings in every turn."""
    with Progress(f"prompts of {length:,}", (len(peers) + 1) * plan.turns * 2) as progress:

        def measure(name: str, kept: dict[str, dict[int, list[float]]], do: str, **arguments: Any) -> None:
            seconds = peers[name].ask(do, **arguments)["seconds"]
            several = seconds if isinstance(seconds, list) else [seconds]
            kept.setdefault(name, {}).setdefault(length, []).extend(several)

        for turn in range(plan.turns):
            attempt(results, lambda: results.ceilings.append(peers[OURS].ask("ceilings", device=device)))
            progress.advance(1, f"turn {turn + 1}")
            for name in peers:
                if name in results.about:
                    attempt(results, lambda n=name: measure(n, results.prefill, "prefill", length=length))
                progress.advance(1, name)
        for turn in range(plan.turns):
            for name in peers:
                if length in results.prefill.get(name, {}):
                    attempt(results, lambda n=name: measure(n, results.decode, "decode", count=plan.decoded))
                progress.advance(1, name)
            progress.advance(1, f"turn {turn + 1}")


def lengths(ours: Peer, plan: Plan, results: Results) -> None:
    """What a token costs in long prompts and behind them, kind of block by kind of block."""
    with Progress("long prompts", plan.turns * sum(plan.long)) as progress:
        for _ in range(plan.turns):
            for length in plan.long:
                read = ours.ask("prefill", length=length, watch=True)
                behind = ours.ask("decode", count=plan.decoded, watch=True)
                results.long.setdefault(length, []).append({"prefill": read, "decode": behind})
                progress.advance(length, f"{length:,} tokens")


def training(args: argparse.Namespace, plan: Plan, results: Results, weights: Path) -> None:
    """Steps of ours and of transformers in turns, every turn in a process of its own for its peak of memory."""
    batch, length = plan.train
    need = BYTES_TO_TRAIN * parameters(catalog.get(args.model))
    if args.device == "cpu" and need > memory_bytes():
        results.note(f"a training step of {args.model} takes {need / 2**30:.0f} GiB and more: left out.")
        return
    names = [name for name in (OURS, STOCK) if name in results.about]
    with Progress("training", plan.turns * len(names)) as progress:
        for _ in range(plan.turns):
            for name in names:
                what = {"model": args.model} if name == OURS else {"weights": str(weights)}
                with peer_of(name, args) as peer:
                    attempt(results, lambda peer=peer, name=name, what=what: results.train.setdefault(name, []).append(
                        peer.ask("train", device=args.device, batch=batch, length=length, steps=2, **what)
                    ))  # fmt: skip
                progress.advance(1, name)


def attempt(results: Results, call: Any) -> None:
    """A peer's failure is a note, not an end."""
    try:
        call()
    except PeerError as error:
        results.note(f"{error}.")


def plan_of(args: argparse.Namespace) -> Plan:
    if args.quick:
        return Plan(args.lengths or (128,), 2, 2, (1, 128), (512, 1024), (512, 2))
    if args.device == "cuda":
        return Plan(args.lengths or (2048, 8192), args.turns, 16, (2, 1024), (2048, 8192, 32768, 65536), (8192, 64))
    return Plan(args.lengths or (512, 2048, 8192), args.turns, 8, (2, 1024), (2048, 8192, 32768, 65536), (2048, 8))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="a name of the catalog; default: nemotron-h-187m, on a GPU nemotron-h-8b")
    parser.add_argument("--lengths", type=whole_numbers, metavar="A,B", help="prompts; default: 512,2048,8192")
    parser.add_argument("--peers", help="transformers, llama.cpp, both or ''; default: both, on a GPU none")
    parser.add_argument(
        "--llama", metavar="PYTHON", default=sys.executable, help="a Python with llama-cpp-python; default: this one"
    )
    parser.add_argument("--parts", default="speed,train,long,kernels", help="default: speed,train,long,kernels")
    parser.add_argument("--turns", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, default=cores(), help="default: every core")
    parser.add_argument("--quick", action="store_true", help="does it run? Short prompts, two turns, no page written")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/hybrid.json"))
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page that holds the tables")
    args = parser.parse_args()
    args.model = args.model or MODELS[args.device]
    args.parts = args.parts.split(",")
    args.llama = str(Path(args.llama).absolute())  # not resolved: a virtual environment's python is a link
    wanted = args.peers if args.peers is not None else "" if args.device == "cuda" else f"{STOCK},{LLAMA}"
    args.peers = []
    for name in filter(None, wanted.split(",")):
        if name not in (STOCK, LLAMA):
            parser.error(f"the peer '{name}' is not known; known: {STOCK}, {LLAMA}")
        args.peers += [f"{LLAMA} {kind}" for kind in QUANTISATIONS] if name == LLAMA else [name]
    return args


if __name__ == "__main__":
    finish(main)
