"""What is known of a split's documents beside their tokens, in files of their own:

    <split>.bytes.npy   (D,) int64, UTF-8 bytes of each document's text that counts
    <split>.mask        a byte for every token, 1 where it counts in the loss; not there where every token does
    <split>.pairs.npy   (D, 3) float64, of pairs of answers: tokens of the chosen one, its reward, the other's reward
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from intarsia.base.errors import IntarsiaError
from intarsia.data.conversations import Encoded

FILES = {"mask": "mask", "pairs": "pairs.npy"}  # those that are not always there


class Marks:
    """Collects what belongs beside the documents of one split, in their order."""

    def __init__(self):
        self.sizes: list[int] = []
        self.masks: list[bytes] = []
        self.pairs: list[tuple[float, float, float]] = []

    def add(self, document: Encoded, size: int) -> None:
        """`size`: bytes of the text, where the document does not say them."""
        self.sizes.append(size if document.bytes is None else document.bytes)
        if document.mask is not None:
            self.masks.append(document.mask)
        if document.pair is not None:
            self.pairs.append(document.pair)

    def save(self, folder: Path, split: str, masked: bool, paired: bool) -> None:
        np.save(folder / f"{split}.bytes.npy", np.asarray(self.sizes, np.int64))
        if masked:
            (folder / f"{split}.mask").write_bytes(b"".join(self.masks))
        if paired:
            np.save(folder / f"{split}.pairs.npy", np.asarray(self.pairs, np.float64).reshape(-1, 3))


def join(folders: Iterable[Path], split: str, out: Path) -> None:
    """The marks of documents that now stand behind each other."""
    folders = list(folders)
    for name in ("bytes.npy", "pairs.npy"):
        if (folders[0] / f"{split}.{name}").exists():
            parts = [np.load(folder / f"{split}.{name}", allow_pickle=False) for folder in folders]
            np.save(out / f"{split}.{name}", np.concatenate(parts))
    if (folders[0] / f"{split}.mask").exists():
        with open(out / f"{split}.mask", "wb") as whole:
            for folder in folders:
                with open(folder / f"{split}.mask", "rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 20)


def load_mask(folder: Path, split: str, tokens: int) -> np.ndarray | None:
    """(tokens,) uint8, mapped; None where every token counts."""
    path = folder / f"{split}.mask"
    if not path.exists():
        return None
    if path.stat().st_size != tokens:
        raise IntarsiaError(f"{path} has {path.stat().st_size:,} bytes for {tokens:,} tokens: it is cut short or of "
                            f"another build. Delete the folder {folder} and build the data again.")
    return np.memmap(path, np.uint8, "r") if tokens else np.zeros(0, np.uint8)


def load_pairs(folder: Path, split: str, documents: int) -> np.ndarray | None:
    """(documents, 3) float64; None where documents are no pairs."""
    path = folder / f"{split}.pairs.npy"
    if not path.exists():
        return None
    pairs = np.load(path, allow_pickle=False)
    if pairs.shape != (documents, 3):
        raise IntarsiaError(f"{path} is not of the {documents:,} pairs beside it. Delete the folder {folder} and build "
                            "the data again.")
    return pairs
