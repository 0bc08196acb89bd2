"""The recipe of a compression: every number that decides what comes out, typed, with its default and its unit."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from intarsia.base.recipe import Strict

Task = Literal["piqa", "hellaswag", "arc_easy", "lambada"]
Share = Annotated[float, Field(gt=0, lt=1)]


class Target(Strict):
    """What the child must reach; each that is given is a constraint, and all are met together."""

    speedup: float | None = None  # parent's time at the scenario over the child's
    throughput: float | None = None  # tokens a second, prompt and generated together
    latency: float | str | None = None  # seconds for the whole scenario
    ttft: float | str | None = None  # seconds to the first token
    memory: float | str | None = None  # bytes of weights and cache
    params: float | str | None = None
    keep_attention: float | None = Field(None, ge=0, le=1)  # attention blocks over all blocks of the child, at most

    def given(self) -> dict[str, float | str]:
        """What is asked of the child's costs: everything but where its attention stands."""
        wanted = self.model_dump(exclude={"keep_attention"})
        return {name: value for name, value in wanted.items() if value is not None}


class Data(Strict):
    path: str | None = None  # text, or a corpus built by `intarsia data build`; none: the text that `fetch` brings
    length: int = Field(512, ge=16)  # tokens of one sequence
    max_bytes: int = Field(12_000_000, ge=1)  # of text to encode, for each category
    seed: int = 0


class Importance(Strict):
    tokens: int = Field(16_384, ge=512)  # of the calibration pass
    method: Literal["independent", "iterative", "refit"] = "refit"  # ranking of FFN channels
    states: Literal["balanced", "energy"] = "balanced"  # ranking of the states of Mamba-2 blocks


class Options(Strict):
    ffn_widths: tuple[Share, ...] = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)  # of the parent's, to the nearest `multiple`
    multiple: int = Field(64, ge=1)
    kv_methods: tuple[Literal["drop", "mean", "aligned", "keep"], ...] = ("drop", "aligned")  # fewer KV heads
    windows: tuple[Annotated[int, Field(ge=1)], ...] = ()  # tokens that attention may see, such as [128]
    mamba: bool = False  # a Mamba-2 block of the attention's widths in its place
    mamba_heads: tuple[Share, ...] = (0.75, 0.5)  # of a Mamba-2 block's heads, as many from every group
    mamba_channels: tuple[Share, ...] = ()  # of the channels of its heads
    mamba_states: tuple[Share, ...] = (0.5,)  # of its states
    mamba_multiple: int = Field(8, ge=1)  # of channels and states
    experts: tuple[Share, ...] = (0.75, 0.5)  # of the routed experts of a mixture
    moe: tuple[str, ...] = ()  # a dense FFN as experts: "S2A2E16", 16 pieces, 2 for every token and 2 by choice
    moe_methods: tuple[Literal["cmoe", "moefication"], ...] = ("cmoe",)  # pieces by activations, or by weights
    linear: bool = True
    absent: bool = True
    spans: tuple[Annotated[int, Field(ge=2)], ...] = ()  # so many layers in a row may become one, such as [2, 3]
    span_methods: tuple[Literal["fold", "linear"], ...] = ("fold", "linear")  # an FFN that gives all of it; one matrix
    # Every option also with its matrices packed so, its cost measured and its score that of the rounded weights; all
    # that is not packed narrower then runs as packed bfloat16, the parent as well. sparse: two of every four inputs
    # (2:4), chosen anew in every step of the distillation. int4 and int4+ are fitted to what matters to the loss
    # ([sensitivity]); int4+ keeps a few weights of every output apart.
    precisions: tuple[Literal["int8", "int4", "sparse", "int4+"], ...] = ()


class Sensitivity(Strict):
    """What weights matter to the loss, where options.precisions has int4 or int4+ (SqueezeLLM, arXiv 2306.07629)."""

    tokens: int = Field(4_096, ge=16)  # in sequences of data.length, a backward pass each


class Library(Strict):
    """Blockwise local distillation (Puzzle 3)."""

    mode: Literal["nested", "own"] = "nested"  # widths of one FFN share their weights, or each has its own
    tokens: int = Field(65_536, ge=0)  # of training; 0: closed-form fits alone
    batch_tokens: int = Field(1_024, ge=1)
    lr: float = Field(1e-3, ge=0)
    refit_tokens: int = Field(32_768, ge=0)  # for the closed-form fit of the last matrices after training
    eval_tokens: int = Field(2_048, ge=1)  # held out: loss before and after
    # Pairs of the options that the search's candidates chose are trained together on so many tokens each, and searched
    # again; 0: they are not. Of every block so many options survive, the parent's own among them.
    coupled: int = Field(0, ge=0)
    survivors: int = Field(3, ge=2)

    @property
    def decoupled(self) -> dict[str, Any]:
        """What the library depends on before any pair is coupled."""
        return self.model_dump(exclude={"coupled", "survivors"})


class Score(Strict):
    """Replace-one-site scores on held-out text (Puzzle 4.2)."""

    metric: Literal["kl", "lm_loss", "cosine"] = "kl"
    tokens: int = Field(2_048, ge=1)
    length: int = Field(256, ge=16)  # tokens of one sequence; the standard error is over sequences
    stride: int = Field(4, ge=1)  # the head looks at every n-th position

    @property
    def seen(self) -> tuple[int, int, int]:
        """What scores depend on beside the model; each of them has every metric."""
        return self.tokens, self.stride, self.length


class Cost(Strict):
    repeats: int = Field(12, ge=1)  # interleaved measurements of every option
    calibration: int = Field(4, ge=0)  # mixed models measured whole, to calibrate the predictor


class Search(Strict):
    # Of the scores as they are, best first, beside one of every other reading; more where there are too few finalists.
    solutions: int = Field(1, ge=1)
    min_difference: int = Field(4, ge=1)  # sites in which two solutions differ
    time_limit: float = Field(60.0, gt=0)  # seconds for one solution
    # So many times all options are scored anew in the best candidate and a better one is looked for near it; 0: never.
    calibrations: int = Field(0, ge=0)
    rounds: int = Field(4, ge=1)  # a choice is built and timed; while it misses a target on time, it is made anew
    repeats: int = Field(12, ge=1)  # of that timing, in short turns


class MiniPuzzle(Strict):
    """The search of MiniPuzzle (Nemotron-H, arXiv 2504.03624, section 3), where `method` asks for it."""

    depth: Literal["mse", "logits", "kl"] = "mse"  # by which blocks are ranked
    removals: int = Field(8, ge=0)  # blocks that leave one after another, all others being ranked again
    # Of the blocks of every kind, that stays at least. Scores say which candidates are worth a judgement; a half, as it
    # was, kept Mamba-2 blocks that a hybrid had least use for.
    least: float = Field(0.0, ge=0, le=1)
    candidates: int = Field(16, ge=1)  # those of the least sum of scores, whose accuracy and agreement are measured
    shortlist: int = Field(8, ge=1)  # of these, that are benchmarked
    tasks: bool = True  # the benchmark is the mean over evaluate.tasks; else the agreement with the parent


class Tournament(Strict):
    """Of either method: candidates that get a short distillation, and the best after it is the child."""

    # Of Puzzle's solutions the best, and those that differ most (with `method` both, one of MiniPuzzle's beside them);
    # 1: no tournament.
    finalists: int = Field(3, ge=1)
    tokens: int = Field(8_192, ge=0)  # of each distillation, and at most distill.tokens


class Fusion(Strict):
    """FFNs that follow one another become one wide one after the search (FFN Fusion, arXiv 2503.18908)."""

    most: int = Field(0, ge=0)  # FFNs in one block; below 2: none are fused


class Mend(Strict):
    """The blocks of a child are fitted to each other before it learns (`mend`), without gradients."""

    tokens: int = Field(32_768, ge=0)  # of text; below two sequences: none are
    search_tokens: int = Field(8_192, ge=0)  # at most, for every candidate of the search

    @property
    def light(self) -> int:
        """Tokens of text for a candidate."""
        return min(self.tokens, self.search_tokens)


class Distill(Strict):
    tokens: int = Field(65_536, ge=0)
    batch_tokens: int = Field(2_048, ge=1)
    lr: float = Field(3e-4, ge=0)
    # A child whose first loss is below so many nats learns at a rate that is so much smaller, since the first steps of
    # Adam are as large as the rate however little there is to learn; 0: at `lr`.
    near: float = Field(0.0, ge=0)
    # A block whose gradients are greater than the median block's learns at a rate that is so much smaller: for hybrids.
    even: bool = False
    # Blocks that will be packed as int8, int4 or int4+ learn at what packing makes of them (by gradients; sparse ones
    # always do).
    rounded: bool = True
    warmup: float = Field(0.05, ge=0, le=1)  # share of the steps
    # For so much of the steps the experts of a mixture that are not chosen answer as well, counting for less and less,
    # so that all learn from every token, as fast as a dense FFN; after it the chosen alone. 0: never.
    dense: float = Field(0.0, ge=0, le=1)
    cosine_weight: float = Field(0.0, ge=0)  # of the per-layer cosine loss beside the KL; 0: KL alone
    # Whom child and controls learn from: the parent itself (live); its final hidden states, computed once (hidden; with
    # the cosine loss it is live); or its largest logits, stored once, and then without the parent in memory (stored).
    teacher: Literal["live", "hidden", "stored"] = "hidden"
    # A checkpoint that child and controls learn from instead of the parent: that of which the parent was made, so that
    # what one step lost is not lost for the next. "": the parent.
    teacher_model: str = ""
    teacher_top: int = Field(64, ge=1)  # of every token, logits that are stored; all others are one event
    clip: float = Field(1.0, ge=0)  # of the gradient's norm; 0: not clipped
    # By gradients (AdamW), or by forward passes alone (MeZO): slower by far, in the memory of the model itself. Its
    # learning rate is another (1e-6 and less), its clip that of the slope; embeddings and the final norm stay.
    learning: Literal["gradients", "forward"] = "gradients"
    train_embeddings: bool = False
    frozen: int = Field(0, ge=0)  # so many blocks at the beginning stay as they are: of hybrids the first is fragile
    evaluations: int = Field(4, ge=0)  # during the training
    checkpoint_seconds: float = Field(120.0, ge=0)

    @model_validator(mode="after")
    def _streams_are_not_stored(self) -> Distill:
        if self.teacher == "stored" and self.cosine_weight:
            raise ValueError("the cosine loss needs the parent's streams, which are not stored: take teacher = 'live'")
        if self.teacher_model and self.cosine_weight:
            raise ValueError("the cosine loss compares the child's streams with its parent's: take no other teacher")
        return self

    @property
    def stores(self) -> bool:
        """Whether the parent answers once for all students."""
        return self.teacher != "live" and not self.cosine_weight


class Evaluate(Strict):
    tokens: int = Field(16_384, ge=1)  # held out: KL and agreement with the parent; others, a quarter as many, judge
    documents: int = Field(40, ge=1)  # for each category: bits per byte
    tasks: tuple[Task, ...] = ("piqa", "hellaswag", "arc_easy", "lambada")
    limit: int | None = Field(100, ge=1)  # items of each task
    prompt: str = Field("The capital of France is Paris. Paris is known for", min_length=1)


class Controls(Strict):
    """What simpler methods make at the same speed, distilled on the same tokens."""

    # blocks, bits: the same search over cheaper blocks alone, and over precisions alone, where there are precisions
    kinds: tuple[Literal["uniform", "depth", "greedy", "random", "blocks", "bits"], ...] = (
        "uniform", "depth", "greedy", "random",
    )  # fmt: skip
    # The same search among options of these methods and precisions alone: what each of them is worth ("prefix,none",
    # "prefix,none,window"; their names are those of `options.OptionSpec.method`).
    among: tuple[str, ...] = ()
    models: tuple[str, ...] = ()  # checkpoints that were made elsewhere: mended, they learn from the same text
    tasks: bool = False  # run the tasks on them as well

    @model_validator(mode="after")
    def _options_are_named(self) -> Controls:
        for names in self.among:
            if not re.fullmatch(r"[a-z0-9+]+(,[a-z0-9+]+)*", names):
                raise ValueError(
                    f"controls.among has {names!r}: write methods and precisions with commas between them, such as "
                    "'prefix,none,int8'"
                )
        return self


class Recipe(Strict):
    # How a child is chosen from the options. both: Puzzle's solutions and the best uniform child in one tournament.
    method: Literal["puzzle", "minipuzzle", "both"] = "puzzle"
    profile: Literal["homogeneous", "vllm", "llama.cpp", "free"] = "free"  # the child is made of what this loads
    scenario: str = "1,512,64"  # batch, prompt tokens, generated tokens
    # The way to the targets in so many rounds, equal ratios each: the child of one is the parent of the next, all learn
    # from the first parent, and the tokens of the distillation are divided among them (Minitron, 2407.14679).
    rounds: int = Field(1, ge=1)
    # What may be chosen in each round, over again where there are more rounds. depth: linear blocks and none in place
    # of the parent's; width: all other options; none given: everything in every round.
    round_axes: tuple[Literal["all", "depth", "width"], ...] = ()
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 where the processor multiplies it natively
    target: Target = Target(speedup=1.3)
    data: Data = Data()
    importance: Importance = Importance()
    options: Options = Options()
    library: Library = Library()
    sensitivity: Sensitivity = Sensitivity()
    score: Score = Score()
    cost: Cost = Cost()
    search: Search = Search()
    minipuzzle: MiniPuzzle = MiniPuzzle()
    tournament: Tournament = Tournament()
    mend: Mend = Mend()
    fusion: Fusion = Fusion()
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    controls: Controls = Controls()

    @model_validator(mode="after")
    def _precisions_run_here(self) -> Recipe:
        if self.options.precisions and self.profile != "free":
            raise ValueError(f"options.precisions is for our own engine, and the profile {self.profile} is for another")
        if self.options.precisions and self.fusion.most > 1:
            raise ValueError("fused FFNs are not packed: take options.precisions or fusion.most, not both")
        return self

    @model_validator(mode="after")
    def _rounds_follow_one_another(self) -> Recipe:
        if len(self.round_axes) > self.rounds:
            raise ValueError(f"round_axes names {len(self.round_axes)} rounds, but rounds is {self.rounds}: raise it")
        if self.rounds > 1 and self.options.precisions:
            raise ValueError("packed weights learn no further: take options.precisions or several rounds, not both")
        if self.rounds > 1 and self.distill.cosine_weight:
            raise ValueError("the cosine loss compares a child's streams with its parent's, and in several rounds the "
                             "first parent is the teacher: take distill.cosine_weight = 0 or rounds = 1")  # fmt: skip
        if "depth" in self.round_axes and self.target.keep_attention is not None:
            raise ValueError("target.keep_attention puts Mamba-2 in the place of attention, and a round of depth "
                             "cannot: leave depth out of round_axes")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _pairs_are_searched(self) -> Recipe:
        if self.library.coupled and (self.method != "puzzle" or self.options.precisions or self.options.spans):
            raise ValueError(
                "library.coupled is for method = 'puzzle' without options.precisions and options.spans: its pairs are "
                "of options that only a search layer by layer keeps, and they are not packed"
            )
        return self

    @model_validator(mode="after")
    def _some_position_is_scored(self) -> Recipe:
        length = min(self.score.length, self.data.length)
        if self.score.stride >= length:
            raise ValueError(f"score.stride is {self.score.stride}: scored sequences have {length} tokens, lower it")
        return self

    @model_validator(mode="after")
    def _windows_are_seen(self) -> Recipe:
        length = min(self.score.length, self.data.length)
        if max(self.options.windows, default=0) >= length:
            raise ValueError(
                f"options.windows has {max(self.options.windows)}: scored sequences have {length} tokens, so nothing "
                "that such a window loses would be seen; raise score.length and data.length above it"
            )
        return self
