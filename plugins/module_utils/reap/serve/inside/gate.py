"""The door of the model's server: shut while the service stops, so that running requests end and no new one begins.

Runs inside the container, under whatever Python the image has: standard library only, nothing of this package.
vLLM takes it by ``--middleware`` as the outermost layer round its application (ASGI 3).
"""

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

SHUT = str(Path(__file__).with_name("shut"))
"""While this file exists new requests are refused."""


class Gate:
    """Counts the requests inside, and refuses new ones while the door is shut; ``/metrics`` stays open."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/metrics":
            await self.app(scope, receive, send)
        elif os.path.exists(SHUT):  # noqa: PTH110 - one call for each request, and no object
            await self.refuse(scope, send)
        else:
            self.inside += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self.inside -= 1

    async def refuse(self, scope: Scope, send: Send) -> None:
        """Say that the service stops, when to come back, and how many requests are still inside."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013})
            return
        error = {"message": "the service is stopping; try again later", "type": "ServiceUnavailableError", "code": 503}
        body = json.dumps({"error": error, "requests_inside": self.inside}).encode()
        # A kept connection would be one more that the server waits for when it ends.
        headers = {"content-type": "application/json", "retry-after": "30", "connection": "close"}
        headers["content-length"] = str(len(body))
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 503, "headers": pairs})
        await send({"type": "http.response.body", "body": body})
