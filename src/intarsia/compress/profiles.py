"""What a child may be made of so that its target loads it: `--profile homogeneous | vllm | llama.cpp | free`.

A format is asked, and not described a second time: a layer may be of two options where the format can express a model
of such layers. What the format wants equal in all layers becomes a tie of the search, so that every choice is servable
by construction. At the end the child is written in that format, read back, and compared.

- homogeneous: one width everywhere, for stock transformers and everything else: the parent's own family;
- vllm: nemotron-nas (KV heads and FFNs layer by layer) or nemotron_h_puzzle (all but Mamba-2 layer by layer), else as
  homogeneous;
- llama.cpp: what is written to GGUF;
- free: anything; only our own classes load it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from intarsia.arch import Architecture, Attention, Block, Experts, FeedForward, Linear, Mamba2, kind
from intarsia.base.errors import IntarsiaError
from intarsia.compress import text
from intarsia.compress.options import OptionSpec, Site
from intarsia.compress.recipe import Options, Recipe
from intarsia.compress.solve import Bound
from intarsia.formats import load, save, save_gguf
from intarsia.formats.gguf_tokens import tokenizer_metadata
from intarsia.formats.gguf_writer import why_not_gguf
from intarsia.formats.nemotron_nas import MODEL_TYPE as NAS
from intarsia.formats.nemotron_nas import padded_width
from intarsia.formats.registry import FAMILIES, STOCK, natural_family

if TYPE_CHECKING:
    from intarsia.compress.pipeline import Job

EVERY = (Attention, Mamba2, FeedForward, Experts)
GGUF, UNSERVED = "gguf", "unserved"
CLOSE = 1e-3  # of the largest logit: weights that went through another format and back, in float32


@dataclasses.dataclass(frozen=True)
class Home:
    """A format: why it cannot express an architecture, the kinds of blocks that it wants equal in all layers, and of
    what its FFN widths are multiples."""

    format: str
    why_not: Callable[[Architecture], str | None]
    alike: tuple[type, ...] = EVERY
    multiple: int = 1


def _family(name: str, alike: tuple[type, ...] = EVERY) -> Home:
    return Home(name, FAMILIES[name].why_not, alike)


def _why_not_vllm(arch: Architecture) -> str | None:
    if any(isinstance(block, Linear) for block in arch.blocks):
        return "vLLM knows no linear blocks"
    return FAMILIES[NAS].why_not(arch)


def homes(profile: str, own: str) -> list[Home]:
    """The formats of a profile for children of a parent of the family `own`, the first choice first.

    nemotron-nas stores FFN widths in multiples of 256, padded with zeros: a width between them would save nothing.
    """
    if profile == "llama.cpp":
        return [Home(GGUF, why_not_gguf)]
    alike = [_family(name) for name in sorted(STOCK, key=lambda name: name != own)]
    if profile == "vllm":
        return [Home(NAS, _why_not_vllm, (), padded_width(1)), _family("nemotron_h_puzzle", (Mamba2,)), *alike]
    return alike


class Profile:
    """A profile for one parent. Raises `IntarsiaError` where none of its formats can hold any of the parent's layers,
    or one of the parent's layers can be nothing that they hold."""

    def __init__(self, name: str, arch: Architecture, options: dict[int, list[OptionSpec]], sites: Sequence[Site]):
        self.name, self.arch, self.words = name, arch, f"what the profile {name} loads"
        mixers = [s.block for specs in options.values() for s in specs]
        self.mamba = next((b for b in (*arch.blocks, *mixers) if isinstance(b, Mamba2)), None)
        self.known: dict[tuple[Block | None, Block | None], str | None] = {}
        self.homes = homes(name, arch.family)
        layers = [tuple(None if i is None else arch.blocks[i] for i in (s.attention, s.ffn)) for s in sites]
        self.home = next((h for h in self.homes if any(self._why_not(h, *layer) is None for layer in layers)), None)
        if self.home is None:
            raise IntarsiaError(
                f"the profile {name} has no format for this parent ({self._why_not(self.homes[0], *layers[0])}): "
                "choose another profile, or free."
            )
        for site in sites:
            pairs = [(a, f) for a in _specs(options, site.attention) for f in _specs(options, site.ffn)]
            if not any(self.allows(a, f) for a, f in pairs):
                raise IntarsiaError(
                    f"the profile {name} has no option for layer {site.layer} of this parent "
                    f"({self._why_not(self.home, *pairs[0])}): allow more options, or choose another profile."
                )

    def allows(self, attention: Block | None, ffn: Block | None) -> bool:
        """Whether a layer may be of these two."""
        if (attention, ffn) not in self.known:
            self.known[attention, ffn] = self._why_not(self.home, attention, ffn)
        return self.known[attention, ffn] is None

    def costs(self, layer: int, attention: Block | None, ffn: Block | None) -> dict[str, float]:
        """What a layer of these two adds to the count of those that the target does not load."""
        return {UNSERVED: float(not self.allows(attention, ffn))}

    def bounds(self) -> list[Bound]:
        return [Bound(self.words, {UNSERVED: 1.0}, 0.0, counts=True)]

    def ties(self, attention: Block | None, ffn: Block | None) -> dict[str, str]:
        """What must be as in all other layers: a kind of block, and the block."""
        return {kind(b): repr(_plain(b)) for b in (attention, ffn) if isinstance(b, self.home.alike)}

    def usable(self, options: dict[int, list[OptionSpec]], sites: Sequence[Site]) -> dict[int, list[OptionSpec]]:
        """The options that some layer may have, and of every block the parent's own, with which all is compared."""
        found = {}
        for site in sites:
            attentions, ffns = _specs(options, site.attention), _specs(options, site.ffn)
            pairs = [(a, f) for a in attentions for f in ffns if self.allows(a, f)]
            for slot, index in enumerate((site.attention, site.ffn)):
                if index is not None:
                    loaded = {pair[slot] for pair in pairs}
                    found[index] = [options[index][0], *(s for s in options[index][1:] if s.block in loaded)]
        return found

    def format_of(self, arch: Architecture) -> str:
        """What a finished child is written as."""
        found = [self.home, *self.homes]
        return next((h.format for h in found if h.why_not(arch) is None), self.home.format)

    def _why_not(self, home: Home, attention: Block | None, ffn: Block | None) -> str | None:
        """Of a model of one such layer; in a hybrid, a Mamba-2 layer beside it."""
        layer = [block for block in (attention, ffn) if block is not None]
        if layer and self.mamba is not None and not any(isinstance(b, Mamba2) for b in layer):
            layer += [block for block in (self.mamba, ffn) if block is not None]
        return home.why_not(self.arch.replace(blocks=tuple(layer))) if layer else None


def _specs(options: dict[int, list[OptionSpec]], index: int | None) -> list[Block | None]:
    return [None] if index is None else [spec.block for spec in options[index]]


def _plain(block: Block) -> Block:
    """Windows may differ from layer to layer: they are a setting and no width."""
    return dataclasses.replace(block, sliding_window=None) if isinstance(block, Attention) else block


def fitted(recipe: Recipe, arch: Architecture) -> Options:
    """The recipe's options with the multiple of FFN widths that the profile's format wants."""
    if recipe.profile == "free":
        return recipe.options
    step = next((h.multiple for h in homes(recipe.profile, arch.family) if h.why_not(arch) is None), 1)
    return recipe.options.model_copy(update={"multiple": math.lcm(step, recipe.options.multiple)})


def check_tokenizer(profile: Profile, tokenizer: Any) -> None:
    """Raise `IntarsiaError` where the format carries the tokenizer and cannot."""
    if profile.home.format == GGUF:
        tokenizer_metadata(tokenizer, profile.arch.vocab_size)


def export(job: Job, child: Path, mark: str) -> dict[str, Any] | None:
    """Write the finished child as the profile's format, read it back, and compare the logits; what was written, for
    summary.json. None for the profile free. `mark`: the fingerprint of the child."""
    if job.profile is None:
        return None
    with job.stage("export", mark, job.profile.name) as stage:
        path = Path(stage.facts.get("path", ""))
        if not stage.done or not path.exists():
            model, tokenizer = load(child)
            name = job.profile.format_of(model.arch)
            path = child
            if name == GGUF:
                kept = "f32" if model.dtype == torch.float32 else "bf16"
                path = save_gguf(model, job.run.path / "child.gguf", tokenizer, kept)
            elif name != natural_family(model.arch):
                path = save(model, job.run.path / f"child-{name}", tokenizer, source=child, family=name)
            off = difference(child, path, job.batch(0, job.recipe.data.length, text.EVALUATING, "heldout"))
            if not off <= CLOSE:
                raise IntarsiaError(
                    f"{path}, written as {name}, does not compute what {child} does: the logits differ by {off:.2g} of "
                    "the largest. Please report this; the child itself is whole."
                )
            stage.finish(profile=job.profile.name, format=name, path=str(path), difference=off)
        return {key: stage.facts[key] for key in ("profile", "format", "path", "difference")}


@torch.inference_mode()
def difference(one: Path, other: Path, ids: torch.Tensor) -> float:
    """The largest difference of the logits of two checkpoints on `ids`, over the largest logit, in float32."""
    logits = [load(path, dtype="float32")[0](ids) for path in (one, other)]
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
