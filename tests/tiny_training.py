"""What the tests of training share: a tiny hybrid, a corpus with a tokenizer of its own, a recipe, processes."""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from intarsia import cli
from intarsia.arch import Architecture, Attention, FeedForward, Mamba2, parse_pattern
from intarsia.base.recipe import load_recipe
from intarsia.data import build
from intarsia.formats import save
from intarsia.model import Decoder
from intarsia.model.init import initialise
from intarsia.train.loop import train
from intarsia.train.recipe import Recipe
from tiny_compression import VOCABULARY, make_text, make_tokenizer

LENGTH = 32
BLOCKS = {
    "M": Mamba2(4, 16, 16, 2), "-": FeedForward(64, activation="relu2", gated=False),
    "*": Attention(4, 2, 8, rope=False),
}  # fmt: skip
ARCH = Architecture(
    32, VOCABULARY, parse_pattern("M-M*-", BLOCKS), rope=None, max_positions=128, family="nemotron_h"
)
BLEND = """
max_epochs = 50
[[phases]]
until = 0.5
weights = { command = 3, language = 1 }
[[phases]]
weights = { command = 1, language = 2 }
"""
LEARNING = """\
[optimizer]
lr = 1e-2
[schedule]
warmup = 0.1
[precision]
dtype = "float32"
"""
RECIPE = """
model = {shape}
batch_tokens = 128
micro_tokens = 64
[data]
path = {corpus}
blend = {blend}
tokens = 1280
length = 32
{learning}[evaluate]
documents = 2
[checkpoint]
every = 256
keep = 3
"""


DIALOGUES = """
model = {start}
init = {start}
batch_tokens = 512
micro_tokens = 256
[data]
kind = "{kind}"
path = {data}
blend = "all"
max_epochs = 50
tokens = 4096
length = 128
packing = "whole"
heldout = 0.1
{learning}[checkpoint]
every = 1024
keep = 4
"""


def make_material(folder: Path) -> Path:
    """A folder with a corpus, a model for its shape, a blend and a recipe of 10 steps; the recipe's file."""
    tokenizer = make_tokenizer()
    build(make_text(folder / "text"), tokenizer, folder / "corpus", max_bytes=60_000, log=lambda line: None)
    save(initialise(Decoder(ARCH)), folder / "shape", tokenizer)
    (folder / "blend.toml").write_text(BLEND)
    paths = {name: json.dumps(str(folder / file)) for name, file in
             (("corpus", "corpus"), ("blend", "blend.toml"), ("shape", "shape"))}  # fmt: skip
    recipe = folder / "tiny.toml"
    recipe.write_text(RECIPE.format(learning=LEARNING, **paths))
    return recipe


def make_dialogues(folder: Path) -> dict[str, Path]:
    """A model that knows of turns, with conversations and pairs of answers that can be learnt; recipes by kind."""
    save(initialise(Decoder(ARCH)), folder / "start", make_tokenizer("<|im_start|>", "<|im_end|>"))
    questions = [f"what is {a} and {b}" for a in range(8) for b in range(8)]
    sums = [(question, str(number % 8 + number // 8)) for number, question in enumerate(questions)]
    rows = {
        "conversations": [
            {"messages": [{"role": role, "content": text} for pair in (one, other)
                          for role, text in zip(("user", "assistant"), pair)]}
            for one, other in zip(sums, sums[7:] + sums[:7])
        ],
        "preferences": [
            {"prompt": question, "chosen": answer, "rejected": "no", "rewards": [1.0, 0.25 * (int(answer) % 3)]}
            for question, answer in sums
        ],
    }  # fmt: skip
    recipes = {}
    for kind, each in rows.items():
        (folder / kind).mkdir()
        (folder / kind / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
        recipes[kind] = folder / f"{kind}.toml"
        start, data = (json.dumps(str(folder / name)) for name in ("start", kind))
        recipes[kind].write_text(DIALOGUES.format(learning=LEARNING, kind=kind, start=start, data=data))
    return recipes


def read(recipe: Path, *changes: str) -> Recipe:
    return load_recipe(Recipe, recipe, changes)


@functools.cache
def folder() -> Path:
    """A folder for what all tests of a session share, removed at its end."""
    kept = tempfile.TemporaryDirectory(prefix="tiny-training-")
    atexit.register(kept.cleanup)
    torch.set_num_threads(1)
    return Path(kept.name)


@functools.cache
def shared_recipe() -> Path:
    """The recipe of `make_material`, made once; its material is not to be changed."""
    return make_material(folder() / "material")


@functools.cache
def undisturbed() -> Path:
    """The run folder of that recipe, trained once by one rank without interruption; not to be changed."""
    train(read(shared_recipe()), folder() / "undisturbed")
    return folder() / "undisturbed"


def command(words: list) -> Callable[[], int]:
    """The command line with these words, to be run."""
    return lambda: cli.main(list(map(str, words)))


def begin(act: Callable[[], int | None], environment: dict[str, str] | None = None, said: str = os.devnull) -> int:
    """The number of a process that does this, forked from this one, which has torch in memory."""
    if number := os.fork():
        return number
    try:
        os.environ.update(environment or {})
        sys.stdout = sys.stderr = open(said, "w", buffering=1)  # noqa: SIM115
        os._exit(act() or 0)
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(70)


def together(ranks: int, act: Callable[[], int | None], said: Path, seconds: float = 600) -> None:
    """Do this in so many processes, as `torchrun` would start them; what they say is in files that begin with `said`.
    Fails with it where one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    left = {begin(act, where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, f"{said}.{rank}"): rank
            for rank in range(ranks)}  # fmt: skip
    end, failed = time.monotonic() + seconds, False
    try:
        while left and not failed:
            number, status = os.waitpid(-1, os.WNOHANG)
            if number in left:
                failed = bool(status)
                left.pop(number)
            elif time.monotonic() > end:
                failed = True
            time.sleep(0.02)
    finally:
        for number in left:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
    assert not failed, "\n".join(Path(f"{said}.{rank}").read_text()[-3000:] for rank in range(ranks))


def torchrun(ranks: int, words: list) -> subprocess.CompletedProcess:
    """`intarsia` with these words, started by torchrun itself."""
    started = start_ranks(ranks, words)
    out, err = started.communicate(timeout=600)
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)


def start_ranks(ranks: int, words: list) -> subprocess.Popen:
    """The same, left to run in a session of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    return subprocess.Popen([*command, "intarsia", *map(str, words)], env=environment, stdout=pipe, stderr=pipe,
                            text=True, start_new_session=True)  # fmt: skip
