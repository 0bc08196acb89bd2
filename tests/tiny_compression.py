"""What the tests of the pipeline share: a tiny parent with a tokenizer of its own, text, a recipe, the command line."""

import argparse
import ast
import difflib
import inspect
import json
import os
import subprocess
import sys
import tarfile
import typing
from pathlib import Path

import tokenizers

from intarsia.arch import Architecture, Attention, FeedForward
from intarsia.formats import Tokenizer, save
from intarsia.model import Decoder
from intarsia.model.init import initialise

SOURCES = {"command": (argparse, tarfile), "language": (ast, difflib, typing)}
VOCABULARY = 400
ARCH = Architecture.transformer(
    4, Attention(4, 2, 16), FeedForward(192), hidden_size=64, vocab_size=VOCABULARY, tied_embeddings=True,
    max_positions=256,
)  # fmt: skip
RECIPE = """
scenario = "1,32,8"
dtype = "float32"
[target]
{target}
[data]
path = {data}
length = 32
[importance]
tokens = 1024
[options]
ffn_widths = [0.5, 0.25]
multiple = 16
kv_methods = ["aligned"]
[library]
tokens = 1024
batch_tokens = 128
refit_tokens = 2048
eval_tokens = 256
[score]
tokens = 256
length = 32
[cost]
repeats = 3
calibration = 2
[search]
solutions = 2
min_difference = 1
rounds = 2
repeats = 2
[mend]
tokens = 2048
[distill]
tokens = 1024
batch_tokens = 128
lr = 1e-3
evaluations = 2
checkpoint_seconds = 0.0
[evaluate]
tokens = 512
documents = 4
tasks = []
"""


def pieces() -> dict[str, list[str]]:
    """Documents of about 2,000 characters from the standard library, by category."""
    texts = {name: "".join(map(inspect.getsource, modules)) for name, modules in SOURCES.items()}
    return {name: [text[i : i + 2000] for i in range(0, 120_000, 2000)] for name, text in texts.items()}


def make_text(folder: Path) -> Path:
    """A folder of two categories of text."""
    folder.mkdir(parents=True)
    for name, documents in pieces().items():
        lines = [json.dumps({"text": text}) for text in documents]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def make_tokenizer(*special: str) -> Tokenizer:
    """A byte-level BPE of `VOCABULARY` entries, trained on the text; `special` are tokens beside the end of text."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>", *special], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator((text for each in pieces().values() for text in each), trainer)
    return Tokenizer(backend, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})


def make_parent(folder: Path, arch: Architecture = ARCH, seed: int = 0) -> Path:
    """A random model whose blocks matter, as a Hugging Face folder with its tokenizer."""
    model = initialise(Decoder(arch), seed=seed, std=0.1)
    return save(model, folder, make_tokenizer())


def make_recipe(file: Path, data: Path, target: str = "speedup = 1.2") -> Path:
    file.write_text(RECIPE.format(data=json.dumps(str(data)), target=target), encoding="utf-8")
    return file


def start(*words: str | Path, **options) -> subprocess.Popen:
    """`intarsia compress` as a process of its own, on one thread."""
    command = [sys.executable, "-m", "intarsia", "compress", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes | options)


def compress(*words: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `intarsia compress`."""
    process = start(*words)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def begin(words: list[str]) -> int:
    """The number of a process of its own that runs the command line.

    It is forked from this one, which has torch in memory: what would take seconds before every kill takes none.
    """
    if number := os.fork():
        return number
    try:
        from intarsia import cli
        from intarsia.base.runfolder import Stage
        from intarsia.compress import stages

        stages.STATE_SECONDS = 0.0  # keep every step of the library's training
        Stage.HEARTBEAT = 0.05
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        os._exit(cli.main(words))
    finally:
        os._exit(70)


def done_stages(run: Path) -> dict[str, bytes]:
    """What every finished stage says of itself; loading is timed anew by every process."""
    files = run.glob("stages/*/done.json")
    return {file.parent.name: file.read_bytes() for file in files if file.parent.name != "load"}
