"""Decoding and prompts on packed weights beside transformers and llama.cpp, with the same weights and threads.

    python bench/engine.py [--models smollm2-135m,nemotron-h-187m] [--llama VENV/bin/python]

Everybody runs in a process of its own, in turns, and in every turn the memory's bandwidth is measured: what is slow for
a second is slow for all. A decoded token reads every weight once, so the share of the bandwidth that its weights alone
take is told. A peer that is missing or crashes is a sentence and an empty cell. Everything measured goes to --out, the
tables to docs/benchmarks.md between their markers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from command import called, finish
from page import DOCS, cell, ratios, table, write_section
from peers.protocol import Peer, PeerError

from intarsia.arch import catalog
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import write_json
from intarsia.base.machine import cores, cpu_model
from intarsia.base.progress import Progress

OURS, STOCK, LLAMA = "Intarsia", "transformers", "llama.cpp"
# Ours, and who has as many bits a weight: 16, 8.5 and 5 (of our int4 the embedding, the first block and Mamba blocks
# have 8.5; of Q4_1 all has 5, the embedding 5 or 6.6).
EQUALS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_1"}
WITH, WITHOUT = "second turn, prefixes remembered", "second turn, nothing remembered"
KINDS = ("BF16", "Q8_0", "Q4_0", "Q4_1")
BATCHES = (1, 8)


class Bench:
    """One model with everybody who runs it."""

    def __init__(self, model: str, args: argparse.Namespace, folder: Path):
        self.model, self.args, self.folder = model, args, folder
        self.about: dict[str, str] = {}
        self.bytes: dict[str, int] = {}
        self.seconds: dict[str, dict[str, list[float]]] = {}  # "prefill" or "decode 8", then by name
        self.bandwidth: list[float] = []
        self.read: dict[str, int] = {}  # tokens read for the second turn
        self.notes: list[str] = []
        self.peers = {f"{OURS} {kind}": self._peer("peers.packed") for kind in EQUALS}
        if STOCK in args.peers:
            self.peers[STOCK] = self._peer("peers.stock")
        if LLAMA in args.peers:
            self.peers |= {f"{LLAMA} {kind}": self._peer("peers.llama", args.llama) for kind in KINDS}

    def _peer(self, module: str, python: str = sys.executable) -> Peer:
        return Peer(module, module, python, self.args.threads)

    def run(self) -> None:
        try:
            with Progress(f"{self.model}: loading", len(self.peers)) as progress:
                for name in list(self.peers):
                    self._attempt(name, lambda name=name: self._load(name))
                    progress.advance(1, name)
            if f"{OURS} bf16" not in self.about:
                raise IntarsiaError(f"our own side does not run: {' '.join(self.notes)}")
            with Progress(f"{self.model}: turns", self.args.turns * len(self.about)) as progress:
                for _ in range(self.args.turns):
                    self.bandwidth.append(self.peers[f"{OURS} bf16"].ask("bandwidth"))
                    for name in list(self.about):
                        self._attempt(name, lambda name=name: self._turn(name))
                        progress.advance(1, name)
        finally:
            for peer in self.peers.values():
                peer.stop()

    def _load(self, name: str) -> None:
        room = self.args.context + self.args.decoded + 8
        kind = name.rpartition(" ")[2]
        if name.startswith(OURS):
            answer = self.peers[name].ask("load", folder=str(self.folder / "weights"), kind=kind, room=room)
            self.bytes[name], self.about[name] = answer["bytes"], answer["about"]
            return
        if name == STOCK:
            about = self.peers[name].ask("load", weights=str(self.folder / "weights"), device="cpu")
        else:
            about = self.peers[name].ask(
                "load", gguf=str(self.folder / "model.gguf"), kind=kind, room=room, threads=self.args.threads,
                sequences=max(BATCHES),
            )  # fmt: skip
        self.bytes[name], self.about[name] = self.peers[name].ask("bytes"), about

    def _turn(self, name: str) -> None:
        """A prompt, tokens behind it; the same for a batch, whose prompts are not timed."""
        for batch in BATCHES:
            for do, arguments in (("prefill", {"length": self.args.context, "batch": batch}),
                                  ("decode", {"count": self.args.decoded})):  # fmt: skip
                answer = self.peers[name].ask(do, **arguments)
                seconds = answer["seconds"] if isinstance(answer, dict) else answer
                if do == "prefill" and batch > 1:
                    continue
                kept = self.seconds.setdefault("prefill" if do == "prefill" else f"decode {batch}", {})
                kept.setdefault(name, []).append(statistics.median(seconds) if isinstance(seconds, list) else seconds)

        if name.startswith(OURS):
            for what, remember in ((WITH, True), (WITHOUT, False)):
                answer = self.peers[name].ask("second_turn", **self.args.turn, remember=remember)
                self.seconds.setdefault(what, {}).setdefault(name, []).append(answer["seconds"])
                self.read[what] = answer["read"]

    def _attempt(self, name: str, call: Any) -> None:
        try:
            call()
        except PeerError as error:
            sentence = f"{name}: {error}."
            if sentence not in self.notes:
                self.notes.append(sentence)
                print(f"bench/engine.py: {sentence}", file=sys.stderr, flush=True)

    def per_second(self, what: str, name: str) -> list[float]:
        """Tokens a second, turn by turn."""
        tokens = self.args.context if what == "prefill" else int(what.split()[1])
        return [tokens / s for s in self.seconds.get(what, {}).get(name, [])]

    def tables(self) -> str:
        columns = ["prefill", *(f"decode {b}" for b in BATCHES)]
        rows = []
        for name in self.about:
            steps, size = self.seconds.get("decode 1", {}).get(name, []), self.bytes[name]
            shares = [100 * size / s / b for s, b in zip(steps, self.bandwidth)]
            rows.append([name, f"{size / 1e6:,.0f}", *(cell(self.per_second(c, name)) for c in columns), cell(shares)])
        names = [f"prompt of {self.args.context:,}", *(f"decode, batch {b}" for b in BATCHES)]
        told = table(["tokens a second", "MB", *names, "% of the bandwidth at batch 1"], rows)
        against = table(["Intarsia over", *names], self._against(columns))
        second = table(["the second turn's first token, ms", "remembered", "not", "times sooner"], self._second_turns())
        turn = self.args.turn
        talk = (
            f"A conversation: {turn['opening']:,} tokens, an answer of {turn['answer']}, a question of "
            f"{turn['question']}; {self.read.get(WITH, 0):,} of {self.read.get(WITHOUT, 0):,} tokens are read for the "
            "second turn where prefixes are remembered."
        )
        read = cell([b / 1e9 for b in self.bandwidth], 1)
        about = "; ".join(f"{name}: {text}" for name, text in self.about.items())
        return "\n\n".join([
            f"### {self.model}", f"Memory is read at {read} GB/s. {about}.", told, against, talk, second,
            *(f"- {note}" for note in self.notes),
        ])  # fmt: skip

    def _second_turns(self) -> list[list[str]]:
        rows = []
        for name in (f"{OURS} {kind}" for kind in EQUALS):
            kept, lost = (self.seconds.get(what, {}).get(name, []) for what in (WITH, WITHOUT))
            seconds = (cell([1e3 * s for s in found]) for found in (kept, lost))
            rows.append([name, *seconds, cell(ratios(lost, kept), 1)])
        return rows

    def _against(self, columns: list[str]) -> list[list[str]]:
        """Each of ours over llama.cpp's at as many bits, and over transformers."""
        pairs = [(f"{OURS} {ours}", f"{LLAMA} {theirs}") for ours, theirs in EQUALS.items()]
        pairs += [(f"{OURS} {ours}", STOCK) for ours in EQUALS]
        rows = []
        for a, b in pairs:
            if b in self.about:
                cells = [cell(ratios(self.per_second(c, a), self.per_second(c, b)), 2) for c in columns]
                rows.append([f"{b} ({a.rpartition(' ')[2]})", *cells])
        return rows


def write_weights(model: str, folder: Path) -> None:
    """The same weights for everybody: a folder for us and transformers, a GGUF for llama.cpp."""
    import torch
    from peers.gguf_model import write_gguf

    from intarsia.commands.common import find_model
    from intarsia.formats import load, save, save_gguf
    from intarsia.model import Decoder, initialise

    if model in catalog.names():
        drawn = initialise(Decoder(catalog.get(model), torch.bfloat16)).requires_grad_(False)
        save(drawn, folder / "weights", family="nemotron_h")
        write_gguf(drawn, folder / "model.gguf")
    else:
        found, tokenizer = load(find_model(model), dtype="bfloat16")
        save(found, folder / "weights", tokenizer)
        save_gguf(found, folder / "model.gguf", tokenizer)


def main() -> int:
    args = arguments()
    done = []
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            write_weights(model, Path(folder))
            bench = Bench(model, args, Path(folder))
            bench.run()
        done.append(bench)
    write_json(args.out, {
        "command": called(), "cpu": cpu_model(), "threads": args.threads,
        "models": {b.model: {"about": b.about, "bytes": b.bytes, "bandwidth": b.bandwidth, "seconds": b.seconds,
                             "read": b.read, "notes": b.notes} for b in done},
    })  # fmt: skip
    text = section(done, args)
    print(text)
    if not args.quick:
        write_section(args.docs, "bench/engine.py", text)
    return 0


def section(done: list[Bench], args: argparse.Namespace) -> str:
    threads = "1 thread" if args.threads == 1 else f"{args.threads} threads"
    head = (
        f"{time.strftime('%Y-%m-%d')}, {cpu_model()}, {threads}; decoding behind {args.context:,} tokens. Median and "
        f"quartiles of {args.turns} turns, ratios turn by turn.\n\n"
        f"    {called()}"
    )
    return "\n\n".join([head, *(bench.tables() for bench in done)])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = "smollm2-135m,nemotron-h-187m"
    parser.add_argument("--models", metavar="A,B", default=models, help=f"default: {models}")
    parser.add_argument("--peers", default=f"{STOCK},{LLAMA}", help="transformers, llama.cpp, both (default) or ''")
    parser.add_argument(
        "--llama", metavar="PYTHON", default=sys.executable, help="a Python with llama-cpp-python; default: this one"
    )
    parser.add_argument("--context", type=int, default=512, help="tokens of a prompt (default 512)")
    parser.add_argument("--decoded", type=int, default=16, help="tokens decoded behind it, each turn (default 16)")
    parser.add_argument("--turns", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, default=cores(), help="default: every core")
    parser.add_argument("--quick", action="store_true", help="does it run? Two turns of little, no page written")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/engine.json"))
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page that holds the tables")
    args = parser.parse_args()
    args.models, args.peers = ([part for part in text.split(",") if part] for text in (args.models, args.peers))
    args.llama = str(Path(args.llama).absolute())  # not resolved: a virtual environment's python is a link
    args.turn = {"opening": 2048, "answer": 128, "question": 64}
    if args.quick:
        args.context, args.decoded, args.turns, args.turn = 64, 4, 2, {"opening": 512, "answer": 2, "question": 8}
    for name in args.peers:
        if name not in (STOCK, LLAMA):
            parser.error(f"the peer '{name}' is not known; known: {STOCK}, {LLAMA}")
    return args


if __name__ == "__main__":
    finish(main)
