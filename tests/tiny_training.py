"""What the tests of training share: a tiny hybrid, a corpus with a tokenizer of its own, a recipe, processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from intarsia import cli
from intarsia.arch import Architecture, Attention, FeedForward, Mamba2, parse_pattern
from intarsia.base.recipe import load_recipe
from intarsia.data import build
from intarsia.formats import save
from intarsia.model import Decoder
from intarsia.model.init import initialise
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
RECIPE = """
model = {shape}
batch_tokens = 128
micro_tokens = 64
[data]
path = {corpus}
blend = {blend}
tokens = 2560
length = 32
[optimizer]
lr = 1e-2
[schedule]
warmup = 0.1
[precision]
dtype = "float32"
[evaluate]
documents = 2
[checkpoint]
every = 512
keep = 3
"""


def make_material(folder: Path) -> Path:
    """A folder with a corpus, a model for its shape, a blend and a recipe of 20 steps; the recipe's file."""
    tokenizer = make_tokenizer()
    build(make_text(folder / "text"), tokenizer, folder / "corpus", max_bytes=60_000, log=lambda line: None)
    save(initialise(Decoder(ARCH)), folder / "shape", tokenizer)
    (folder / "blend.toml").write_text(BLEND)
    paths = {name: json.dumps(str(folder / file)) for name, file in
             (("corpus", "corpus"), ("blend", "blend.toml"), ("shape", "shape"))}  # fmt: skip
    recipe = folder / "tiny.toml"
    recipe.write_text(RECIPE.format(**paths))
    return recipe


def read(recipe: Path, *changes: str) -> Recipe:
    return load_recipe(Recipe, recipe, changes)


def torchrun(ranks: int, *trainings: list) -> subprocess.CompletedProcess:
    """`intarsia train` with each of these words, one training after the other, in so many processes of one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
    words = [json.dumps(["train", *map(str, training)]) for training in trainings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300)


if __name__ == "__main__":
    sys.exit(max(cli.main(json.loads(words)) for words in sys.argv[1:]))
