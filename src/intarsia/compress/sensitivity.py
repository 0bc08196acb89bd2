"""How much every input of a matrix matters to the loss of the language model (SqueezeLLM, arXiv 2306.07629, 4.1).

The diagonal of the Fisher matrix is the mean over sequences of the squared gradient of a sequence's loss. What is kept
are its sums over the outputs of a matrix: the scales and the outliers of an output ask for nothing but how its inputs
compare, sums carry less of the noise of few sequences than entries do, and they are small enough to lie beside a
checkpoint. A model has them from its own backward passes. An option of the library has no model around it; it reads the
parent's stream, and what comes back to the parent's block at that place is sent through the option instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from intarsia.base.files import atomic_path
from intarsia.base.progress import Progress
from intarsia.compress import text
from intarsia.compress.options import OptionSpec
from intarsia.model import Decoder, ResidualBlock
from intarsia.model.packed import Importance, matrices
from intarsia.ops.losses import cross_entropy
from intarsia.ops.packed import WEIGHED

if TYPE_CHECKING:
    from intarsia.compress.pipeline import Job

# Of a block, a sequence each: the stream before it and the gradient of the loss by the stream behind it, (1, L, D).
Passes = list[tuple[torch.Tensor, torch.Tensor]]


def of_model(model: Decoder, ids: torch.Tensor, blocks: Collection[int]) -> dict[int, Importance]:
    """Of the matrices of some blocks, by their indices: the diagonal of the Fisher matrix over the sequences ids
    (N, L), summed over outputs. Costs a backward pass a sequence, and the memory of one."""
    squares = {index: _Squares(model.blocks[index]) for index in blocks}
    weights = [weight for each in squares.values() for weight in each.weights.values()]
    with _learning(weights):
        for row in ids.split(1) if weights else ():
            hidden = model.hidden(row)
            gradients = iter(torch.autograd.grad(_loss(model, hidden, row), weights, allow_unused=True))
            for each in squares.values():
                each.add(gradients)
    return {index: each.means(len(ids)) for index, each in squares.items()}


def passes(model: Decoder, ids: torch.Tensor, blocks: Collection[int]) -> dict[int, Passes]:
    """What `of_option` needs of the parent, at some blocks, from the sequences ids (N, L)."""
    found: dict[int, Passes] = {index: [] for index in blocks}
    with torch.enable_grad():
        for row in ids.split(1):
            rope = model.rope_tables(0, row.shape[1])
            streams = [model.embed_tokens(row).detach().requires_grad_()]
            for index in range(len(model.blocks)):
                streams.append(model.run(streams[-1], index, index + 1, rope=rope))
            gradients = torch.autograd.grad(_loss(model, model.final_norm(streams[-1]), row), streams)
            for index, each in found.items():
                each.append((streams[index].detach(), gradients[index + 1]))
    return found


def of_option(block: ResidualBlock, parent: Decoder, passed: Passes) -> Importance:
    """`of_model` of a block that stands where the parent's `passes` went through."""
    squares = _Squares(block)
    weights = list(squares.weights.values())
    with _learning(weights):
        for x, gradient in passed if weights else ():
            tables = parent.rope_tables(0, x.shape[1]).get(getattr(block.spec, "head_dim", 0))
            squares.add(iter(torch.autograd.grad(block.update(x, tables), weights, gradient, allow_unused=True)))
    return squares.means(len(passed))


def of_child(job: Job, model: Decoder, kinds: Sequence[str]) -> dict[int, Importance]:
    """Of those blocks of a run's child that are packed with it; `kinds` of every block."""
    wanted = [index for index, kind in enumerate(kinds) if kind in WEIGHED]
    return of_model(model, _text(job), wanted) if wanted else {}


def of_library(job: Job) -> None:
    """The stage: importance for every option that is offered with it; under `torchrun` each rank takes some blocks, and
    finished ones are not done again."""
    if not set(WEIGHED) & set(job.recipe.options.precisions):
        return
    with job.together("sensitivity", job.library_print(), job.recipe.sensitivity) as stage:
        if not stage.done:
            left = [index for index in job.options if not _file(stage.folder, index).exists()]
            job.ranks.wait()
            _store(job, left[job.ranks.rank :: job.ranks.world], stage.folder)
            job.ranks.wait()
            if job.ranks.first:
                stage.finish()
    job.library.sensitivity = stage.folder


def importance_of(folder: Path, index: int, spec: OptionSpec) -> Importance:
    """What `of_library` left of an option of a block."""
    start = f"{spec.base.name}/"
    return {name.removeprefix(start): tensor for name, tensor in load_file(_file(folder, index)).items()
            if name.startswith(start)}  # fmt: skip


def _store(job: Job, blocks: Collection[int], folder: Path) -> None:
    passed = passes(job.model, _text(job), blocks) if blocks else {}
    with Progress("sensitivity of every option", len(blocks)) as progress:
        for index in blocks:
            tensors = {}
            for spec in job.options[index]:
                if spec.precision in WEIGHED:
                    found = of_option(job.library.block(index, spec.base), job.model, passed[index])
                    tensors |= {f"{spec.base.name}/{name}": tensor for name, tensor in found.items()}
            with atomic_path(_file(folder, index)) as temporary:
                save_file(tensors, temporary)
            progress.advance()


def _text(job: Job) -> torch.Tensor:
    return job.batch(0, job.recipe.sensitivity.tokens, text.SENSING)


def _file(folder: Path, index: int) -> Path:
    return folder / f"block_{index:03}.safetensors"


def _loss(model: Decoder, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """-log p of the next token, the mean over a sequence (1, L)."""
    return cross_entropy(hidden[:, :-1], model.head_weight, ids[:, 1:])


class _Squares:
    """Sums over sequences and outputs of the squared gradients of a block's matrices."""

    def __init__(self, block: ResidualBlock):
        self.weights = {name: matrix.weight for name, matrix in matrices(block)}
        self.sums = {name: torch.zeros(weight.shape[1]) for name, weight in self.weights.items()}

    def add(self, gradients: Iterator[torch.Tensor | None]) -> None:
        """Those of one sequence, in the order of the weights; an expert that no token chose has none."""
        for total, gradient in zip(self.sums.values(), gradients):
            if gradient is not None:
                total += gradient.float().square().sum(0)

    def means(self, count: int) -> Importance:
        return {name: total / count for name, total in self.sums.items()}


@contextmanager
def _learning(weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Gradients by these weights are wanted for a moment; what a training wants of them is left as it was."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, wanted in zip(weights, before):
            weight.requires_grad_(wanted)
