"""Checkpoints: what stands on disk <-> `Architecture`, tensors under our names, tokenizer.

Nothing outside this room knows foreign names.
"""

from intarsia.formats.checkpoint import Checkpoint, StoredTensor, native_bfloat16
from intarsia.formats.gguf_writer import save_gguf
from intarsia.formats.reader import load, open_checkpoint
from intarsia.formats.tokenizer import Tokenizer
from intarsia.formats.writer import export, save

__all__ = [
    "Checkpoint", "StoredTensor", "Tokenizer", "export", "load", "native_bfloat16", "open_checkpoint", "save",
    "save_gguf",
]
