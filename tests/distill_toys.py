"""What the tests of distillation share: a child of a toy, its text, and its distance from its parent."""

from __future__ import annotations

import torch

from compress_toys import all_options, sites, statistics, tokens
from intarsia.compress.assemble import assemble
from intarsia.compress.distill import boundaries
from intarsia.compress.library import Builder, Library
from intarsia.compress.recipe import Distill
from intarsia.compress.recipe import Library as Recipe
from intarsia.ops.losses import kl_and_agreement

HELDOUT = tokens(8, seed=900)
MIXED = [("attention 2q/1kv", "ffn 12"), ("attention 4q/1kv aligned", "linear")]
GAPS = [("none", "none"), ("none", "ffn 24")]


def batches(step):
    return tokens(4, 24, seed=step)


def recipe(steps=30, **rest):
    return Distill(**({"tokens": 96 * steps, "batch_tokens": 96, "lr": 3e-3, "checkpoint_seconds": 0.0} | rest))


def child_of(model, folder, names=MIXED):
    """A child and its layers' ends, from a library that the surgery alone has made."""
    options, where = all_options(model), sites(model)
    made = Builder(model, options, statistics(model, 4), Recipe(tokens=0), "refit", folder / "library")
    losses = made.losses(HELDOUT)
    made.store(losses, losses)
    choice = [tuple(next(s for s in options[i] if s.name == n) for i, n in zip((site.attention, site.ffn), pair))
              for site, pair in zip(where, names)]  # fmt: skip
    return assemble(Library.open(folder / "library", model), where, choice), boundaries(where, choice)


@torch.no_grad()
def kl(model, child):
    head = [m.head_weight.float() for m in (model, child)]
    return float(kl_and_agreement(model.hidden(HELDOUT).float(), child.hidden(HELDOUT).float(), *head)[0].mean())


def silent(_):
    return {}


class Killed(Exception):
    pass
