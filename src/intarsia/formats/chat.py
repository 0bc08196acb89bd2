"""A conversation as the text that a model was taught to read: its own chat template, in a sandbox."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from intarsia.base.errors import IntarsiaError
from intarsia.formats.tokenizer import Tokenizer

# ChatML, for a model that was taught no conversations yet: every turn stands between two tokens of its own.
TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_text(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], answer: bool = True) -> str:
    """Messages `{"role": ..., "content": ...}`, with `answer` up to where the assistant begins; special tokens are
    spelt out in it.

    Raises `IntarsiaError` when the model has no template, or one that refuses or cannot read these messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise IntarsiaError("this model has no chat template: give it a bare text to continue.")
    specials = {
        f"{name}_token": "" if token is None else tokenizer.decode([token])
        for name, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
    }
    try:
        template = _compiled(tokenizer.chat_template)
        return template.render(messages=list(messages), add_generation_prompt=answer, **specials)
    except (TemplateError, TypeError) as error:
        raise IntarsiaError(f"the model's chat template could not be used: {error}.") from error


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(text: str) -> None:  # templates may call it
        raise IntarsiaError(f"the model's chat template refuses this: {text}")

    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def chat_pieces(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], first: int = 0) -> list[tuple[str, bool]]:
    """A whole conversation in pieces of text, each with whether the assistant says it in message `first` or later.

    What the assistant says ends with the template's end of the turn, which it must learn to say; the line break behind
    it is the template's. Encoded piece by piece, the tokens are those that a model sees and gives when it answers.
    Raises `IntarsiaError` for a template that writes earlier turns anew as a conversation goes on: no piece of its text
    is what was said.
    """
    whole, done, pieces = chat_text(tokenizer, messages, answer=False), 0, []
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number >= first:
            before = chat_text(tokenizer, messages[:number])
            after = chat_text(tokenizer, messages[: number + 1], answer=False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise IntarsiaError(
                    "the model's chat template writes earlier turns anew as a conversation goes on, so that the loss "
                    "cannot be put on what the assistant says: name a template that does not with data.template."
                )
            end = max(len(before), len(after.rstrip()))
            pieces += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
            done = end
    return [(text, said) for text, said in [*pieces, (whole[done:], False)] if text]


def with_template(tokenizer: Tokenizer, template: str | None = None) -> Tokenizer:
    """A tokenizer with a chat template: the given one, its own, or ChatML, whose end of a turn then ends an answer.

    Raises `IntarsiaError` where it would have to be ChatML and the tokenizer has no tokens for it.
    """
    if template is None and tokenizer.chat_template:
        return tokenizer
    config = tokenizer.config | {"chat_template": CHATML if template is None else template}
    if template is None:
        if any(tokenizer.backend.token_to_id(token) is None for token in (TURN, END_OF_TURN)):
            raise IntarsiaError(f"the tokenizer has no chat template, and no {TURN} and {END_OF_TURN} for that of "
                                "ChatML: name a file with a template with data.template.")
        return Tokenizer(tokenizer.backend, config | {"eos_token": END_OF_TURN}, tokenizer.bos_id)
    return Tokenizer(tokenizer.backend, config, tokenizer.bos_id, tokenizer.eos_id)
