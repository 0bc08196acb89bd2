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
    add_weights(parser, fastest=True)
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
    from intarsia.formats.chat import chat_text

    model, tokenizer = load(path, weights=args.weights)
    if tokenizer is None:
        raise IntarsiaError(f"{path} has no tokenizer and cannot read a prompt: copy tokenizer.json into its folder.")
    # A chat template spells its special tokens out; a bare text gets those that the tokenizer puts around every text.
    text = chat_text(tokenizer, [{"role": "user", "content": prompt}]) if args.chat else prompt
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
    """Prints the prompt and then text as its tokens come."""

    def __init__(self, tokenizer, prompt: str):
        from intarsia.engine.text import TextStream

        self.stream, self.prompt, self.begun = TextStream(tokenizer), prompt, False

    def add(self, token: int) -> None:
        if not self.begun:  # the prompt comes with the first token: an impossible request has been refused by then
            print(self.prompt, end="")
            self.begun = True
        print(self.stream.add(token), end="", flush=True)

    def end(self) -> None:
        print(self.stream.end(), flush=True)
