"""Opening Hugging Face folders: config.json says which format's names stand in the safetensors files."""

from __future__ import annotations

from pathlib import Path

from intarsia.arch import Architecture
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json
from intarsia.formats.checkpoint import TOKENIZER_FILES, Checkpoint, StoredTensor
from intarsia.formats.layout import arrange, our_shapes
from intarsia.formats.registry import Family, family_of
from intarsia.formats.safetensors_file import stored_tensors


def open_folder(path: Path) -> Checkpoint:
    """Open a folder with config.json and safetensors files."""
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise IntarsiaError(f"{path / 'config.json'} is no model configuration: it holds no JSON object.")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise IntarsiaError(f"{path} is quantised ({method}); give the unquantised checkpoint, or a GGUF of it.")
    try:
        family = family_of(config.get("model_type"))
        arch = family.read(config)
    except IntarsiaError as error:
        raise IntarsiaError(f"{path}: {error}") from error
    tokenizer_files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    return Checkpoint(path, arch, config, _stored(path, arch, family), tokenizer_files)


def _stored(path: Path, arch: Architecture, family: Family) -> list[StoredTensor]:
    entries = [entry for entry in stored_tensors(path) if not _superfluous(family.canonical(entry.source), arch)]
    return arrange(entries, family.layout(arch), our_shapes(arch), family.canonical)


def _superfluous(name: str, arch: Architecture) -> bool:
    """Frequencies that old checkpoints keep, layers for multi-token prediction, copies of a tied embedding."""
    if name.endswith("rotary_emb.inv_freq") or name.startswith("mtp."):
        return True
    return arch.tied_embeddings and name in ("lm_head.weight", "head.weight")
