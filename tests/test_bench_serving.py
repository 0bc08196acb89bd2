"""The client of bench/serving.py: what it counts of a stream, and what it calls lost."""

import asyncio
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import streams

    return streams


USAGE = {"prompt_tokens": 5, "completion_tokens": 2}


async def answering(reader, writer):
    """What a server does depends on how many tokens are wanted: 1 refuses, 2 breaks off, anything else answers."""
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    wanted = json.loads(await reader.readexactly(size))["max_tokens"]
    if wanted == 1:
        writer.write(b'HTTP/1.1 503 Service Unavailable\r\n\r\n{"error": "the queue is full"}')
    else:
        writer.write(b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": []}\n\n')
        if wanted != 2:
            writer.write(b"data: " + json.dumps({"usage": USAGE}).encode() + b"\n\ndata: [DONE]\n\n")
    await writer.drain()
    writer.close()


def run(streams, call):
    async def both():
        server = await asyncio.start_server(answering, "127.0.0.1", 0)
        async with server:
            return await call(server.sockets[0].getsockname()[1])

    return asyncio.run(both())


def test_what_is_counted_and_what_is_lost(streams):
    requests = [("a", 3), ("b", 1), ("c", 2), ("d", 9)]
    answers = run(streams, lambda port: streams.together(port, requests, 2))
    assert [(a.read, a.generated) for a in answers] == [(5, 2), (0, 0), (0, 0), (5, 2)]
    assert answers[0].error == answers[3].error == "" and answers[0].first > 0
    assert "503" in answers[1].error and "the queue is full" in answers[1].error
    assert answers[2].error == "the stream ended before its usage"


def test_requests_begin_at_a_rate(streams):
    answers = run(streams, lambda port: streams.paced(port, [("a", 3)] * 5, rate=50))
    assert [a.generated for a in answers] == [2] * 5


def test_a_server_that_is_gone(streams):
    answers = asyncio.run(streams.together(streams.free_port(), [("a", 3)], 1))
    assert answers[0].error


def test_what_is_asked_is_a_function_of_the_seed(streams):
    sys.modules.pop("serving", None)
    import serving

    assert serving.drawn(20, 1) == serving.drawn(20, 1) != serving.drawn(20, 2)
    load = serving.Load(2.0, [streams.Answer(10, 4, 0.1), streams.Answer(error="503")])
    assert (load.generated, load.whole, load.lost) == (2.0, 7.0, 1)
