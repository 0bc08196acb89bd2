"""Intarsia as a peer: prefill, decode and training of a model with random weights, and the machine's own ceilings."""

from __future__ import annotations

# Before torch, as the command line does: it says how torch's threads wait.
import intarsia  # noqa: F401 # isort: skip

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from intarsia.arch import catalog, kind
from intarsia.engine.generate import next_logits
from intarsia.formats import save
from intarsia.model import Cache, Decoder, ResidualBlock, initialise, pack_weights
from intarsia.ops.losses import cross_entropy
from intarsia.train.optimizer import MasterAdamW
from peers import kernels
from peers.gguf_model import write_gguf
from peers.protocol import serve
from peers.torch_clock import now, peak_bytes, tokens

ROOM = 1024  # tokens that may be decoded behind a prompt
LONGEST = 1 << 17  # the catalog's context is what a model was trained for; cost is measured beyond it


class Ours:
    """One model, and the cache that the last prefill left."""

    def load(self, model: str, device: str, weights: str | None = None, gguf: str | None = None) -> str:
        """`model` is a name of the catalog. The weights drawn are written for the peers where that is asked: to the
        folder `weights` as nemotron_h, and to the file `gguf`."""
        self.device = torch.device(device)
        arch = catalog.get(model)
        self.model = initialise(Decoder(arch, torch.bfloat16, self.device)).requires_grad_(False)
        if weights:
            save(self.model, weights, family="nemotron_h")
        if gguf:
            write_gguf(self.model, Path(gguf))
        if self.device.type == "cpu":  # as it is served
            pack_weights(self.model, "bf16")
        self.model.arch, self.native = arch.replace(max_positions=LONGEST), self.model.native
        self.seconds: dict[str, float] | None = None
        for block in self.model.blocks:
            self._watch(block)
        return f"torch {torch.__version__}"

    def prefill(self, length: int, watch: bool = False) -> dict[str, Any]:
        """Seconds to read a prompt and know its next token; with `watch`, of that in each kind of block (native code
        that decodes all blocks at once is then not used)."""
        ids = tokens(self.model.arch.vocab_size, 1, length, self.device)
        self.cache = Cache(self.model.arch, 1, length + ROOM, torch.bfloat16, self.device)
        seconds, kinds = self._timed(ids, watch)
        return {"seconds": seconds, "kinds": kinds}

    def decode(self, count: int, watch: bool = False) -> dict[str, Any]:
        """The same for each of `count` greedy tokens behind what was read."""
        steps = [self._timed(self.token, watch) for _ in range(count)]
        return {"seconds": [seconds for seconds, _ in steps], "kinds": [kinds for _, kinds in steps]}

    @torch.inference_mode()
    def _timed(self, ids: torch.Tensor, watch: bool) -> tuple[float, dict[str, float]]:
        self.seconds, self.model.native = (defaultdict(float), None) if watch else (None, self.native)
        began = now(self.device)
        self.token = next_logits(self.model, ids, self.cache).argmax(-1, keepdim=True)
        return now(self.device) - began, dict(self.seconds or {})

    def _watch(self, block: ResidualBlock) -> None:
        """While somebody watches, add the seconds of every call to those of the block's kind."""
        name, began = kind(block.spec), [0.0]

        def before(*_: object) -> None:
            if self.seconds is not None:
                began[0] = now(self.device)

        def after(*_: object) -> None:
            if self.seconds is not None:
                self.seconds[name] += now(self.device) - began[0]

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)

    def train(self, model: str, device: str, batch: int, length: int, steps: int) -> dict[str, Any]:
        """Seconds of each step after one to warm up: forward, backward, AdamW on float32 masters."""
        where = torch.device(device)
        trained = initialise(Decoder(catalog.get(model), torch.bfloat16, where))
        optimizer = MasterAdamW(trained.named_parameters())
        ids = tokens(trained.arch.vocab_size, batch, length + 1, where)
        seconds = []
        for _ in range(steps + 1):
            began = now(where)
            loss = cross_entropy(trained.hidden(ids[:, :-1]), trained.head_weight, ids[:, 1:])
            loss.backward()
            optimizer.step(1e-4)
            seconds.append(now(where) - began)
        return {"seconds": seconds[1:], "peak_bytes": peak_bytes(where), "loss": float(loss)}


if __name__ == "__main__":
    peer = Ours()
    serve({
        "load": peer.load, "prefill": peer.prefill, "decode": peer.decode, "train": peer.train,
        "ceilings": kernels.ceilings, "kernels": kernels.measure,
    })  # fmt: skip
