"""`intarsia generate`: continue a prompt with one model, or with several to compare them."""

from __future__ import annotations

import argparse
import sys
import time

from intarsia.commands.common import MODEL_HELP, add_weights, at_least, find_model


def add(commands) -> None:
    parser = commands.add_parser(
        "generate", help="continue a prompt with one or several models", description=__doc__,
        epilog="example: intarsia generate smollm2-135m runs/demo --prompt 'The sea was'",
    )  # fmt: skip
    parser.add_argument("models", metavar="MODEL", nargs="+", help=MODEL_HELP)
    parser.add_argument("--prompt", required=True, help="the text to continue; - reads it from standard input")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--temperature", type=at_least(0, float), default=0.0, metavar="T", help="0 takes the likeliest token (default)"
    )
    parser.add_argument("--top-k", type=at_least(0), default=0, metavar="K", help="only the K likeliest (default: all)")
    parser.add_argument(
        "--top-p", type=at_least(0, float, most=1), default=1.0, metavar="P", help="only the likeliest of mass P (1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat format")
    add_weights(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from intarsia.base.errors import IntarsiaError

    paths = [find_model(model) for model in args.models]  # all of them, before the first is loaded
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise IntarsiaError("there is nothing to continue: give a --prompt of at least one character.")
    for name, path in zip(args.models, paths):
        if len(paths) > 1:
            print(f"\n--- {name}", flush=True)
        tokens, seconds = continue_prompt(path, prompt, args)
        print(f"[{name}: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} a second]", file=sys.stderr)


def continue_prompt(path, prompt: str, args: argparse.Namespace) -> tuple[int, float]:
    """Print the prompt and what one model adds, as it comes; the number of new tokens and the seconds they took."""
    from intarsia.base.errors import IntarsiaError
    from intarsia.engine import generate
    from intarsia.formats import load

    model, tokenizer = load(path, weights=args.weights)
    if tokenizer is None:
        raise IntarsiaError(f"{path} has no tokenizer and cannot read a prompt: copy tokenizer.json into its folder.")
    # A chat template spells its special tokens out; a bare text gets those that the tokenizer puts around every text.
    text = chat_text(tokenizer, prompt) if args.chat else prompt
    ids = tokenizer.backend.encode(text, add_special_tokens=not args.chat).ids
    writer = Writer(tokenizer, "" if args.chat else prompt)
    began = time.perf_counter()
    new = generate(
        model, ids, args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        seed=args.seed, stop_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
        on_token=lambda row: writer.add(row[0]),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    writer.end()
    return len(new), seconds


class Writer:
    """Prints text while its tokens come; a character that is spread over several tokens waits for the last of them."""

    def __init__(self, tokenizer, prompt: str):
        self.tokenizer, self.prompt = tokenizer, prompt
        self.ids: list[int] = []
        self.printed = ""

    def add(self, token: int) -> None:
        if not self.ids:  # the prompt comes with the first token: an impossible request has been refused by then
            print(self.prompt, end="")
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self._print(text)

    def end(self) -> None:
        self._print(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        print(flush=True)

    def _print(self, text: str) -> None:
        print(text[len(self.printed) :], end="", flush=True)
        self.printed = text


def chat_text(tokenizer, prompt: str) -> str:
    """One user turn in the model's own chat template, up to where the assistant begins."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from intarsia.base.errors import IntarsiaError

    if not tokenizer.chat_template:
        raise IntarsiaError("this model has no chat template: leave out --chat to continue the bare text.")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    specials = {
        f"{name}_token": "" if token is None else tokenizer.decode([token])
        for name, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
    }

    def refuse(text: str) -> None:  # templates may call it
        raise IntarsiaError(f"the model's chat template refuses this: {text}")

    environment.globals["raise_exception"] = refuse
    messages = [{"role": "user", "content": prompt}]
    try:
        template = environment.from_string(tokenizer.chat_template)
        return template.render(messages=messages, add_generation_prompt=True, **specials)
    except TemplateError as error:
        raise IntarsiaError(f"the model's chat template could not be used: {error}.") from error
