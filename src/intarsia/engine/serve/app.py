"""The application: routes in OpenAI's shape over one engine.

    GET /v1/models, POST /v1/completions, POST /v1/chat/completions, GET /health, GET /metrics
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request as Http

from intarsia.base.errors import IntarsiaError
from intarsia.engine.driver import Driver
from intarsia.engine.engine import Engine
from intarsia.engine.serve.call import Call
from intarsia.engine.serve.gate import Gate, error_body
from intarsia.engine.serve.limits import Limits
from intarsia.engine.serve.metrics import metrics_text
from intarsia.engine.serve.protocol import Body, ChatBody, CompletionBody
from intarsia.engine.serve.replies import ChatReplies, CompletionReplies, Replies


class Refusal(Exception):
    """An answer that is an error of this status."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None):
        super().__init__(message)
        self.status, self.body = status, error_body(message, kind, code)


def make_app(engine: Engine, name: str, limits: Limits | None = None, key: str | None = None) -> FastAPI:
    """The application of one model, known to clients as `name`. Its engine is stepped while the application runs."""
    service = Service(engine, name, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        with Driver(engine):
            yield

    app = FastAPI(title="Intarsia", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, key=key, body_bytes=service.limits.body_bytes)
    _add_errors(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(metrics_text(engine), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        service.check_name(model)
        return service.card

    @app.post("/v1/completions")
    async def completions(http: Http, body: CompletionBody) -> Response:
        def replies(handles):
            return CompletionReplies(name, engine.tokenizer, handles, bool(body.echo))

        return await service.answer(http, body, replies)

    @app.post("/v1/chat/completions")
    async def chat(http: Http, body: ChatBody) -> Response:
        return await service.answer(http, body, lambda handles: ChatReplies(name, engine.tokenizer, handles))

    return app


def _add_errors(app: FastAPI) -> None:
    """Every error in the shape that OpenAI's clients read."""

    @app.exception_handler(Refusal)
    async def refused(_: Http, error: Refusal) -> Response:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(IntarsiaError)
    async def impossible(_: Http, error: IntarsiaError) -> Response:
        return JSONResponse(error_body(str(error)), 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Http, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(error_body(f"{where}: {first['msg']}" if where else first["msg"]), 400)

    @app.exception_handler(HTTPException)
    async def http(_: Http, error: HTTPException) -> Response:
        return JSONResponse(error_body(str(error.detail)), error.status_code)


class Service:
    """Turns bodies into calls of the engine and their deltas into replies."""

    def __init__(self, engine: Engine, name: str, limits: Limits):
        self.engine, self.name, self.limits = engine, name, limits
        self.card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "intarsia",
                     "max_model_len": engine.arch.max_positions}  # fmt: skip

    def check_name(self, given: str) -> None:
        if given != self.name:
            message = f"there is no model '{given}' here; there is '{self.name}'."
            raise Refusal(404, message, code="model_not_found")

    async def answer(self, http: Http, body: Body, make_replies) -> Response:
        """Queue what a body asks for; reply when it is done, or piece by piece."""
        self.check_name(body.model)
        context = self.engine.arch.max_positions
        requests = await run_in_threadpool(body.requests, self.engine.tokenizer, self.limits, context)
        waiting = self.engine.stats()["queued"]
        if waiting + len(requests) > self.limits.queue:
            raise Refusal(429, f"{waiting} requests wait already: try again later.", "rate_limit_error")
        call = Call(self.engine, requests, self.limits.seconds)
        replies = make_replies(call.handles)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(self._events(call, replies, usage), media_type="text/event-stream")
        try:
            await self._finish(http, call)
            return JSONResponse(replies.whole())
        finally:
            call.leave()

    async def _finish(self, http: Http, call: Call) -> None:
        """Wait for a call; a client that goes away, or takes too long, ends it."""
        tasks = [asyncio.ensure_future(each) for each in (call.finish(), _disconnect(http))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] not in done:
                raise Refusal(499, "the client has gone.")
            try:
                tasks[0].result()
            except TimeoutError:
                raise Refusal(504, self._late, "timeout_error") from None
        finally:
            for task in tasks:
                task.cancel()

    async def _events(self, call: Call, replies: Replies, usage: bool) -> AsyncIterator[str]:
        """Server-sent events. It ends early, and its call with it, when the client goes away."""
        try:
            for event in replies.opening():
                yield _event(event)
            async for prompt, delta in call.deltas():
                yield _event(replies.piece(prompt, delta))
            if usage:
                yield _event(replies.usage_piece())
            yield "data: [DONE]\n\n"
        except TimeoutError:
            yield _event(error_body(self._late, "timeout_error"))
        except Exception as error:
            yield _event(error_body(f"the engine failed: {error}", "server_error"))
        finally:
            call.leave()

    @property
    def _late(self) -> str:
        return f"the answer was not complete within the {self.limits.seconds:g} seconds that this server takes."


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _disconnect(http: Http) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
