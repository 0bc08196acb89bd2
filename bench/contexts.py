"""What a context costs a Transformer and a hybrid: its memory, a token behind it, and requests in a fixed memory.

    python bench/contexts.py [MODEL ...] [--contexts 1024,4096,16384,65536] [--budget 4]
    python bench/contexts.py smollm2-135m runs/hybrid-8 runs/hybrid-4 --parts decode

A model is a name of the catalog (random weights), a checkpoint, a run folder or what can be fetched; the others are
compared with the first. All run in one process and in turns, on weights packed as bfloat16, each batch as large as its
caches fit the budget. A context that is only decoded behind is not read: its memory is filled with zeros, which cost
what any numbers cost. Everything measured goes to --out, the tables to docs/benchmarks.md between their markers.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from behind import decode_behind
from command import called, finish, known_words, whole_numbers
from page import DOCS, cell, ratios, table, write_section
from peers.torch_clock import now, tokens

from intarsia.arch import block_cache_bytes, catalog, parameters
from intarsia.base.files import write_json
from intarsia.base.machine import cores, cpu_model
from intarsia.base.progress import Progress
from intarsia.commands.common import find_model
from intarsia.engine.generate import next_logits
from intarsia.formats import load
from intarsia.model import Cache, Decoder, initialise, pack_weights

CPU = torch.device("cpu")
PARTS = ("decode", "requests")
LONGEST = 1 << 17  # contexts are measured beyond what a model was trained for
GIB = 2**30


@dataclass
class Found:
    """What was measured of one model: seconds, a figure a turn, by context."""

    parameters: int
    bytes: dict[int, float] = field(default_factory=dict)  # of one sequence
    batch: dict[int, int] = field(default_factory=dict)  # as many as fit the budget
    step: dict[int, list[float]] = field(default_factory=dict)  # a token of one sequence
    full: dict[int, list[float]] = field(default_factory=dict)  # a token of every sequence of the batch
    prefill: dict[int, list[float]] = field(default_factory=dict)  # one prompt

    def per_second(self, context: int, new: int) -> list[float]:
        """Tokens generated a second: every sequence of the batch reads its prompt, then all generate `new` tokens."""
        pairs = zip(self.prefill[context], self.full[context])
        return [self.batch[context] * new / (self.batch[context] * read + new * step) for read, step in pairs]


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    models = {name: opened(name) for name in args.models}
    found = {name: Found(parameters(model.arch)) for name, model in models.items()}
    for name, model in models.items():
        for n in args.contexts:
            length = n + args.new
            found[name].bytes[n] = sum(block_cache_bytes(b, length) for b in model.arch.blocks)
            found[name].batch[n] = max(1, int(args.budget * GIB / found[name].bytes[n]))
    measure(args, models, found)
    text = section(args, found)
    write_json(args.out, {"command": called(), "models": {name: asdict(f) for name, f in found.items()}})
    print(text)
    if not args.quick:
        write_section(args.docs, f"bench/contexts.py {' '.join(args.models)}".strip(), text)
    return 0


def opened(name: str) -> Decoder:
    """On packed weights, with room for long contexts."""
    if name in catalog.names() and not Path(name).exists():
        model = pack_weights(initialise(Decoder(catalog.get(name), torch.bfloat16)).requires_grad_(False), "bf16")
    else:
        model, _ = load(find_model(name), dtype="bfloat16", weights="bf16")
    model.arch = model.arch.replace(max_positions=LONGEST)
    return model


def measure(args: argparse.Namespace, models: dict[str, Decoder], found: dict[str, Found]) -> None:
    """A turn measures every model at a context before the next context, after a turn to warm up without prompts."""
    with Progress("contexts", (args.turns + 1) * len(models) * len(args.contexts)) as progress:
        for turn in range(args.turns + 1):
            for n in args.contexts:
                for name, model in models.items():
                    kept = found[name] if turn else Found(0, batch=found[name].batch)
                    kept.step.setdefault(n, []).append(step_behind(model, n, 1, args.decoded))
                    if "requests" in args.parts:
                        kept.full.setdefault(n, []).append(step_behind(model, n, kept.batch[n], args.decoded))
                        if 0 < turn <= args.turns_of_prompts:
                            kept.prefill.setdefault(n, []).append(prefill(model, n))
                    progress.advance(1, f"{name} at {n:,}")


def step_behind(model: Decoder, context: int, batch: int, count: int) -> float:
    """Seconds of a step: the median."""
    return sorted(decode_behind(model, context, batch, count))[count // 2]


@torch.inference_mode()
def prefill(model: Decoder, length: int) -> float:
    """Seconds to read one prompt and know what follows."""
    cache = Cache(model.arch, 1, length, model.dtype)
    ids = tokens(model.arch.vocab_size, 1, length, CPU)
    began = now(CPU)
    next_logits(model, ids, cache)
    return now(CPU) - began


def section(args: argparse.Namespace, found: dict[str, Found]) -> str:
    head = (
        f"{time.strftime('%Y-%m-%d')}, {cpu_model()}, {args.threads} threads, weights packed as bfloat16. Median and "
        f"quartiles of {args.turns} turns, ratios turn by turn.\n\n    {called()}"
    )
    return "\n\n".join([head, *_contexts(args, found), *(_requests(args, found) if "requests" in args.parts else [])])


def _contexts(args: argparse.Namespace, found: dict[str, Found]) -> list[str]:
    at = [f"{n:,}" for n in args.contexts]
    memory, speed, first = [], [], next(iter(found.values()))
    for name, f in found.items():
        times = [f"{first.bytes[n] / f.bytes[n]:.1f} x" for n in args.contexts]
        memory.append(
            [name, f"{f.parameters / 1e6:,.1f}", *(f"{f.bytes[n] / 1e6:,.1f}" for n in args.contexts), *times]
        )
        faster = [cell(ratios(first.step[n], f.step[n]), 2) if f is not first else "" for n in args.contexts]
        speed.append([name, *(cell([1e3 * s for s in f.step[n]], 1) for n in args.contexts), *faster])
    less, faster = ([f"{word} at {n}" for n in at] for word in ("less", "faster"))
    return [
        f"Memory of a sequence, MB, at a context and {args.new:,} tokens behind it:",
        table(["model", "parameters, M", *at, *less], memory),
        "A decoded token at batch 1, ms:",
        table(["model", *at, *faster], speed),
    ]


def _requests(args: argparse.Namespace, found: dict[str, Found]) -> list[str]:
    rows, first = [], next(iter(found.values()))
    for n in args.contexts:
        for name, f in found.items():
            times = ratios(f.per_second(n, args.new), first.per_second(n, args.new)) if f is not first else []
            rows.append([
                f"{n:,}", name, f"{f.batch[n]:,}", cell(f.prefill[n], 2), cell([1e3 * s for s in f.full[n]]),
                cell(f.per_second(n, args.new), 1), cell(times, 2),
            ])  # fmt: skip
    told = (
        f"Requests that read a prompt and generate {args.new:,} tokens, as many at once as {args.budget:g} GiB of "
        "caches hold. Tokens a second: what the batch generates over the time to read all its prompts, one after "
        "another, and to decode all its tokens; prompts and steps are timed by themselves and added up."
    )
    head = ["prompt", "model", "batch", "prompt, s", "a step, ms", "tokens a second", "over the first"]
    return [told, table(head, rows, words=2)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="default: nemotron-t-151m nemotron-h-187m")
    parser.add_argument(
        "--contexts", type=partial(whole_numbers, most=LONGEST - 1), default=(1024, 4096, 16384, 65536), metavar="A,B",
        help="default: 1024,4096,16384,65536",
    )  # fmt: skip
    parser.add_argument("--parts", type=known_words(PARTS), default=PARTS, help=f"default: {','.join(PARTS)}")
    parser.add_argument("--new", type=int, default=1024, help="tokens that a request generates (default 1,024)")
    parser.add_argument("--budget", type=float, default=4, help="GiB of caches (default 4)")
    parser.add_argument("--decoded", type=int, default=8, help="steps a turn (default 8)")
    parser.add_argument("--turns", type=int, default=3, help="default: 3")
    parser.add_argument("--turns-of-prompts", type=int, help="default: as many; long prompts take minutes each")
    parser.add_argument("--threads", type=int, default=cores(), help="default: every core")
    parser.add_argument("--quick", action="store_true", help="does it run? Short contexts, one turn, no page written")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/contexts.json"))
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page that holds the tables")
    args = parser.parse_args()
    args.models = args.models or ["nemotron-t-151m", "nemotron-h-187m"]
    args.turns_of_prompts = args.turns if args.turns_of_prompts is None else args.turns_of_prompts
    if args.quick:
        args.contexts, args.new, args.budget, args.turns, args.decoded = (128, 512), 8, 0.02, 1, 2
        args.turns_of_prompts = 1
    return args


if __name__ == "__main__":
    finish(main)
