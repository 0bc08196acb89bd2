"""One HTTP request on its way through the engine: its answers come from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from intarsia.engine.engine import Engine
from intarsia.engine.request import Delta, Handle, Request


class Call:
    """The handles of all prompts of a request and their deltas as they come. Made inside the event loop."""

    def __init__(self, engine: Engine, requests: Sequence[Request], seconds: float):
        self._engine = engine
        self._loop, self._deltas = asyncio.get_running_loop(), asyncio.Queue()
        self._end = self._loop.time() + seconds
        for request in requests:  # all of them, before the first is queued
            engine.check(request)
        self.handles: list[Handle] = [engine.submit(r, self._receiver(i)) for i, r in enumerate(requests)]

    def _receiver(self, prompt: int):
        def receive(delta: Delta) -> None:
            self._loop.call_soon_threadsafe(self._deltas.put_nowait, (prompt, delta))

        return receive

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(prompt, delta) until every answer has ended. Raises `TimeoutError`, or what went wrong in the engine."""
        left = sum(h.request.n for h in self.handles)
        while left:
            prompt, delta = await asyncio.wait_for(self._deltas.get(), self._end - self._loop.time())
            if self.handles[prompt].error:
                raise self.handles[prompt].error
            left -= bool(delta.finish)
            yield prompt, delta

    async def finish(self) -> None:
        """Wait until every answer has ended."""
        async for _ in self.deltas():
            pass

    def leave(self) -> None:
        """Give up what is not done: its slot and pages are free after the step at hand."""
        for handle in self.handles:
            if not handle.done:
                self._engine.cancel(handle)
