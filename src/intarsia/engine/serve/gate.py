"""What stands in front of the application: the key, and the size of a body. Both answer before anything is read."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

OPEN_PATHS = ("/health",)


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Gate:
    """ASGI middleware. `key` None lets everybody in; else `Authorization: Bearer KEY` is needed but for `/health`."""

    def __init__(self, app, key: str | None, body_bytes: int):
        self.app, self.key, self.body_bytes = app, None if key is None else key.encode(), body_bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._may_enter(scope["path"], headers):
            message = "a valid API key is needed: send it as 'Authorization: Bearer KEY'."
            body, how = error_body(message, code="invalid_api_key"), {"WWW-Authenticate": "Bearer"}
            await JSONResponse(body, 401, how)(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.body_bytes:
            await self._refuse(scope, receive, send)
            return
        await self.app(scope, self._counted(receive), send)

    def _may_enter(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self.key is None or path in OPEN_PATHS:
            return True
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(given.strip(), self.key) and kind.lower() == b"bearer"

    def _counted(self, receive):
        """`receive` for a body whose length was not declared: it raises in the application when it gets too long."""
        seen = 0

        async def counted():
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return counted

    async def _refuse(self, scope, receive, send) -> None:
        """A client hears the answer only after it has sent its body, so some more of that is read and thrown away."""
        thrown, more = 0, True
        while more and thrown < 8 * self.body_bytes:
            message = await receive()
            thrown += len(message.get("body", b""))
            more = message.get("more_body", False)
        await JSONResponse(error_body(self._too_large), 413, {"Connection": "close"})(scope, receive, send)

    @property
    def _too_large(self) -> str:
        return f"the body is larger than the {self.body_bytes:,} bytes that this server takes."
