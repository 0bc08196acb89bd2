"""Does llama.cpp read what we write? A GGUF file's logits, as llama.cpp computes them and as we do.

    python bench/llama_check.py MODEL.gguf ... [--llama VENV/bin/python]

For every file: the largest difference of the logits behind a few random prompts over the largest logit, how often the
same token is the likeliest, and the divergence. Ours are computed in float32 from the file as it is read back.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from command import finish
from page import table
from peers.protocol import Peer

from intarsia.formats import load


def main() -> int:
    args = arguments()
    rows = []
    for path in args.models:
        with Peer("llama.cpp", "peers.llama", str(args.llama.absolute()), 2) as peer:
            rows.append(compared(path, peer, args.prompts, args.length))
    print(table(["file", "largest difference", "same token", "KL, nats"], rows))
    return 0


@torch.no_grad()
def compared(path: Path, peer: Peer, prompts: int, length: int) -> list[str]:
    model, _ = load(path, dtype="float32")
    ids = torch.randint(model.arch.vocab_size, (prompts, length), generator=torch.Generator().manual_seed(0))
    theirs = torch.tensor(peer.ask("logits", gguf=str(path.absolute()), prompts=ids.tolist()))
    ours = model(ids)[:, -1].float()
    off = (ours - theirs).abs().max() / ours.abs().max()
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    return [path.name, f"{off:.1e}", f"{100 * same:.0f} %", f"{(p.exp() * (p - q)).sum(-1).mean():.1e}"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument(
        "--llama", metavar="PYTHON", type=Path, default=Path(sys.executable), help="a Python with llama-cpp-python"
    )
    parser.add_argument("--prompts", type=int, default=8, help="default: 8")
    parser.add_argument("--length", type=int, default=40, help="tokens of each (default 40)")
    return parser.parse_args()


if __name__ == "__main__":
    finish(main)
