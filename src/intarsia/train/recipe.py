"""The recipe of a training: every number that decides what comes out, typed, with its default and its unit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from intarsia.base.errors import IntarsiaError
from intarsia.base.recipe import Strict
from intarsia.data import tokens_of


def _counted(value: int | str) -> int | str:
    try:
        tokens_of(value)
    except IntarsiaError as error:
        raise ValueError(str(error).rstrip(".")) from error
    return value


Tokens = Annotated[int | str, AfterValidator(_counted)]  # 6291456, "8.3B"


class Tokenizer(Strict):
    """A tokenizer of one's own, where the text is not yet tokens."""

    path: str | None = None  # a folder with tokenizer.json, or a model; none: one is trained on the blend's text
    vocab_size: int = Field(8192, ge=300)  # of the one that is trained
    max_bytes: int = Field(8_000_000, ge=1)  # of text that it is trained on


class Extend(Strict):
    """Conversations joined to long ones whose parts need each other; see data/extend.py."""

    length: Tokens = 0  # of a joined conversation, at most; 0: none are joined
    share: float = Field(0.5, ge=0, le=1)  # of the conversations that are joined
    turns: float = Field(0.5, ge=0, le=1)  # of the parts that a question about earlier ones follows


class Data(Strict):
    kind: Literal["text", "conversations", "preferences"] = "text"  # what is at `path`, where it is no corpus yet
    tokens: Tokens = "1M"  # of the whole training
    blend: str = "nemotron-h-text"  # a blend's name, or a .toml file
    path: str | None = None  # a corpus of `intarsia data build`, or text; none: the text that `fetch` brings
    fetched: bool = False  # whether text may be fetched where there is no path
    length: int = Field(8192, ge=2)  # tokens of a sample
    packing: Literal["split", "whole"] = "split"
    cross: bool = False  # let the state of scans, convolutions and attention cross from document to document
    max_bytes: int | None = Field(None, ge=1)  # of text to encode, for each category
    heldout: float = Field(0.02, gt=0, lt=1)  # share of documents that is kept from training
    verify: bool = True  # compare every byte of the corpus with its manifest before training
    max_epochs: float | None = Field(None, gt=0)  # none: as the blend says
    tokenizer: Tokenizer = Tokenizer()
    template: str | None = None  # a file with a chat template in Jinja; none: the tokenizer's own, else ChatML
    extend: Extend = Extend()

    @model_validator(mode="after")
    def _kinds(self) -> Data:
        if tokens_of(self.extend.length) and self.kind != "conversations":
            raise ValueError(f"data.extend joins conversations, and data.kind is {self.kind}")
        return self


class Optimizer(Strict):
    """AdamW; which parameters decay is `optimizer.decays`."""

    lr: float = Field(4e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, ge=0)  # of the gradient's global norm; 0: not clipped


class Schedule(Strict):
    kind: Literal["cosine", "wsd"] = "cosine"
    warmup: float | str = 0.01  # a share of the training, or tokens such as "8.3B"
    decay: float | str = 0.18  # of wsd: the last part, a share or tokens
    floor: float = Field(0.01, ge=0, le=1)  # of the peak

    def warmup_tokens(self, total: float) -> float:
        return _part(self.warmup, total)

    def decay_tokens(self, total: float) -> float:
        return _part(self.decay, total)

    @model_validator(mode="after")
    def _parts(self) -> Schedule:
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            if isinstance(value, str):
                _counted(value)
            elif not 0 <= value <= 1:
                raise ValueError(f"schedule.{name} is a share from 0 to 1, or tokens such as '8.3B' (given: {value})")
        return self


def _part(value: float | str, total: float) -> float:
    return min(float(tokens_of(value)), total) if isinstance(value, str) else value * total


class Preference(Strict):
    """Preference tuning, of pairs of answers; see ops/preference.py."""

    kind: Literal["none", "dpo", "rpo"] = "none"
    beta: float = Field(0.1, gt=0)  # how dear it is to leave the reference
    eta: float = Field(1.0, gt=0)  # of rpo: how much of a margin a reward of 1 asks for
    sft: float = Field(0.0, ge=0)  # weight of the chosen answer's own loss, nats a token


class Loss(Strict):
    z: float = Field(0.0, ge=0)  # weight of the squared log-partition (PaLM, section 5); 1e-4 is usual
    kl: float = Field(0.0, ge=0, le=1)  # distillation: share of the teacher's KL; 1 leaves cross-entropy out
    preference: Preference = Preference()


class Precision(Strict):
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 where the processor multiplies it natively
    fp8: bool = False  # the linear layers' three products in FP8 (Nemotron-H, section 2.3)
    fp8_keep: int = Field(4, ge=0)  # the first and last so many linear layers stay as they are
    fp8_gather: bool = True  # many ranks gather the weights of the others in FP8: half of the bytes, the same bits


class Parallel(Strict):
    tensor: int = Field(1, ge=1)  # ranks that share every block by heads and groups; the others share the data


class Guard(Strict):
    """When a step is left out."""

    window: int = Field(64, ge=4)  # accepted losses that a new one is compared with
    spike: float = Field(8.0, gt=0)  # standard deviations above their mean
    most: int = Field(20, ge=1)  # steps left out in a row: then the training stops


class Evaluate(Strict):
    every: Tokens = 0  # tokens between evaluations; 0: at the end only
    documents: int = Field(20, ge=1)  # held-out documents of each category: bits per byte
    length: int | None = Field(None, ge=2)  # of their windows; none: data.length


class Checkpoint(Strict):
    every: Tokens = "1M"  # tokens between checkpoints
    keep: int = Field(2, ge=1)  # the newest so many
    export: Tokens = 0  # tokens between models that are written for use; 0: at the end only


class Recipe(Strict):
    PRESETS = "train"

    model: str  # a name of the catalog (`intarsia arch`), or a checkpoint whose shape is taken
    about: str = ""
    teacher: str | None = None  # the checkpoint of a distillation; of preferences the reference (none: init)
    init: str | None = None  # a checkpoint to begin from; none: drawn weights
    seed: int = 0
    batch_tokens: Tokens = 6_291_456  # of a step
    micro_tokens: Tokens = 8192  # of one forward and backward pass of a rank, at least a sample
    recompute: bool = False  # activation checkpointing: keep the stream between blocks, compute the rest again
    compile: bool = False  # torch.compile of every block
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    precision: Precision = Precision()
    parallel: Parallel = Parallel()
    guard: Guard = Guard()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()

    @property
    def prefers(self) -> bool:
        """Whether this is preference tuning."""
        return self.loss.preference.kind != "none"

    @property
    def batch(self) -> int:
        """Samples of a step."""
        return max(1, tokens_of(self.batch_tokens) // self.data.length)

    @property
    def step_tokens(self) -> int:
        return self.batch * self.data.length

    @property
    def steps(self) -> int:
        return tokens_of(self.data.tokens) // self.step_tokens

    def steps_of(self, tokens: int | str) -> int:
        """A distance in tokens as steps, at least one; 0 for 0."""
        count = tokens_of(tokens)
        return max(1, count // self.step_tokens) if count else 0

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.steps < 1:
            raise ValueError(
                f"data.tokens ({self.data.tokens}) is less than one step of {self.step_tokens:,} tokens: give more "
                "tokens or a smaller batch_tokens"
            )
        if self.prefers:
            if self.loss.kl or self.loss.z:
                raise ValueError("loss.preference stands alone: set loss.kl and loss.z to 0")
            if self.init is None and self.teacher is None:
                raise ValueError("preferences are tuned against a reference: give init, the model to begin from")
        elif bool(self.loss.kl) != (self.teacher is not None):
            raise ValueError("a distillation needs both a teacher and loss.kl: one of them is missing")
        return self
