"""One tokenizer whatever the checkpoint: text <-> ids, the special ids, and files that transformers can load."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from intarsia.arch import Architecture
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import fingerprint, read_json, write_json, write_text
from intarsia.formats.checkpoint import TOKENIZER_FILES, Checkpoint
from intarsia.formats.gguf_file import read_gguf
from intarsia.formats.gguf_tokenizer import tokenizer_from_gguf


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special ids.

    `config` is the content of tokenizer_config.json; `folder` is where companion files come from when saved.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict[str, Any] | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        folder: Path | None = None,
    ):
        self.backend, self.config, self.folder = backend, dict(config or {}), folder
        self.bos_id = self._special("bos_token") if bos_id is None else bos_id
        self.eos_id = self._special("eos_token") if eos_id is None else eos_id

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> Tokenizer:
        """Read tokenizer.json and tokenizer_config.json; special ids fall back on those of (generation_)config.json."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise IntarsiaError(f"{folder} has no tokenizer.json.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise IntarsiaError(f"{path} is not readable as a tokenizer: {error}.") from error
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                config.update(read_json(folder / name))
        ids = {key: _first_id(folder, key) for key in ("bos_token_id", "eos_token_id")}
        self = cls(backend, config, folder=folder)
        self.bos_id = ids["bos_token_id"] if self.bos_id is None else self.bos_id
        self.eos_id = ids["eos_token_id"] if self.eos_id is None else self.eos_id
        return self

    @classmethod
    def from_gguf(cls, path: str | os.PathLike) -> Tokenizer | None:
        """Rebuild the tokenizer from a GGUF file's metadata; None if it carries none."""
        return cls._rebuilt(Path(path), read_gguf(Path(path)).metadata)

    @classmethod
    def _rebuilt(cls, path: Path, metadata: dict[str, Any]) -> Tokenizer | None:
        built = tokenizer_from_gguf(path, metadata)
        return None if built is None else cls(*built)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer | None:
        """The tokenizer of an opened checkpoint; None if it has none."""
        if checkpoint.path.is_file():
            return cls._rebuilt(checkpoint.path, checkpoint.config)
        return cls.from_folder(checkpoint.path) if (checkpoint.path / "tokenizer.json").is_file() else None

    def _special(self, key: str) -> int | None:
        token = self.config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special tokens are added (those spelt out in the text are recognised)."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of some ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Largest id + 1: what an embedding must have at least."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: the end of text, and those that generation_config.json lists (end of a turn)."""
        listed: Any = ()
        if self.folder and (self.folder / "generation_config.json").is_file():
            listed = read_json(self.folder / "generation_config.json").get("eos_token_id", ())
        found = [self.eos_id, *(listed if isinstance(listed, list | tuple) else [listed])]
        return tuple(dict.fromkeys(i for i in found if i is not None))

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of the conversation format, if the model has one."""
        if self.config.get("chat_template"):
            return self.config["chat_template"]
        path = self.folder / "chat_template.jinja" if self.folder else None
        return path.read_text(encoding="utf-8") if path and path.is_file() else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes when any text may encode differently."""
        return fingerprint(json.loads(self.backend.to_str()))

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json, tokenizer_config.json and the companions it came with into `folder`."""
        folder = Path(folder)
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        for name in TOKENIZER_FILES:
            if self.folder and (self.folder / name).is_file() and self.folder.resolve() != folder.resolve():
                shutil.copyfile(self.folder / name, folder / name)
        if not (folder / "tokenizer_config.json").exists():
            write_json(folder / "tokenizer_config.json", self.config or {"tokenizer_class": "PreTrainedTokenizerFast"})


def check_vocabulary(tokenizer: Tokenizer, arch: Architecture) -> None:
    """Raise `IntarsiaError` if the tokenizer can give ids that the model has no embedding for."""
    if tokenizer.vocab_size > arch.vocab_size:
        raise IntarsiaError(
            f"the tokenizer gives ids up to {tokenizer.vocab_size - 1} and the model's vocabulary has "
            f"{arch.vocab_size} entries: they do not belong together. Put the model's own tokenizer files beside it."
        )


def _first_id(folder: Path, key: str) -> int | None:
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get(key)
            if value is not None:
                return value[0] if isinstance(value, list) else value
    return None
