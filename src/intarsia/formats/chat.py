"""A conversation as the text that a model was taught to read: its own chat template, in a sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from intarsia.base.errors import IntarsiaError
from intarsia.formats.tokenizer import Tokenizer


def chat_text(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> str:
    """Messages `{"role": ..., "content": ...}` up to where the assistant begins; special tokens are spelt out in it.

    Raises `IntarsiaError` when the model has no template, or one that refuses or cannot read these messages.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not tokenizer.chat_template:
        raise IntarsiaError("this model has no chat template: give it a bare text to continue.")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    specials = {
        f"{name}_token": "" if token is None else tokenizer.decode([token])
        for name, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
    }

    def refuse(text: str) -> None:  # templates may call it
        raise IntarsiaError(f"the model's chat template refuses this: {text}")

    environment.globals["raise_exception"] = refuse
    try:
        template = environment.from_string(tokenizer.chat_template)
        return template.render(messages=list(messages), add_generation_prompt=True, **specials)
    except (TemplateError, TypeError) as error:
        raise IntarsiaError(f"the model's chat template could not be used: {error}.") from error
