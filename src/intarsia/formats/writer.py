"""Writing checkpoints: a whole folder appears under its name, or nothing does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save as safetensors

from intarsia.arch import Architecture, Mamba1, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import atomic_path, read_json, write_json
from intarsia.formats import nemotron_nas
from intarsia.formats.checkpoint import TOKENIZER_FILES
from intarsia.formats.gguf_writer import save_gguf
from intarsia.formats.layout import out_tensors
from intarsia.formats.reader import RECORD, SENSITIVITY, load, locate, open_checkpoint
from intarsia.formats.registry import FAMILIES, STOCK, family_of, natural_family
from intarsia.formats.safetensors_file import OutTensor, write_shards
from intarsia.formats.tokenizer import Tokenizer, check_vocabulary
from intarsia.model import Decoder
from intarsia.model.packed import Importance

TARGETS = ("hf", "gguf", *FAMILIES)
# Fields of the parent's config.json that say nothing about shapes and stay true of a child.
_PASSED_ON = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache", "attention_dropout")


def save(
    model: Decoder,
    path: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    source: str | os.PathLike | None = None,
    family: str | None = None,
    shard_bytes: int = 5_000_000_000,
    weights: Sequence[str] | None = None,
    importance: Mapping[int, Importance] | None = None,
) -> Path:
    """Write a model as a Hugging Face folder at `path`, replacing a checkpoint that stands there; returns the path.

    `family`: llama, mistral, qwen2, qwen3, nemotron-nas, nemotron_h, nemotron_h_puzzle, granitemoehybrid, mamba, mamba2
    or intarsia. None takes the architecture's own family if that can express the model exactly, else the first that can
    of granitemoehybrid, nemotron_h (which load in stock transformers like the stock families), nemotron_h_puzzle (for
    servers; in transformers after `import intarsia.hf`) and `intarsia` (the same, for no server).
    `source` is the checkpoint that the model was made from: its special ids, generation settings and, without
    `tokenizer`, its tokenizer are kept. Weights keep the model's dtype and are sharded above `shard_bytes`. `weights`:
    how the matrices of each block are to be packed when the model runs (`load(..., weights="recorded")`);
    `importance`: what matters to those in four bits, in a file beside the weights.
    Raises `IntarsiaError` if the family cannot express the model, the tokenizer does not fit, the path is a folder of
    something else, or the disk refuses.
    """
    path = Path(path).expanduser()
    _refuse_strangers(path)
    family = family or natural_family(model.arch)
    config, tensors = _plan(model, family)
    source = None if source is None else locate(source)
    if tokenizer is None and source is not None:
        tokenizer = _tokenizer_of(source)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.arch)
    with atomic_path(path) as folder:
        folder.mkdir()
        if source is not None and source.is_dir():
            _copy(source, folder, ("generation_config.json", *(TOKENIZER_FILES if tokenizer is None else ())))
        if tokenizer is not None:
            tokenizer.save(folder)
        dtype = str(model.dtype).removeprefix("torch.")
        config |= {"torch_dtype": dtype, **_passed_on(source, tokenizer)}
        config |= {RECORD: list(weights)} if weights is not None else {}
        write_json(folder / "config.json", config)
        write_shards(folder, tensors, shard_bytes)
        if importance:
            named = {f"{i}/{name}": each for i, block in importance.items() for name, each in block.items()}
            (folder / SENSITIVITY).write_bytes(safetensors(named))  # `save_file` would let its owner alone read it
    return path


def export(
    model_path: str | os.PathLike, out: str | os.PathLike, to: str = "hf", quantisation: str | None = None
) -> Path:
    """Rewrite a checkpoint for others to read: `hf` (a family that stock transformers loads), a family by its name, or
    `gguf` (one file for llama.cpp, `quantisation` f32, bf16 or q8_0, bf16 by default); returns `out`.

    Raises `IntarsiaError` with the reason where the target cannot express the model.
    """
    if to not in TARGETS:
        raise IntarsiaError(f"export to {to!r} is not known; known: {', '.join(TARGETS)}.")
    family: str = to
    if to == "hf":
        arch = open_checkpoint(model_path).architecture
        family = natural_family(arch)
        if family not in STOCK:
            raise IntarsiaError(_no_stock_family(arch, f"{model_path}", family))
    if quantisation is not None and to != "gguf":
        raise IntarsiaError(f"{to} keeps the weights as they are; only gguf is written as {quantisation}.")
    model, tokenizer = load(model_path)
    if to == "gguf":
        return save_gguf(model, out, tokenizer, quantisation or "bf16")
    return save(model, out, tokenizer, source=model_path, family=family)


def _no_stock_family(arch: Architecture, name: str, natural: str) -> str:
    hybrid = any(isinstance(b, (Mamba1, Mamba2)) for b in arch.blocks)
    own = arch.family if arch.family in STOCK else "granitemoehybrid" if hybrid else "llama"
    nas = nemotron_nas.MODEL_TYPE if nemotron_nas.why_not(arch) is None else ""
    servers = natural if natural != "intarsia" else nas
    advice = f"Export it to {servers} (for servers) or keep it" if servers else "Keep it"
    return (
        f"{name} cannot be written as {own}: {FAMILIES[own].why_not(arch)}. {advice} as intarsia (for transformers "
        "with `import intarsia.hf`)."
    )


def _plan(model: Decoder, name: str) -> tuple[dict[str, Any], list[OutTensor]]:
    family = family_of(name)
    return family.config(model.arch), out_tensors(family.layout(model.arch), dict(model.named_parameters()))


def _refuse_strangers(path: Path) -> None:
    if path.is_file():
        raise IntarsiaError(f"{path} is a file; give the name of a folder to write the checkpoint to.")
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise IntarsiaError(f"{path} is a folder of something else and would be replaced; give a new name or empty it.")


def _tokenizer_of(source: Path) -> Tokenizer | None:
    if source.is_file():
        return Tokenizer.from_gguf(source)
    return Tokenizer.from_folder(source) if (source / "tokenizer.json").is_file() else None


def _copy(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _passed_on(source: Path | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    if source is not None and source.is_dir():
        config = read_json(source / "config.json")
        return {key: config[key] for key in _PASSED_ON if key in config}
    if tokenizer is None:
        return {}
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
