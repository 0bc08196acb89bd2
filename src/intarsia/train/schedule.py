"""Learning rates as pure functions of the tokens that were read: no state, nothing to save."""

from __future__ import annotations

import math

from intarsia.train.recipe import Schedule


def rate(tokens: float, total: float, peak: float, schedule: Schedule) -> float:
    """The learning rate of the step that ends at `tokens` of `total` tokens.

    Linear warm-up over `schedule.warmup_tokens`, then `cosine` to floor x peak at the end of the training
    (Nemotron-H, arXiv 2504.03624, section 2.4), or `wsd`: the peak until the last `schedule.decay_tokens`, which come
    down in a straight line (warm-up, stable, decay; arXiv 2404.06395, and Nemotron Nano 2, arXiv 2508.14444).
    """
    warmup = schedule.warmup_tokens(total)
    if tokens < warmup:
        return peak * tokens / warmup
    if schedule.kind == "wsd":
        decay = schedule.decay_tokens(total)
        part = (tokens - (total - decay)) / decay if decay else float(tokens >= total)
        return peak * (1 - (1 - schedule.floor) * min(1.0, max(0.0, part)))
    part = min(1.0, (tokens - warmup) / max(1.0, total - warmup))
    return peak * (schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * part)))
