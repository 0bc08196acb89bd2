"""transformers as a peer: `NemotronHForCausalLM` in bfloat16, trained in autocast on float32 weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from peers.protocol import serve
from peers.torch_clock import now, peak_bytes, tokens


class Stock:
    """One model, and the cache that the last prefill left."""

    def load(self, weights: str, device: str) -> str:
        self.device = torch.device(device)
        self.model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.bfloat16).to(self.device).eval()
        return f"transformers {transformers.__version__}, torch {torch.__version__}"

    def prefill(self, length: int, batch: int = 1) -> dict[str, Any]:
        self.held = None
        return {"seconds": self._timed(tokens(self.model.config.vocab_size, batch, length, self.device))}

    def decode(self, count: int) -> dict[str, Any]:
        return {"seconds": [self._timed(self.token) for _ in range(count)]}

    @torch.inference_mode()
    def _timed(self, ids: torch.Tensor) -> float:
        began = now(self.device)
        out = self.model(ids, past_key_values=self.held, use_cache=True, logits_to_keep=1)
        self.held, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return now(self.device) - began

    def bytes(self) -> int:
        """Of the weights."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def train(self, weights: str, device: str, batch: int, length: int, steps: int) -> dict[str, Any]:
        """Seconds of each step after one to warm up, with the optimiser that its Trainer uses by default."""
        where = torch.device(device)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(weights), dtype=torch.float32).to(where)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        ids = tokens(model.config.vocab_size, batch, length, where)
        seconds = []
        for _ in range(steps + 1):
            began = now(where)
            with torch.autocast(where.type, torch.bfloat16):
                loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(now(where) - began)
        return {"seconds": seconds[1:], "peak_bytes": peak_bytes(where), "loss": float(loss)}


if __name__ == "__main__":
    peer = Stock()
    serve({"load": peer.load, "prefill": peer.prefill, "decode": peer.decode, "train": peer.train, "bytes": peer.bytes})
