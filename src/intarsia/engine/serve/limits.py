"""What a server lets one client ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bytes of a request's body, tokens of a prompt and of an answer (None: what the context allows), answers to one
    request, log-probabilities a token, requests that wait, seconds that a request may take, seconds to drain."""

    body_bytes: int = 4 << 20
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    answers: int = 16
    logprobs: int = 20
    queue: int = 256
    seconds: float = 600.0
    drain_seconds: float = 60.0
