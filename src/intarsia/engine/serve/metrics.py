"""The engine's counters in the text format of Prometheus."""

from __future__ import annotations

from intarsia.engine.engine import Engine

_COUNTERS = {
    "requests": "Requests received.",
    "answers": "Answers that have ended.",
    "prompt_tokens": "Tokens of prompts.",
    "read_tokens": "Tokens of prompts that were computed.",
    "cached_tokens": "Tokens of prompts that were found in the memory of read prompts.",
    "generated_tokens": "Tokens generated.",
    "drafted_tokens": "Tokens guessed by speculative decoding.",
    "accepted_tokens": "Guessed tokens that were accepted.",
    "steps": "Steps of the engine.",
    "passes": "Passes through the model.",
    "busy_seconds": "Seconds spent in the model.",
    "preemptions": "Sequences that gave way to an older one.",
}
_GAUGES = {
    "queued": "Sequences that wait.",
    "running": "Sequences in the batch.",
    "page_bytes": "Bytes of keys and values in use.",
    "page_bytes_capacity": "Bytes allocated for keys and values.",
    "state_bytes": "Bytes of recurrent states in use.",
    "state_bytes_capacity": "Bytes allocated for recurrent states.",
    "prefix_page_bytes": "Bytes of keys and values held for read prompts.",
    "prefix_state_bytes": "Bytes of recurrent states held for read prompts.",
}


def metrics_text(engine: Engine) -> str:
    """Every counter and gauge, and the time to the first token as a histogram; rates are for whoever reads them."""
    stats, lines = engine.stats(), []
    for kind, names, suffix in (("counter", _COUNTERS, "_total"), ("gauge", _GAUGES, "")):
        for name, what in names.items():
            full = f"intarsia_{name}{suffix}"
            lines += [f"# HELP {full} {what}", f"# TYPE {full} {kind}", f"{full} {stats[name]}"]
    name, histogram = "intarsia_first_token_seconds", engine.statistics.first_token
    lines += [f"# HELP {name} Seconds from a request's arrival to its first token.", f"# TYPE {name} histogram"]
    below = 0
    for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts):
        below += count
        lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
    lines += [f"{name}_sum {histogram.sum}", f"{name}_count {below}"]
    return "\n".join(lines) + "\n"
