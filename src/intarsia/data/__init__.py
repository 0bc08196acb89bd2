"""Text to tokens: fetching, reading, `.bin`/`.idx` files; samples that are pure functions of their index. No torch."""

from intarsia.data.blend import Blend, load_blend, tokens_of
from intarsia.data.build import build
from intarsia.data.corpus import Corpus
from intarsia.data.fetch import ITEMS, fetch
from intarsia.data.home import home
from intarsia.data.samples import Batch, Change, Samples, mix

__all__ = [
    "ITEMS", "Batch", "Blend", "Change", "Corpus", "Samples", "build", "fetch", "home", "load_blend", "mix",
    "tokens_of",
]
