"""Text to tokens: fetching, reading, `.bin`/`.idx` files, a corpus that is a pure function of the index. No torch."""

from intarsia.data.build import build
from intarsia.data.corpus import Corpus
from intarsia.data.fetch import ITEMS, fetch
from intarsia.data.home import home

__all__ = ["ITEMS", "Corpus", "build", "fetch", "home"]
