"""The process: a socket, uvicorn, and an orderly end."""

from __future__ import annotations

import signal
import socket

import uvicorn

from intarsia.base.errors import IntarsiaError
from intarsia.engine.engine import Engine
from intarsia.engine.serve.app import make_app
from intarsia.engine.serve.limits import Limits


def serve(
    engine: Engine, name: str, host: str = "127.0.0.1", port: int = 8000, limits: Limits | None = None,
    key: str | None = None,
) -> None:  # fmt: skip
    """Serve until SIGTERM or SIGINT; then take no new requests, answer those that are here, and return.

    Port 0 takes a free one. Says where it listens. Raises `IntarsiaError` when it cannot listen there.
    """
    limits = limits or Limits()
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise IntarsiaError(f"cannot listen at {host} port {port}: {error.strerror}. Choose another --port.") from error
    app = make_app(engine, name, limits, key)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=int(limits.drain_seconds), lifespan="on"
    )
    # uvicorn drains on a signal and then raises it again; being asked to end is no failure.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: None)
    where = listener.getsockname()
    shown = f"[{where[0]}]" if ":" in where[0] else where[0]
    print(f"{name} listens at http://{shown}:{where[1]}/v1", flush=True)
    uvicorn.Server(config).run(sockets=[listener])
