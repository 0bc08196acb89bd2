"""The recipe of a compression: every number that decides what comes out, typed, with its default and its unit."""

from __future__ import annotations

from pydantic import Field

from intarsia.base.recipe import Strict


class Target(Strict):
    """What the child must reach; each that is given is a constraint, and all are met together."""

    speedup: float | None = None  # parent's time at the scenario over the child's
    throughput: float | None = None  # tokens a second, prompt and generated together
    latency: float | str | None = None  # seconds for the whole scenario
    ttft: float | str | None = None  # seconds to the first token
    memory: float | str | None = None  # bytes of weights and cache
    params: float | str | None = None

    def given(self) -> dict[str, float | str]:
        return {name: value for name, value in self.model_dump().items() if value is not None}


class Data(Strict):
    path: str | None = None  # text, or a corpus built by `intarsia data build`; none: the text that `fetch` brings
    length: int = Field(512, ge=16)  # tokens of one sequence
    max_bytes: int = 12_000_000  # of text to encode, for each category
    seed: int = 0


class Importance(Strict):
    tokens: int = Field(16_384, ge=512)  # of the calibration pass
    method: str = "refit"  # ranking of FFN channels: independent, iterative or refit


class Options(Strict):
    ffn_widths: tuple[float, ...] = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)  # of the parent's, to the nearest `multiple`
    multiple: int = Field(64, ge=1)
    kv_methods: tuple[str, ...] = ("drop", "aligned")  # fewer KV heads: drop, mean, aligned, keep
    linear: bool = True
    absent: bool = True


class Library(Strict):
    """Blockwise local distillation (Puzzle 3)."""

    mode: str = "nested"  # widths of one FFN share their weights (nested), or each has its own (own)
    tokens: int = 65_536  # of training; 0: closed-form fits alone
    batch_tokens: int = 1_024
    lr: float = 1e-3
    refit_tokens: int = 32_768  # for the closed-form fit of the last matrices after training
    eval_tokens: int = 2_048  # held out: loss before and after


class Score(Strict):
    """Replace-one-site scores on held-out text (Puzzle 4.2)."""

    metric: str = "kl"  # kl, lm_loss or cosine
    tokens: int = 2_048
    length: int = Field(256, ge=16)  # tokens of one sequence; the standard error is over sequences
    stride: int = Field(4, ge=1)  # the head looks at every n-th position


class Cost(Strict):
    repeats: int = 12  # interleaved measurements of every option
    calibration: int = 4  # mixed models measured whole, to calibrate the predictor


class Search(Strict):
    solutions: int = 3
    min_difference: int = 4  # sites in which two solutions differ
    time_limit: float = 60.0  # seconds for one solution
    rounds: int = Field(3, ge=1)  # the choice is built and timed; if it misses a target on time, the search runs again
    repeats: int = 5  # of that timing


class Distill(Strict):
    tokens: int = 65_536
    batch_tokens: int = 2_048
    lr: float = 3e-4
    warmup: float = 0.05  # share of the steps
    cosine_weight: float = 0.0  # of the per-layer cosine loss beside the KL; 0: KL alone
    share_teacher: bool = True  # with KL alone: the parent answers once for the child and all controls
    clip: float = 1.0
    train_embeddings: bool = False
    evaluations: int = 4  # during the training
    checkpoint_seconds: float = 120.0


class Evaluate(Strict):
    tokens: int = 16_384  # held out: KL and agreement with the parent
    documents: int = 40  # for each category: bits per byte
    tasks: tuple[str, ...] = ("piqa", "hellaswag", "arc_easy", "lambada")
    limit: int | None = 100  # items of each task
    prompt: str = "The capital of France is Paris. Paris is known for"


class Controls(Strict):
    """What simpler methods make at the same speed, distilled on the same tokens."""

    kinds: tuple[str, ...] = ("uniform", "depth", "greedy", "random")
    tasks: bool = False  # run the tasks on them as well


class Recipe(Strict):
    scenario: str = "1,512,64"  # batch, prompt tokens, generated tokens
    dtype: str = "auto"  # auto: bfloat16 where the processor multiplies it natively, else float32
    target: Target = Target(speedup=1.3)
    data: Data = Data()
    importance: Importance = Importance()
    options: Options = Options()
    library: Library = Library()
    score: Score = Score()
    cost: Cost = Cost()
    search: Search = Search()
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    controls: Controls = Controls()
