"""`intarsia plan`: what a training would take, without a GPU: parameters, work, memory, days, tokens of every phase."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from intarsia.commands.common import at_least, print_table
from intarsia.commands.train import RECIPE_HELP, add_changes, read_recipe

H100 = 989.0  # dense bfloat16 TFLOP/s by the data sheet


def add(commands) -> None:
    parser = commands.add_parser(
        "plan", help="what a training would take", description=__doc__,
        epilog="example: intarsia plan nemotron-h-56b --gpus 6144",
    )  # fmt: skip
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    add_changes(parser)
    parser.add_argument("--gpus", type=at_least(1), metavar="N", help="default: the fewest that the recipe can run on")
    parser.add_argument("--tflops", type=at_least(0.001, float), default=H100, metavar="T",
                        help=f"of one GPU, dense bfloat16 (default: {H100:g}, an H100)")
    parser.add_argument("--mfu", type=at_least(0.001, float, 1), default=0.4, metavar="S",
                        help="the share of it that is used (default: 0.4)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    recipe = read_recipe(args)

    from intarsia.train.plan import built, make_plan
    from intarsia.train.start import architecture

    arch = architecture(recipe)
    gpus = args.gpus or recipe.parallel.tensor
    plan = make_plan(recipe, arch, gpus, args.tflops * 1e12, args.mfu)
    rows = [
        ("model", f"{recipe.model}, {len(arch.blocks)} blocks, {built(arch):,} parameters"),
        ("a token", f"{plan.flops_per_token:.3g} FLOP" + (", the teacher's included" if recipe.teacher else "")),
        ("the training", f"{plan.steps:,} steps of {recipe.step_tokens:,} tokens, {plan.flops:.3g} FLOP"),
        ("learning rate", f"{recipe.optimizer.lr:g}, {recipe.schedule.kind} to {recipe.schedule.floor:.0%} of it, "
                          f"{recipe.schedule.warmup} warm-up"),
        ("GPUs", f"{gpus:,}, {recipe.parallel.tensor} of them share a block"),
        ("memory of one", f"{_gib(plan.bytes)}: {_gib(plan.state_bytes)} masters, moments and gradients, "
                          f"{_gib(plan.working_bytes)} gathered weights, {_gib(plan.activation_bytes)} activations"),
        ("time", f"{plan.days:,.2f} days at {args.mfu:.0%} of {args.tflops:g} TFLOP/s"),
    ]  # fmt: skip
    for label, text in rows:
        print(f"{label:<15}{text}")
    show_blend(recipe)


def show_blend(recipe: Any) -> None:
    """Tokens of every phase: of every source of the corpus where there is one, else of every category."""
    from intarsia.train.plan import phases

    if recipe.data.path is not None and (Path(recipe.data.path) / "manifest.json").exists():
        from intarsia.commands.data import show_plan
        from intarsia.data import Corpus, mix, tokens_of
        from intarsia.train.material import blend_of

        data, blend = recipe.data, blend_of(recipe.data)
        free = blend.model_copy(update={"max_epochs": float("inf")})
        samples = mix(Corpus(data.path), free, tokens_of(data.tokens), data.length, packing=data.packing,
                      cross=data.cross, seed=recipe.seed)  # fmt: skip
        show_plan(samples)
        return samples.check_epochs(blend.max_epochs)
    found = phases(recipe)
    categories = dict.fromkeys(category for _, tokens in found for category in tokens)
    rows = [[c, *(_count(tokens.get(c, 0)) for _, tokens in found), _count(sum(t.get(c, 0) for _, t in found))]
            for c in categories]  # fmt: skip
    print_table("", ["tokens", *(f"phase {name}" for name, _ in found), "in all"], rows)


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"


def _count(tokens: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}" if tokens else ""
