"""A client of completion servers that costs little beside them: streams over plain sockets, read and counted."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

NAME = "served"  # what the model is called
Request = tuple[str, int]  # a prompt, and how many tokens are wanted


@dataclass
class Answer:
    """What became of a request: tokens read and generated, seconds to the first of them, or why there is none."""

    read: int = 0
    generated: int = 0
    first: float = 0.0
    error: str = ""


async def ask(port: int, request: Request) -> Answer:
    """One streamed completion, to its end."""
    body = json.dumps({
        "model": NAME, "prompt": request[0], "max_tokens": request[1], "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    answer, began, usage = Answer(), time.perf_counter(), None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        writer.write(head.encode() + body)
        status = (await reader.readline()).decode().split(" ", 2)
        while line := await reader.readline():
            if status[1:2] != ["200"]:
                status[2] = line.decode(errors="replace").strip()[:200]  # the last line is the body
            if not line.startswith(b"data: {"):
                continue
            answer.first = answer.first or time.perf_counter() - began
            if b'"usage"' in line and (found := json.loads(line[6:]).get("usage")):
                usage = found
        writer.close()
        if status[1:2] != ["200"]:
            answer.error = " ".join(status[1:]).strip() or "no answer"
        elif usage is None:
            answer.error = "the stream ended before its usage"
        else:
            answer.read, answer.generated = usage["prompt_tokens"], usage["completion_tokens"]
    except (OSError, ValueError) as error:
        answer.error = str(error) or type(error).__name__
    return answer


async def together(
    port: int, requests: list[Request], streams: int, advance: Callable[[], None] = lambda: None
) -> list[Answer]:
    """All requests, `streams` of them under way at any time."""
    answers, waiting = [Answer()] * len(requests), iter(range(len(requests)))

    async def one_after_another() -> None:
        for i in waiting:
            answers[i] = await ask(port, requests[i])
            advance()

    await asyncio.gather(*(one_after_another() for _ in range(streams)))
    return answers


async def paced(
    port: int, requests: list[Request], rate: float, advance: Callable[[], None] = lambda: None
) -> list[Answer]:
    """All requests, `rate` of them begun a second, whatever is answered meanwhile."""

    async def later(i: int) -> Answer:
        await asyncio.sleep(i / rate)
        answer = await ask(port, requests[i])
        advance()
        return answer

    return await asyncio.gather(*(later(i) for i in range(len(requests))))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def wait_until_up(port: int, process: subprocess.Popen, seconds: float = 120) -> bool:
    """Does the server answer before it ends or the time is over?"""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as link:
                link.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
                if b" 200 " in link.recv(64):
                    return True
        except OSError:
            pass
        time.sleep(0.2)
    return False
