"""The bodies of requests, as OpenAI's clients send them, and what they ask of the engine.

Fields that would change the answer and are not supported are refused; those that would not (`user`, `metadata`) are
ignored. `top_k`, `min_p`, `repetition_penalty` and `ignore_eos` are the usual additions.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from intarsia.base.errors import IntarsiaError
from intarsia.engine.request import Request, Sampling
from intarsia.engine.serve.limits import Limits
from intarsia.formats.chat import chat_text
from intarsia.formats.tokenizer import Tokenizer

_REFUSED = (
    "suffix", "logit_bias", "tools", "tool_choice", "functions", "function_call", "response_format", "audio",
    "modalities", "prediction", "web_search_options",
)  # fmt: skip
_HARMLESS = {"tool_choice": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],)}


class StreamOptions(BaseModel):
    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of completion share."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    max_tokens: int | None = None
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    min_p: float | None = 0.0
    repetition_penalty: float | None = 1.0
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    seed: int | None = None
    n: int | None = 1
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    def sampling(self) -> Sampling:
        def given(value, default):
            return default if value is None else value

        return Sampling(
            temperature=given(self.temperature, 1.0),
            top_k=max(0, given(self.top_k, 0)),  # others write -1 for all
            top_p=given(self.top_p, 1.0),
            min_p=given(self.min_p, 0.0),
            repetition=given(self.repetition_penalty, 1.0),
            presence=given(self.presence_penalty, 0.0),
            frequency=given(self.frequency_penalty, 0.0),
            seed=self.seed,
        )

    def check_extras(self) -> None:
        """Raise `IntarsiaError` for fields that mean something and are not supported."""
        for name in _REFUSED:
            value = (self.model_extra or {}).get(name)
            if value and value not in _HARMLESS.get(name, ()):
                raise IntarsiaError(f"'{name}' is not supported: leave it out.")

    def request(self, prompt: list[int], tokenizer: Tokenizer, limits: Limits, context: int, **asked: Any) -> Request:
        """One prompt of this body, within the server's limits. `asked`: default_new, logprobs, prompt_logprobs."""
        self.check_extras()
        room = context - len(prompt)
        allowed = room if limits.new_tokens is None else min(room, limits.new_tokens)
        default = asked.pop("default_new")
        new = (allowed if default is None else min(default, allowed)) if self.max_tokens is None else self.max_tokens
        most_prompt = context if limits.prompt_tokens is None else limits.prompt_tokens
        top = max(asked["logprobs"] or 0, asked["prompt_logprobs"] or 0)
        bounds = (
            ("a prompt of", len(prompt), most_prompt, "tokens"),
            ("max_tokens of", new, new if limits.new_tokens is None else limits.new_tokens, ""),
            ("n of", self.n or 1, limits.answers, ""),
            ("log-probabilities of", top, limits.logprobs, "tokens"),
        )
        for what, value, most, unit in bounds:
            if value > most:
                given = f"{what} {value} {unit}".strip()
                raise IntarsiaError(f"{given} is more than the {most} that this server takes.")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        ends = () if self.ignore_eos else tokenizer.stop_ids
        return Request(
            tuple(prompt), new, self.sampling(), self.n or 1, stop, (*ends, *self.stop_token_ids), **asked
        )


class CompletionBody(Body):
    """`POST /v1/completions`. `echo` with `logprobs` scores a text; with `max_tokens` 0 nothing is generated."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = False
    logprobs: int | None = None
    best_of: int | None = None

    def requests(self, tokenizer: Tokenizer, limits: Limits, context: int) -> list[Request]:
        """One for each prompt."""
        if self.best_of not in (None, self.n or 1):
            raise IntarsiaError("'best_of' other than n is not supported: leave it out.")
        prompts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        if not 0 < len(prompts) <= limits.queue:
            raise IntarsiaError(f"{len(prompts)} prompts in one request are not possible: give 1 to {limits.queue}.")
        asked = {"default_new": 16, "logprobs": self.logprobs, "prompt_logprobs": self.logprobs if self.echo else None}
        if self.echo and self.max_tokens == 0 and self.logprobs is None:
            asked["prompt_logprobs"] = 0
        return [self.request(self._ids(p, tokenizer), tokenizer, limits, context, **asked) for p in prompts]

    @staticmethod
    def _ids(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
        return prompt if isinstance(prompt, list) else tokenizer.backend.encode(prompt, add_special_tokens=True).ids


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, Any]:
        """With its parts of text put together."""
        content = self.content
        if isinstance(content, list):
            if any(part.get("type") != "text" for part in content):
                raise IntarsiaError("a message may hold text alone: leave pictures, sounds and files out.")
            content = "".join(part.get("text", "") for part in content)
        return self.model_dump(exclude_none=True) | {"content": content or ""}


class ChatBody(Body):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None

    def requests(self, tokenizer: Tokenizer, limits: Limits, context: int) -> list[Request]:
        """The one request, through the model's chat template."""
        text = chat_text(tokenizer, [m.plain() for m in self.messages])
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        top = (self.top_logprobs or 0) if self.logprobs else None
        asked = {"default_new": None, "logprobs": top, "prompt_logprobs": None}
        return [self.request(tokenizer.encode(text), tokenizer, limits, context, **asked)]
