"""The bodies of replies, whole or in pieces, as OpenAI's clients read them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from intarsia.engine.request import Delta, Handle, TokenLogprob
from intarsia.formats.tokenizer import Tokenizer

_REASONS = {"stop": "stop", "length": "length"}


class Replies:
    """Of one HTTP request: `handles` has one for each of its prompts. Choice k is answer k % n of prompt k // n."""

    def __init__(self, model: str, tokenizer: Tokenizer, handles: Sequence[Handle]):
        self.tokenizer, self.handles = tokenizer, handles
        self.base = {"id": f"{self.PREFIX}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    PREFIX = KIND = CHUNK = ""

    def whole(self) -> dict[str, Any]:
        """The reply to a request that is done."""
        choices = [self.choice(handle, i) for handle in self.handles for i in range(handle.request.n)]
        for index, choice in enumerate(choices):
            choice["index"] = index
        return self.base | {"object": self.KIND, "choices": choices, "usage": self.usage()}

    def piece(self, prompt: int, delta: Delta) -> dict[str, Any]:
        """One event of a stream: what a delta adds to an answer of a prompt."""
        choice = self.part(prompt, delta) | {"index": prompt * self.handles[0].request.n + delta.index}
        return self.base | {"object": self.CHUNK, "choices": [choice]}

    def usage_piece(self) -> dict[str, Any]:
        return self.base | {"object": self.CHUNK, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        read = sum(len(h.request.prompt) for h in self.handles)
        made = sum(len(a.tokens) for h in self.handles for a in h.answers)
        cached = sum(h.cached_tokens for h in self.handles)
        return {
            "prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def opening(self) -> list[dict[str, Any]]:
        """Events before the first token."""
        return []

    def choice(self, handle: Handle, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def part(self, prompt: int, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def token_text(self, token: int) -> str:
        """One token alone; its name in the vocabulary where it is no whole character."""
        text = self.tokenizer.decode([token])
        return text if text and "\ufffd" not in text else self.tokenizer.backend.id_to_token(token) or text


class CompletionReplies(Replies):
    """Of `/v1/completions`; with `echo` an answer begins with its prompt."""

    PREFIX, KIND, CHUNK = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, handles: Sequence[Handle], echo: bool):
        super().__init__(model, tokenizer, handles)
        self.echo = echo
        self._offsets = {}  # of each choice, how much of its text stands before its next token

    def choice(self, handle: Handle, index: int) -> dict[str, Any]:
        answer = handle.answers[index]
        prompt = self._prompt(handle) if self.echo else ""
        told = self._scored(handle, answer.logprobs)
        return {"text": prompt + answer.text, "finish_reason": _REASONS.get(answer.finish), "logprobs": told}

    def part(self, prompt: int, delta: Delta) -> dict[str, Any]:
        handle, key = self.handles[prompt], (prompt, delta.index)
        first = key not in self._offsets
        told = self._offsets.setdefault(key, 0)
        text = self._prompt(handle) + delta.text if self.echo and first else delta.text
        logprobs = self._scored(handle, delta.logprobs, told, with_prompt=self.echo and first)
        if logprobs:
            self._offsets[key] += sum(map(len, logprobs["tokens"]))
        return {"text": text, "finish_reason": _REASONS.get(delta.finish), "logprobs": logprobs}

    def _prompt(self, handle: Handle) -> str:
        return self.tokenizer.decode(list(handle.request.prompt), skip_special_tokens=True)

    def _scored(
        self, handle: Handle, logprobs: Iterable[TokenLogprob], offset: int = 0, with_prompt: bool | None = None
    ) -> dict[str, Any] | None:
        request = handle.request
        if request.logprobs is None:
            return None
        told: list[TokenLogprob | None] = list(logprobs)
        if self.echo if with_prompt is None else with_prompt:
            told = [*handle.prompt_logprobs, *told]
        tokens = [self.token_text(request.prompt[0] if t is None else t.token) for t in told]
        offsets = [offset]
        for token in tokens:
            offsets.append(offsets[-1] + len(token))
        top = [None if t is None else {self.token_text(i): p for i, p in t.top} for t in told]
        return {
            "tokens": tokens, "token_logprobs": [None if t is None else t.logprob for t in told], "top_logprobs": top,
            "text_offset": offsets[:-1],
        }  # fmt: skip


class ChatReplies(Replies):
    """Of `/v1/chat/completions`."""

    PREFIX, KIND, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        choices = range(self.handles[0].request.n)
        empty = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self.base | {"object": self.CHUNK, "choices": [empty | {"index": i}]} for i in choices]

    def choice(self, handle: Handle, index: int) -> dict[str, Any]:
        answer = handle.answers[index]
        return {
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": _REASONS.get(answer.finish),
            "logprobs": self._scored(handle, answer.logprobs),
        }

    def part(self, prompt: int, delta: Delta) -> dict[str, Any]:
        return {
            "delta": {"content": delta.text} if delta.text or not delta.finish else {},
            "finish_reason": _REASONS.get(delta.finish),
            "logprobs": self._scored(self.handles[prompt], delta.logprobs),
        }

    def _scored(self, handle: Handle, logprobs: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if handle.request.logprobs is None:
            return None
        return {
            "content": [
                self._entry(t.token, t.logprob) | {"top_logprobs": [self._entry(i, p) for i, p in t.top]}
                for t in logprobs
            ]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
