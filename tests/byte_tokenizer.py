"""A real tokenizer without a file: byte-level BPE without merges, and an end-of-text token."""

import time

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from intarsia.formats import Tokenizer


class Bytes:
    """It counts the documents that it is asked to encode, in the process that asks; `pause` seconds for each batch."""

    def __init__(self, fingerprint="bytes", vocab_size=257, pause=0.0):
        vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        self.tokenizer = Backend(models.BPE(vocab | {"<end>": 256}, []))
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.tokenizer.decoder = decoders.ByteLevel()
        self.eos_id, self.vocab_size, self.fingerprint, self.pause = 256, vocab_size, fingerprint, pause
        self.encoded = 0

    def encode_batch(self, texts):
        time.sleep(self.pause)
        self.encoded += len(texts)
        return [e.ids for e in self.tokenizer.encode_batch(texts)]

    def decode(self, ids):
        return self.tokenizer.decode([int(i) for i in ids if i != self.eos_id])

    def text(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def byte_tokenizer(**config) -> Tokenizer:
    """The same as checkpoints carry it: every byte is a token, the 257th is the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast", **config})
