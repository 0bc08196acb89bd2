"""`intarsia serve`: a model over HTTP in the shape of OpenAI's interface."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from intarsia.commands.common import MODEL_HELP, add_weights, at_least, find_model

KEY_VARIABLE = "INTARSIA_API_KEY"


def add(commands) -> None:
    parser = commands.add_parser(
        "serve", help="serve a model over HTTP (OpenAI's interface)", description=__doc__,
        epilog="example: intarsia serve runs/demo --port 8000",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: this machine alone)")
    parser.add_argument("--port", type=at_least(0, most=65535), default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--name", help="what clients call the model (default: the name of its folder)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as it is stored")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    add_weights(parser, fastest=True)
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help=f"a file with the key to ask for (or {KEY_VARIABLE})"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--cache-mb", type=at_least(1), default=1024, metavar="MB", help="of caches (default: 1024)")
    engine.add_argument("--max-batch", type=at_least(1), default=16, metavar="N", help="answers at once (default: 16)")
    engine.add_argument("--chunk", type=at_least(32), default=256, metavar="N",
                        help="where prefixes are cut, a multiple of 32 (256)")  # fmt: skip
    engine.add_argument("--read", type=at_least(32), metavar="N",
                        help="prompt tokens a step reads, a multiple of the chunk (two)")  # fmt: skip
    engine.add_argument(
        "--draft", metavar="MODEL", help="guess ahead: a smaller MODEL of the same vocabulary, or 'lookup' in the text"
    )
    engine.add_argument("--draft-tokens", type=at_least(1), default=4, metavar="N", help="guesses at once (default: 4)")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-prompt", type=at_least(1), metavar="N", help="tokens of a prompt (default: the context)")
    limits.add_argument("--max-new", type=at_least(1), metavar="N", help="tokens of an answer (default: the context)")
    limits.add_argument("--max-queue", type=at_least(1), default=256, metavar="N", help="requests that wait (256)")
    limits.add_argument("--max-body-kb", type=at_least(1), default=4096, metavar="KB", help="of a request (4096)")
    limits.add_argument("--timeout", type=at_least(1, float), default=600.0, metavar="S", help="of a request (600)")
    limits.add_argument("--drain", type=at_least(0, float), default=60.0, metavar="S", help="after SIGTERM (60)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from intarsia.base.errors import IntarsiaError

    path, key = find_model(args.model), api_key(args.api_key_file)
    draft_path = None if args.draft in (None, "lookup") else find_model(args.draft)
    try:
        from intarsia.engine.serve.server import serve
    except ImportError as error:
        raise IntarsiaError(f"serving needs {error.name}: pip install 'intarsia[serve]'.") from error
    from intarsia.engine import Engine
    from intarsia.engine.serve import Limits
    from intarsia.engine.speculate import LookupDrafter
    from intarsia.formats import load

    model, tokenizer = load(path, args.dtype, args.device, weights=args.weights)
    if tokenizer is None:
        raise IntarsiaError(f"{path} has no tokenizer and cannot read a prompt: copy tokenizer.json into its folder.")
    draft = LookupDrafter() if args.draft == "lookup" else None
    if draft_path is not None:
        draft, _ = load(draft_path, args.dtype, args.device, weights=args.weights)
    engine = Engine(
        model, tokenizer, args.cache_mb << 20, args.max_batch, args.chunk, draft=draft,
        draft_tokens=args.draft_tokens, read=args.read,
    )  # fmt: skip
    limits = Limits(
        body_bytes=args.max_body_kb << 10, prompt_tokens=args.max_prompt, new_tokens=args.max_new, queue=args.max_queue,
        answers=args.max_batch, seconds=args.timeout, drain_seconds=args.drain,
    )  # fmt: skip
    name = args.name or (path.parent.name if path.name == "child" else path.stem)
    serve(engine, name, args.host, args.port, limits, key)


def api_key(file: Path | None) -> str | None:
    """The key of a file, or of the environment; None when neither gives one."""
    from intarsia.base.errors import IntarsiaError

    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise IntarsiaError(f"cannot read the API key in {file}: {error.strerror}.") from error
    if not key:
        raise IntarsiaError(f"{file} is empty: put the API key into it, or leave out --api-key-file.")
    return key
