"""What happens to a request before it is parsed: the bearer token, and a body of bounded size.

The server framework reads bodies without a limit, and a chunked body has no Content-Length that could be
checked. So the bytes are counted here as they arrive. The rest of a body that is too large is read and thrown
away before the answer, since a client that is still sending would otherwise see a broken connection instead
of the 413; that too is bounded, in bytes and in time.
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

DISCARDED_BYTES = 64 * 2**20
"""Most bytes of a body that are read after its limit; then the connection is closed."""
BODY_SECONDS = 30.0
"""A body has to arrive within this time."""
OPEN_PATHS = ("/health",)
"""Paths that need no token: probes have none."""
TYPES = {401: "authentication_error", 429: "rate_limit_error"}
"""The type of an error by status; others below 500 are invalid requests, and the rest server errors."""


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    """An error in the form of OpenAI's API, as JSON.

    Args:
        status: The HTTP status.
        message: What is wrong; it holds no text of the request.
        param: The field.
        code: A word that programs can compare.
    """
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


class BodyTooLarge(Exception):
    """The body has more bytes than the limit."""


class ClientLeft(Exception):
    """The client closed the connection before its body was complete."""


class RequestGuard:
    """ASGI middleware: checks the token, reads the body up to a limit, and answers exceptions with a 500.

    It stands outside the whole application, so that no exception reaches the server's log: its message could
    contain text of a request.
    """

    def __init__(self, app: App, max_body: int, token: str | None = None) -> None:
        """Wraps an application.

        Args:
            app: The application.
            max_body: Most bytes of a request's body.
            token: The bearer token; None: none is needed.
        """
        self.app, self.max_body = app, max_body
        self.token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection event of the server."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._authorized(scope["path"], headers.get(b"authorization", b"")):
            extra = [(b"www-authenticate", b"Bearer")]
            message = "Authorization: expected the server's token as Bearer, got none or another"
            await _answer(send, 401, error_body(401, message, None, "invalid_token"), extra)
            return
        try:
            body = await asyncio.wait_for(self._body(headers, receive), BODY_SECONDS)
        except BodyTooLarge:
            message = f"body: expected at most {self.max_body} bytes, got more"
            await _answer(send, 413, error_body(413, message, None, "body_too_large"))
            return
        except TimeoutError:
            message = f"body: expected it within {BODY_SECONDS:.0f} seconds, got a part of it"
            await _answer(send, 408, error_body(408, message, None, "body_timeout"))
            return
        except ClientLeft:
            return
        await self._call(scope, body, receive, send)

    def _authorized(self, path: str, header: bytes) -> bool:
        if self.token is None or path in OPEN_PATHS:
            return True
        scheme, _, given = header.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.token)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body.

        Raises:
            BodyTooLarge: It has more bytes than the limit.
            ClientLeft: The connection was closed.
        """
        length = headers.get(b"content-length", b"")
        too_large = length.isdigit() and int(length) > self.max_body
        if too_large and headers.get(b"expect", b"").lower() == b"100-continue":
            raise BodyTooLarge  # the client waits for an answer before it sends
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            chunk = message.get("body", b"")
            size, more = size + len(chunk), message.get("more_body", False)
            too_large = too_large or size > self.max_body
            if too_large:
                chunks.clear()
                if size > self.max_body + DISCARDED_BYTES:
                    break
            else:
                chunks.append(chunk)
        if too_large:
            raise BodyTooLarge
        return b"".join(chunks)

    async def _call(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Calls the application with a body that was read."""
        waiting = [body]
        started = False

        async def replay() -> Message:
            if waiting:
                return {"type": "http.request", "body": waiting.pop(), "more_body": False}
            return await receive()

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, replay, watched)
        except Exception as error:
            if not started:
                message = f"the server failed on this request ({type(error).__name__})"
                await _answer(send, 500, error_body(500, message, None, "internal_error"))


async def _answer(
    send: Send, status: int, body: bytes, extra: list[tuple[bytes, bytes]] | None = None
) -> None:
    """Sends an error; the connection is closed since its body may not have been read to the end."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *(extra or []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
