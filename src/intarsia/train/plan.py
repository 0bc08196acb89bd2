"""What a recipe would take, by arithmetic and without a GPU: parameters, work, memory, days, tokens of every phase.

Shape letters: D width of the stream, V vocabulary, T tokens of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from intarsia.arch import Architecture, Attention, Block, Mamba2, block_flops, block_parameters, parameters
from intarsia.data import tokens_of
from intarsia.train.material import blend_of
from intarsia.train.recipe import Recipe

STATE_BYTES = 16  # of a parameter: float32 master and gradient, two moments


@dataclass(frozen=True)
class Plan:
    """Figures of a training; bytes are of one GPU, days of all together."""

    parameters: int
    flops_per_token: float
    flops: float
    steps: int
    state_bytes: float
    working_bytes: float
    activation_bytes: float
    days: float

    @property
    def bytes(self) -> float:
        return self.state_bytes + self.working_bytes + self.activation_bytes


def training_flops(arch: Architecture, length: int) -> float:
    """Floating-point operations of a token: forward, and twice as many backward. Attention sees half of a sample on
    average; what activation checkpointing computes again does not count, as is usual for MFU."""
    forward = sum(block_flops(block, arch.hidden_size, length / 2) for block in arch.blocks)
    return 3 * (forward + 2 * arch.hidden_size * arch.vocab_size)


def built(arch: Architecture) -> int:
    """Parameters of the model itself, made where tensors have shapes and no memory."""
    from intarsia.model import Decoder  # the one step that needs torch

    return sum(parameter.numel() for parameter in Decoder(arch, device="meta").parameters())


def make_plan(recipe: Recipe, arch: Architecture, gpus: int, flops: float, mfu: float) -> Plan:
    """On `gpus` GPUs of `flops` FLOP/s each, of which a share `mfu` is used."""
    tokens = recipe.steps * recipe.step_tokens
    each = training_flops(arch, recipe.data.length)
    alone = recipe.teacher is None and not recipe.prefers
    teacher = 0.0 if alone else each / 3  # at least as large as the student: a lower bound
    share = recipe.parallel.tensor
    largest = max(block_parameters(block, arch.hidden_size) for block in arch.blocks)
    heads = arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    # Gathered while they are used: two blocks (one is fetched ahead) with the gradient of one, embedding and head with
    # their gradients, and the head's gradient once more in float32.
    working = (2 * 2 + 4) * largest / share + (2 + 4) * heads + 4 * arch.vocab_size * arch.hidden_size
    return Plan(
        parameters(arch), each + teacher, (each + teacher) * tokens, recipe.steps,
        STATE_BYTES * parameters(arch) / gpus, working if gpus > 1 else 2 * parameters(arch),
        _activations(recipe, arch), (each + teacher) * tokens / (gpus * flops * mfu) / 86_400,
    )  # fmt: skip


def _activations(recipe: Recipe, arch: Architecture) -> float:
    """Bytes that a pass keeps for its backward, in two bytes a number."""
    tokens = max(recipe.data.length, tokens_of(recipe.micro_tokens))
    stream = arch.hidden_size
    blocks = [_kept(block, arch.hidden_size) / recipe.parallel.tensor + 2 * stream for block in arch.blocks]
    numbers = len(blocks) * stream + max(blocks) if recipe.recompute else sum(blocks)
    return 2.0 * tokens * numbers


def _kept(block: Block, d: int) -> float:
    """Numbers a token that a block keeps inside."""
    if isinstance(block, Mamba2):  # in_proj's output, the convolution's, what the scan gives, what out_proj reads
        return block.in_size + block.conv_size + 2 * block.inner_size
    if isinstance(block, Attention):
        return 2 * block.head_dim * (block.num_heads + block.num_kv_heads)
    width = getattr(block, "intermediate_size", d)
    return width * (3 if getattr(block, "gated", False) else 2)


def phases(recipe: Recipe) -> list[tuple[str, dict[str, float]]]:
    """(name, tokens of every category) of each phase, by the blend's weights alone."""
    blend, found, start = blend_of(recipe.data), [], 0
    for number, (phase, end) in enumerate(zip(blend.phases, blend.ends(tokens_of(recipe.data.tokens))), 1):
        weights = {c: w for c, w in phase.weights.items() if blend.sources.get(c) != []}
        total = sum(weights.values())
        found.append((phase.name or str(number), {c: (end - start) * w / total for c, w in weights.items()}))
        start = end
    return found
