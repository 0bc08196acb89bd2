"""llama.cpp as a peer, through llama-cpp-python: runs under whichever Python has it, and needs nothing of ours.

As its own llama-bench does: prompts in batches of 2,048 tokens (512 at a time inside), logits of the last one only.
"""

from __future__ import annotations

import ctypes
import random
import time
from pathlib import Path
from typing import Any

import llama_cpp as lib

from peers.protocol import serve

TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q4_K_M": 15, "BF16": 32}  # llama_ftype
BATCH = 2048


@lib.llama_log_callback
def _quiet(level: int, text: bytes, _: object) -> None:
    if level >= 4:  # errors
        print(text.decode(errors="replace"), end="")


def _begin() -> None:
    lib.llama_log_set(_quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()


def _opened(gguf: str):
    model = lib.llama_model_load_from_file(gguf.encode(), lib.llama_model_default_params())
    if not model:
        raise RuntimeError("it cannot load the GGUF")
    return model


class Llama:
    """One quantised model, and the context that the last prefill left."""

    def logits(self, gguf: str, prompts: list[list[int]]) -> list[list[float]]:
        """Behind each prompt, from the file as it is."""
        _begin()
        model = _opened(gguf)
        self.context = lib.llama_init_from_model(model, lib.llama_context_default_params())
        size, found = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)), []
        for ids in prompts:
            lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
            self._timed(ids)
            found.append(lib.llama_get_logits_ith(self.context, -1)[:size])
        return found

    def load(self, gguf: str, kind: str, room: int, threads: int, sequences: int = 1) -> str:
        """Quantise the bfloat16 file `gguf` to `kind` (kept beside it) and make room for that many tokens in each of
        `sequences`."""
        _begin()
        path = Path(gguf).with_suffix(f".{kind}.gguf")
        if not path.exists():
            wanted = lib.llama_model_quantize_default_params()
            wanted.ftype, wanted.nthread = TYPES[kind], threads
            if lib.llama_model_quantize(gguf.encode(), str(path).encode(), ctypes.byref(wanted)):
                raise RuntimeError(f"it cannot quantise to {kind}")
        self.model = _opened(str(path))
        like = lib.llama_context_default_params()
        like.n_ctx, like.n_batch, like.n_threads, like.n_threads_batch = room * sequences, BATCH, threads, threads
        like.n_seq_max = sequences
        self.context = lib.llama_init_from_model(self.model, like)
        if not self.context:
            raise RuntimeError("it cannot make a context")
        self.path, self.sequences = path, 1
        self.size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        features = lib.llama_print_system_info().decode()
        return f"llama-cpp-python {lib.__version__}, {'AMX' if 'AMX_INT8 = 1' in features else 'no AMX'}, {kind}"

    def bytes(self) -> int:
        """Of the quantised file."""
        return self.path.stat().st_size

    def prefill(self, length: int, batch: int = 1) -> dict[str, Any]:
        """Seconds to read a prompt, which then stands in `batch` sequences."""
        ids, memory = [random.randrange(self.size) for _ in range(length)], lib.llama_get_memory(self.context)
        lib.llama_memory_clear(memory, True)
        seconds = self._timed(ids)
        for other in range(1, batch):
            lib.llama_memory_seq_cp(memory, 0, other, -1, -1)
        self.sequences, self.length = batch, length
        return {"seconds": seconds}

    def decode(self, count: int) -> dict[str, Any]:
        if self.sequences == 1:
            return {"seconds": [self._timed([random.randrange(self.size)]) for _ in range(count)]}
        return {"seconds": [self._step_of_all() for _ in range(count)]}

    def _step_of_all(self) -> float:
        """One token of every sequence, the logits of each wanted."""
        batch = lib.llama_batch_init(self.sequences, 0, 1)
        batch.n_tokens = self.sequences
        for i in range(self.sequences):
            batch.token[i], batch.pos[i] = random.randrange(self.size), self.length
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, i, 1
        began = time.perf_counter()
        failed = lib.llama_decode(self.context, batch)
        lib.llama_synchronize(self.context)
        seconds = time.perf_counter() - began
        lib.llama_batch_free(batch)
        if failed:
            raise RuntimeError("llama_decode failed on a batch of sequences")
        self.length += 1
        return seconds

    def _timed(self, ids: list[int]) -> float:
        began = time.perf_counter()
        for first in range(0, len(ids), BATCH):
            piece = ids[first : first + BATCH]
            array = (lib.llama_token * len(piece))(*piece)  # the batch points to it
            if lib.llama_decode(self.context, lib.llama_batch_get_one(array, len(piece))):
                raise RuntimeError("llama_decode failed")
        lib.llama_synchronize(self.context)
        return time.perf_counter() - began


if __name__ == "__main__":
    peer = Llama()
    serve({"load": peer.load, "prefill": peer.prefill, "decode": peer.decode, "bytes": peer.bytes,
           "logits": peer.logits})  # fmt: skip
