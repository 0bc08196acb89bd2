"""Many streams at once, ours beside llama.cpp's server; and more than can be served, for a long while.

    python bench/serving.py [--llama-server PATH] [--model smollm2-135m] [--streams 32]
    python bench/serving.py --soak 30          # minutes at twice the rate that can be sustained: is a request lost?
    python bench/serving.py --steady 100000    # requests: does memory grow?

Servers run one after the other in processes of their own and answer the same requests, prompts of many lengths, over
HTTP; the client reads streams and does nothing else. Everything measured goes to --out, the table to
docs/benchmarks.md between its markers.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from command import called, finish
from page import DOCS, cell, table, write_section
from peers.protocol import own_environment
from streams import NAME, Answer, free_port, paced, together, wait_until_up

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import write_json
from intarsia.base.machine import cores, cpu_model
from intarsia.base.progress import Progress
from intarsia.commands.common import find_model
from intarsia.formats import export

OURS, LLAMA = "Intarsia", "llama.cpp"
PROMPTS, ANSWERS = (16, 64, 256, 700), (16, 64, 128)  # words of prompts, tokens of answers: drawn for every request
TEXT = "the sea was calm and old stones kept their names while rivers moved under quiet bridges of light"


@dataclass
class Load:
    """What one server did with all requests."""

    seconds: float
    answers: list[Answer]

    @property
    def generated(self) -> float:
        """Tokens a second."""
        return sum(a.generated for a in self.answers) / self.seconds

    @property
    def whole(self) -> float:
        """Tokens a second, those of prompts included."""
        return sum(a.generated + a.read for a in self.answers) / self.seconds

    @property
    def lost(self) -> int:
        return sum(bool(a.error) for a in self.answers)


def main() -> int:
    args = arguments()
    if args.steady:
        return steady(args)
    return soak(args) if args.soak else streams(args)


def streams(args: argparse.Namespace) -> int:
    """The same requests to every server in turns, `streams` at once; a turn's words are new, so that none is cached."""
    loads: dict[str, list[Load]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        commands = servers(args, Path(folder)).items()
        ports = {name: stack.enter_context(running(command, Path(folder)))[0] for name, command in commands}
        for turn in range(args.turns + 1):  # the first to warm up
            requests = drawn(args.requests if turn else 4, turn)
            for name, port in ports.items():
                began = time.perf_counter()
                with Progress(name, len(requests)) as progress:
                    answers = asyncio.run(together(port, requests, args.streams, progress.advance))
                load = Load(time.perf_counter() - began, answers)
                if load.lost == len(answers):
                    raise IntarsiaError(f"{name} answers nothing: {answers[0].error}.")
                if turn:
                    loads.setdefault(name, []).append(load)
    write_json(args.out, {n: [asdict(x) for x in each] for n, each in loads.items()})
    text = section(args, loads)
    print(text)
    if not args.quick:
        kind = "" if args.weights == "bf16" else f" --weights {args.weights}"
        write_section(args.docs, f"bench/serving.py{kind}", text)
    return 0


def soak(args: argparse.Namespace) -> int:
    """Requests at twice the rate at which they are answered, none of which may be lost."""
    with tempfile.TemporaryDirectory() as folder, running(ours(args, queue=1_000_000), Path(folder)) as (port, _):
        began = time.perf_counter()
        asyncio.run(together(port, drawn(args.requests, 0), args.streams))
        rate = 2 * args.requests / (time.perf_counter() - began)
        requests = drawn(int(rate * args.soak * 60), 1)
        with Progress("soak", len(requests)) as progress:
            answers = asyncio.run(paced(port, requests, rate, progress.advance))
        seconds = time.perf_counter() - began
    lost = [a.error for a in answers if a.error]
    if len(lost) == len(answers):
        raise IntarsiaError(f"the server answers nothing: {lost[0]}.")
    waits = sorted(a.first for a in answers if not a.error)
    print(
        f"{len(answers):,} requests in {seconds / 60:.1f} minutes, {rate:.2f} a second for {args.soak:g} minutes "
        f"(twice what is sustained), {len(lost)} lost{': ' + lost[0] if lost else ''}; to the first token "
        f"{waits[len(waits) // 2]:.1f} s (median), {waits[-1]:.1f} s (longest)"
    )
    return 1 if lost else 0


def steady(args: argparse.Namespace) -> int:
    """Small requests, and the server's resident memory behind every tenth of them."""
    with tempfile.TemporaryDirectory() as folder, running(ours(args), Path(folder)) as (port, process):
        sizes, lost, part = [], 0, max(1, args.steady // 10)
        with Progress("requests", args.steady) as progress:
            for turn in range(10):
                requests = [(text, 1 + n % 3) for n, (text, _) in enumerate(drawn(part, turn, (4, 24)))]
                answers = asyncio.run(together(port, requests, args.streams, progress.advance))
                lost += sum(bool(a.error) for a in answers)
                sizes.append(resident(process))
    grown = 100 * (sizes[-1] / sizes[1] - 1)
    told = ", ".join(f"{s / 2**20:,.0f}" for s in sizes)
    print(f"{10 * part:,} requests, {lost} lost; MiB behind every tenth: {told}; from the second on {grown:+.1f} %")
    return 1 if lost else 0


def drawn(count: int, seed: int, prompts: tuple[int, ...] = PROMPTS) -> list[tuple[str, int]]:
    """Prompts and how many tokens are wanted, a pure function of the seed."""
    chance, words = random.Random(seed), TEXT.split(" ")
    return [(" ".join(chance.choices(words, k=chance.choice(prompts))), chance.choice(ANSWERS)) for _ in range(count)]


def servers(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    found = {OURS: ours(args)}
    if args.llama_server:
        file = folder / "model.gguf"
        export(find_model(args.model), file, to="gguf", quantisation="bf16" if args.weights == "bf16" else "q8_0")
        room = str(args.streams * 1024)
        found[LLAMA] = [
            str(args.llama_server), "-m", str(file), "--port", "{port}", "-np", str(args.streams), "-c", room, "-t",
            str(args.threads), "-tb", str(args.threads), "--no-warmup",
        ]  # fmt: skip
    return found


def ours(args: argparse.Namespace, queue: int = 4096) -> list[str]:
    return [
        sys.executable, "-m", "intarsia", "serve", args.model, "--port", "{port}", "--name", NAME,
        "--max-batch", str(args.streams), "--weights", args.weights, "--max-queue", str(queue), "--timeout", "100000",
    ]  # fmt: skip


@contextmanager
def running(command: list[str], folder: Path) -> Iterator[tuple[int, int]]:
    """A server's port and process, once it answers."""
    port = free_port()
    with open(folder / f"{port}.log", "wb") as log:
        words = [w.replace("{port}", str(port)) for w in command]
        process = subprocess.Popen(words, stdout=log, stderr=log, env=own_environment())
        try:
            if not wait_until_up(port, process):
                said = (folder / f"{port}.log").read_text(errors="replace").strip().splitlines()
                raise IntarsiaError(f"{command[0]} did not start: {said[-1] if said else 'it said nothing'}.")
            yield port, process.pid
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def resident(process: int) -> int:
    """Bytes of a process's resident memory."""
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * 4096


def section(args: argparse.Namespace, loads: dict[str, list[Load]]) -> str:
    rows = []
    for name, each in loads.items():
        first = [1e3 * sorted(a.first for a in load.answers)[len(load.answers) // 2] for load in each]
        times = [a.generated / b.generated for a, b in zip(loads[OURS], each)] if name != OURS else []
        rows.append([
            name, cell([x.generated for x in each]), cell([x.whole for x in each]), cell(first),
            str(sum(x.lost for x in each)), cell(times, 2),
        ])  # fmt: skip
    head = ["server", "generated a second", "with prompts", "first token, ms", "lost", "Intarsia over it"]
    return (
        f"{time.strftime('%Y-%m-%d')}, {cpu_model()}, {args.threads} threads; {args.model} in {args.weights}: "
        f"{args.requests} requests of mixed lengths, {args.streams} at once, {args.turns} turns a server. Tokens.\n\n"
        f"    {called()}\n\n{table(head, rows)}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="default: smollm2-135m")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="llama.cpp's server, beside us")
    parser.add_argument("--weights", choices=("bf16", "int8"), default="bf16", help="of both (default bf16)")
    parser.add_argument("--streams", type=int, default=32, help="requests at once (default 32)")
    parser.add_argument("--requests", type=int, default=96, help="of a turn (default 96)")
    parser.add_argument("--turns", type=int, default=3, help="default: 3")
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES")
    parser.add_argument("--steady", type=int, default=0, metavar="REQUESTS")
    parser.add_argument("--threads", type=int, default=cores(), help="default: every core")
    parser.add_argument("--quick", action="store_true", help="does it run? A few requests, no page written")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/serving.json"))
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page that holds the table")
    args = parser.parse_args()
    if args.quick:
        args.requests, args.turns, args.streams = 6, 1, 3
    return args


if __name__ == "__main__":
    finish(main)
