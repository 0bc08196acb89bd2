"""NVIDIA's Puzzletron v1 on the same parent, text and memory: its child before any distillation, and how far it is.

    python bench/puzzletron.py --python VENV/bin/python [--shares 80,60] [--beside runs/ours,runs/other]

VENV has `nvidia-modelopt[puzzletron]` and its own torch; `peers/puzzletron.py` runs there, without a GPU. Widths, fewer
KV heads, calibration and scoring text, scenario and held-out text are those of the preset. Every child becomes a
checkpoint under --out that `intarsia` loads, with `puzzletron.json` beside its weights: seconds of each stage, what
Puzzletron says of it. Stopped at any moment, the same command continues. `--beside` names models to compare on the same
tokens, such as a run made with `--memory 80% --set distill.tokens=0`. The table goes to docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from command import called, finish, known_words, whole_numbers
from page import DOCS, table, write_section
from peers.protocol import Peer

from intarsia.arch import Architecture, Attention, memory_bytes, parameters
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json, write_json
from intarsia.base.machine import cpu_model
from intarsia.base.recipe import load_recipe
from intarsia.commands.common import comma_list, figure, find_model
from intarsia.compress import text
from intarsia.compress.options import ffn_widths
from intarsia.compress.pipeline import dtype_of
from intarsia.compress.recipe import Recipe
from intarsia.engine.scenario import Scenario
from intarsia.evaluate import compare, hidden_states
from intarsia.formats import export, load, save
from intarsia.formats.names import llama_names
from intarsia.formats.registry import FAMILIES
from intarsia.formats.safetensors_file import stored_tensors
from intarsia.model import Decoder

SCRIPT = "bench/puzzletron.py"
SAID = "puzzletron.json"
STAGES = ("convert", "prune", "library", "score")
# What its program minimises: what its published configurations say, and what its paper prefers.
OBJECTIVES = {"cosine": "cosine_embedding_loss_hidden_states", "kl": "kl_div"}
BYTES, MIB, DAY = 2, 2**20, 86_400  # of a bfloat16; its unit of memory; seconds
HEAD = ("model", "memory, MB", "parameters", "attentions", "FFNs", "KL, nats", "same next token")


def child_of(parent: Architecture, layers: Sequence[Mapping[str, Any]]) -> tuple[Architecture, list[int]]:
    """What `block_configs` make of a Llama: the architecture, and for each of its blocks that of the parent in whose
    place it stands. Raises `IntarsiaError` for anything but narrower FFNs, fewer KV heads and absent blocks."""
    if len(layers) != len(parent.blocks) // 2:
        raise IntarsiaError(f"block_configs of {len(layers)} layers, the parent has {len(parent.blocks) // 2}.")
    blocks, origins = [], []
    for index, old in enumerate(parent.blocks):
        slot, field = ("ffn", "intermediate_size") if index % 2 else ("attention", "num_key_value_heads")
        said = layers[index // 2][slot]
        if said.get("no_op"):
            continue
        if any(said.get(other) for other in ("replace_with_linear", "moe", "mamba", "llama4", "sparsify")):
            raise IntarsiaError(f"layer {index // 2} has a block that is not read: {said}.")
        size = {"num_kv_heads" if isinstance(old, Attention) else field: said[field]}
        blocks.append(dataclasses.replace(old, **size))
        origins.append(index)
    return parent.replace(blocks=tuple(blocks), family="intarsia"), origins


def read_child(parent: Architecture, folder: Path) -> Decoder:
    """A realised solution in bfloat16. Raises `IntarsiaError` where a tensor is missing or of another shape."""
    arch, origins = child_of(parent, read_json(folder / "config.json")["block_configs"])
    model, names = Decoder(arch, torch.bfloat16), llama_names(parent)
    stored = {entry.source: entry for entry in stored_tensors(folder)}
    for name, parameter in model.named_parameters():
        room, _, rest = name.partition(".")
        if room == "blocks":
            block, _, rest = rest.partition(".")
            name = f"blocks.{origins[int(block)]}.{rest}"
        entry = stored.get(names[name])
        if entry is None or entry.shape != tuple(parameter.shape):
            found = "is missing" if entry is None else f"has the shape {entry.shape}"
            raise IntarsiaError(f"{names[name]} in {folder} {found}; {tuple(parameter.shape)} is needed.")
        entry.read(parameter)
    return model.eval()


def budget_mib(arch: Architecture, scenario: Scenario, share: float) -> float:
    """A share of the parent's weights and cache as Puzzletron counts: it has a head beside tied embeddings."""
    ours = share * memory_bytes(arch, scenario.length, scenario.batch, BYTES)
    return (ours + (arch.vocab_size * arch.hidden_size * BYTES if arch.tied_embeddings else 0)) / MIB


def fewer_kv_heads(block: Attention) -> list[int]:
    """Query heads a KV head, for every smaller number of KV heads that divides both of the parent's numbers."""
    fewer = range(block.num_kv_heads - 1, 0, -1)
    return [block.num_heads // kv for kv in fewer if block.num_kv_heads % kv == block.num_heads % kv == 0]


class Bench:
    """The folder of one comparison: text, parent, stages, children."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, args.out
        self.recipe = load_recipe(Recipe, args.preset, args.set)
        self.scenario = Scenario.parse(self.recipe.scenario)
        self.path = find_model(args.parent)
        self.dtype = dtype_of(self.recipe)
        self.parent, tokenizer = load(self.path, dtype=self.dtype)
        self.arch, data = self.parent.arch, self.recipe.data
        if reason := FAMILIES["llama"].why_not(self.arch):
            raise IntarsiaError(f"{args.parent} is no Llama for Puzzletron: {reason}.")
        self.corpus = text.open_corpus(data.path, tokenizer, self.out / "data", data.max_bytes, data.length)

    def batch(self, tokens: int, length: int, split: str, salt: int) -> torch.Tensor:
        """(rows, length) int64, as `intarsia compress` draws them."""
        rows, seed = max(1, tokens // length), self.recipe.data.seed + salt
        return text.batch(self.corpus, 0, rows, length, split, seed)

    def asked(self) -> dict[str, Any]:
        """What the peer is opened with; the files that it names are written."""
        recipe, length = self.recipe, self.recipe.data.length
        tokens, folder = self.out.resolve() / "tokens.json", self.out.resolve() / "parent"
        splits = {
            "calibration": self.batch(recipe.importance.tokens, length, "train", text.CALIBRATION),
            "scoring": self.batch(recipe.score.tokens, min(recipe.score.length, length), "heldout", text.SCORING),
        }
        write_json(tokens, {name: ids.tolist() for name, ids in splits.items()})
        if not folder.exists():
            export(self.path, folder)
        return {
            "parent": str(folder), "folder": str(self.out.resolve() / "puzzle"), "tokens": str(tokens),
            "widths": ffn_widths(self.arch.feed_forwards[0].intermediate_size, recipe.options),
            "groups": fewer_kv_heads(self.arch.attentions[0]) if recipe.options.kv_methods else [],
            "scenario": [self.scenario.batch, self.scenario.prompt, self.scenario.generated],
            "dtype": self.dtype,
        }  # fmt: skip

    def children(self) -> list[Path]:
        """The folder of every child, made where it is not there."""
        shares, names = self.args.shares, self.args.objectives
        folders = {(share, name): self.out / f"memory-{share}-{name}" for share in shares for name in names}
        missing = [pair for pair, folder in folders.items() if not (folder / SAID).exists()]
        if missing:
            with Peer("Puzzletron", "peers.puzzletron", self.args.python, self.args.threads) as peer:
                done = self.stages(peer)
                for pair in missing:
                    self.child(peer, folders[pair], *pair, done)
        return list(folders.values())

    def stages(self, peer: Peer) -> dict[str, Any]:
        """All that no target changes, once; what is known of it."""
        record, asked = self.out / "stages.json", self.asked()
        made_from = {"peer": asked, "recipe": self.recipe.model_dump(mode="json")}
        done = read_json(record) if record.exists() else {"from": made_from, "seconds": {}}
        if done["from"] != made_from:
            raise IntarsiaError(f"{self.out} was made of another parent or recipe: give another --out.")
        done["versions"] = peer.ask("open", **asked)
        for stage in STAGES:
            if stage not in done["seconds"]:
                print(f"--- {stage}", flush=True)
                done["seconds"][stage] = peer.ask(stage, seconds=DAY)
                write_json(record, done)
        return done

    def child(self, peer: Peer, folder: Path, share: int, name: str, done: Mapping[str, Any]) -> None:
        print(f"--- {folder}", flush=True)
        mib = budget_mib(self.arch, self.scenario, share / 100)
        said = peer.ask("solve", seconds=DAY, memory_mib=mib, objective=OBJECTIVES[name])
        model = read_child(self.arch, Path(said.pop("checkpoint")))
        save(model, folder, source=self.path)
        seconds = {**done["seconds"], "solve": said.pop("seconds")}
        write_json(folder / SAID, {"versions": done["versions"], "seconds": seconds, "asked_mib": mib, **said})

    def rows(self, folders: Sequence[Path]) -> list[list[str]]:
        """The parent, Puzzletron's children and those beside them."""
        tokens = self.batch(self.recipe.evaluate.tokens, self.recipe.data.length, "heldout", text.JUDGING)
        hidden, found = hidden_states(self.parent, tokens), [self.row("parent", self.arch, {})]
        named = {f"Puzzletron, {f.name.replace('-', ' ', 1).replace('-', ' %, by ')}": f for f in folders}
        for name, path in {**named, **{given: find_model(given) for given in self.args.beside}}.items():
            model, _ = load(path, dtype=self.dtype)
            far = compare(self.parent, model, tokens, parent_hidden=hidden, title=name)
            found.append(self.row(name, model.arch, far))
        return found

    def row(self, name: str, arch: Architecture, far: Mapping[str, Any]) -> list[str]:
        taken = memory_bytes(arch, self.scenario.length, self.scenario.batch, BYTES)
        return [
            name, f"{taken / 1e6:.1f}", f"{parameters(arch) / 1e6:.4g} M", str(len(arch.attentions)),
            str(len(arch.feed_forwards)), figure(far.get("kl")) or "0", figure(far.get("top1")) or "1",
        ]  # fmt: skip


def section(bench: Bench, folders: Sequence[Path]) -> str:
    said = read_json(folders[0] / SAID)
    took = ", ".join(f"{stage} {seconds:,.0f}" for stage, seconds in said["seconds"].items())
    return (
        f"{time.strftime('%Y-%m-%d')}, {cpu_model()}; {said['versions']}. {bench.args.parent} at the scenario "
        f"{bench.scenario}, memory as weights and cache in bfloat16, all else in {bench.dtype}; KL to the parent on "
        f"{bench.recipe.evaluate.tokens:,} held-out tokens, nothing distilled. Seconds: {took}.\n\n    {called()}\n\n"
        + table(HEAD, bench.rows(folders))
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, metavar="FILE", help="a Python that has nvidia-modelopt")
    parser.add_argument("--parent", default="smollm2-135m")
    parser.add_argument("--preset", default="demo", help="default: demo")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one value of the recipe")
    parser.add_argument("--shares", type=whole_numbers, default=(80,), metavar="A,B",
                        help="percent of the parent's memory (default: 80)")  # fmt: skip
    parser.add_argument("--objectives", type=known_words(tuple(OBJECTIVES)), default=tuple(OBJECTIVES), metavar="A,B",
                        help=f"what its search minimises: {', '.join(OBJECTIVES)} (default: both)")  # fmt: skip
    parser.add_argument("--beside", type=comma_list, default=(), metavar="A,B", help="models on the same tokens")
    parser.add_argument("--threads", type=int, metavar="N", help="of Puzzletron")
    parser.add_argument("--out", type=Path, default=Path("runs/puzzletron"), help="default: runs/puzzletron")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page that holds the table")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    bench = Bench(args)
    told = section(bench, bench.children())
    print(told)
    write_section(args.docs, SCRIPT, told)
    return 0


if __name__ == "__main__":
    finish(main)
