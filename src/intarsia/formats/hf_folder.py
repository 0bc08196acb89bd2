"""Opening Hugging Face folders: config.json says which format's names stand in the safetensors files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from intarsia.arch import Architecture
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json
from intarsia.formats import nemotron_nas
from intarsia.formats.checkpoint import TOKENIZER_FILES, Checkpoint, StoredTensor
from intarsia.formats.families import architecture_from_config
from intarsia.formats.names import llama_names, our_names
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
        arch, names = _architecture(config)
    except IntarsiaError as error:
        raise IntarsiaError(f"{path}: {error}") from error
    tokenizer_files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    return Checkpoint(path, arch, config, _renamed(path, arch, names), tokenizer_files)


def _architecture(config: dict[str, Any]) -> tuple[Architecture, dict[str, str]]:
    """The architecture and our name -> the name on disk."""
    if config.get("model_type") == "intarsia":
        arch = Architecture.from_dict(config.get("architecture") or {})
        return arch, {name: name for name in our_names(arch)}
    if config.get("model_type") == nemotron_nas.MODEL_TYPE:
        arch = nemotron_nas.from_config(config)
    else:
        arch = architecture_from_config(config)
    return arch, llama_names(arch)


def _renamed(path: Path, arch: Architecture, names: dict[str, str]) -> list[StoredTensor]:
    ours = {theirs: name for name, theirs in names.items()}
    stored = []
    for entry in stored_tensors(path):
        # transformers writes its wrapper's attribute in front of our names (intarsia.hf).
        source = entry.source.removeprefix("decoder.")
        if source.endswith("rotary_emb.inv_freq"):
            continue  # old checkpoints keep what the architecture already says
        if arch.tied_embeddings and source in ("lm_head.weight", "head.weight"):
            continue  # a copy of the embedding
        stored.append(dataclasses.replace(entry, name=ours.get(source, source)))
    return stored
