"""Opening and loading any checkpoint that Intarsia reads."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from intarsia.base.errors import IntarsiaError
from intarsia.base.progress import Progress
from intarsia.formats.checkpoint import Checkpoint, StoredTensor, check_finite
from intarsia.formats.gguf_model import open_gguf
from intarsia.formats.hf_folder import open_folder
from intarsia.formats.tokenizer import Tokenizer, check_vocabulary
from intarsia.model import Decoder, pack_weights, weights_in_fp8
from intarsia.model.decode import refusal

RECORD = "block_weights"  # the field of config.json that says how each block is packed
SENSITIVITY = "sensitivity.safetensors"  # beside the weights: what matters to matrices in int4 and int4+


def locate(path: str | os.PathLike) -> Path:
    """The .gguf file or the folder with config.json that `path` means; `IntarsiaError` if it means neither."""
    path = Path(path).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(f.name for f in found)
            raise IntarsiaError(f"{path} holds {len(found)} GGUF files ({names}): name the one you mean.")
        raise IntarsiaError(
            f"{path} is no checkpoint: a folder needs config.json with .safetensors files, or exactly one .gguf file."
        )
    if path.exists():
        raise IntarsiaError(f"{path} is no checkpoint: give a Hugging Face folder or a .gguf file.")
    raise IntarsiaError(f"{path} does not exist. Give a Hugging Face folder or a .gguf; `intarsia fetch` gets one.")


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read what a checkpoint says about itself, without its weights.

    `path`: a Hugging Face folder (the families of `formats.registry`; safetensors, sharded or not), a .gguf file (the
    kinds of `formats.gguf_model`), or a folder that holds exactly one .gguf. Raises `IntarsiaError` when it is none of
    these, cut short, or lacks, repeats or misshapes a tensor. Tensors of multi-token prediction (`mtp.*`) are passed
    over: the model is whole without them.
    """
    path = locate(path)
    checkpoint = open_gguf(path) if path.is_file() else open_folder(path)
    _check_tensors(checkpoint)
    return checkpoint


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Names and shapes on disk are exactly those that the architecture needs."""
    needed = {name: tuple(p.shape) for name, p in Decoder(checkpoint.architecture, device="meta").named_parameters()}
    found: dict[str, StoredTensor] = {}
    for entry in checkpoint.stored:
        if entry.name in found:
            files = f"{found[entry.name].file.name}, {entry.file.name}"
            raise IntarsiaError(f"{checkpoint.path} holds {entry.source!r} twice ({files}).")
        found[entry.name] = entry
    missing = [name for name in needed if name not in found]
    if missing:
        raise IntarsiaError(f"{checkpoint.path} lacks {_some(missing)} (our names): the checkpoint is not whole.")
    extra = [entry.source for name, entry in found.items() if name not in needed]
    if extra:
        raise IntarsiaError(f"{checkpoint.path} holds {_some(extra)}, which its configuration has no place for.")
    for name, shape in needed.items():
        entry = found[name]
        if entry.shape != shape:
            raise IntarsiaError(
                f"tensor {entry.source!r} in {entry.file} has the shape {entry.shape}; the model needs {shape}."
            )


def _some(names: list[str], limit: int = 4) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {', '.join(names[:limit])}{rest}"


@torch.no_grad()
def load(
    path: str | os.PathLike,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    check: bool = True,
    weights: str | None = None,
) -> tuple[Decoder, Tokenizer | None]:
    """Load a model (in evaluation mode) and its tokenizer (None if the checkpoint has none).

    `dtype` None keeps the dtype that the weights are stored in; quantised GGUF weights are then dequantised to bfloat16
    on a CPU with bfloat16 instructions (AMX, AVX512-BF16) and to float32 elsewhere. Names such as "float32" are taken
    too. Weights stream into their final place: peak memory stays under 1.2 x the weights. `check` refuses NaN and
    infinity. `weights` ("bf16", "int8", "int4", "int4+") packs them for inference on a CPU (`model.pack_weights`;
    four bits by what a compression has found to matter, where the checkpoint tells); "fp8" is for GPUs that multiply
    FP8, and emulated elsewhere (`model.weights_in_fp8`); "recorded" packs each block as the checkpoint says, if it says
    so; "auto" does too, and else packs a bfloat16 model as bf16 where native code then decodes it, which loses nothing.
    Raises `IntarsiaError` for whatever `open_checkpoint` refuses and for a tokenizer that exceeds the vocabulary.
    """
    checkpoint = open_checkpoint(path)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    if tokenizer is not None:
        check_vocabulary(tokenizer, checkpoint.architecture)
    model = Decoder(checkpoint.architecture, as_dtype(dtype) or checkpoint.natural_dtype(), device)
    parameters = dict(model.named_parameters())
    with Progress("loading weights", sum(entry.numel for entry in checkpoint.stored)) as progress:
        for entry in checkpoint.stored:
            entry.read(parameters[entry.name])
            if check:
                check_finite(entry, parameters[entry.name])
            progress.advance(entry.numel)
    if weights in ("recorded", "auto"):
        recorded = checkpoint.config.get(RECORD) if model.device.type == "cpu" else None
        weights = recorded or ("bf16" if weights == "auto" and not refusal(model) else None)
    if weights == "fp8":
        weights_in_fp8(model)
    elif weights is not None:
        pack_weights(model, weights, _importance(checkpoint.path))
    return model.eval(), tokenizer


def _importance(path: Path) -> dict[int, dict[str, torch.Tensor]]:
    """What `save` has written of it; nothing where there is no such file."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    if (path / SENSITIVITY).is_file():
        for key, tensor in load_file(path / SENSITIVITY).items():
            index, _, name = key.partition("/")
            found.setdefault(int(index), {})[name] = tensor
    return found


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating torch dtype from its name ("float32", "bfloat16", "float16"); None and dtypes pass through."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise IntarsiaError(f"dtype {dtype!r} is not possible for weights; give float32, bfloat16 or float16.")
    return found
