"""The door in the model's server, as vLLM calls it: an ASGI application round another."""

from __future__ import annotations

import asyncio
import json
import runpy
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from reap.serve.gate import MIDDLEWARE, MODULE, Gate, python_path

Message = MutableMapping[str, Any]


class Server:
    """The middleware as it lies in the container's folder, round an application that ends when it is told."""

    def __init__(self, folder: Path) -> None:
        self.door = Gate(folder)
        self.door.open()
        self.end = asyncio.Event()
        name = MIDDLEWARE.removeprefix(f"{MODULE}.")
        self.gate = runpy.run_path(str(folder / f"{MODULE}.py"))[name](self.application)

    async def application(self, scope: Message, _receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            await self.end.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"served"})

    async def ask(self, path: str, kind: str = "http") -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        await self.gate({"type": kind, "path": path}, None, send)
        return sent


def test_an_open_door_hands_through_what_the_application_says(tmp_path: Path) -> None:
    async def story() -> None:
        assert (await Server(tmp_path).ask("/v1/models"))[0]["status"] == 200

    asyncio.run(story())


def test_a_shut_door_lets_running_requests_end_and_counts_them(tmp_path: Path) -> None:
    async def story() -> None:
        server = Server(tmp_path)
        running = asyncio.create_task(server.ask("/slow"))
        await asyncio.sleep(0)
        server.door.shut()
        start, body = await server.ask("/v1/chat/completions")
        assert start["status"] == 503
        assert (b"retry-after", b"30") in start["headers"]
        assert (b"connection", b"close") in start["headers"]
        assert json.loads(body["body"])["requests_inside"] == 1
        server.end.set()
        assert (await running)[0]["status"] == 200
        assert json.loads((await server.ask("/health"))[1]["body"])["requests_inside"] == 0
        server.door.open()
        assert (await server.ask("/v1/models"))[0]["status"] == 200

    asyncio.run(story())


def test_metrics_stay_open_and_websockets_do_not(tmp_path: Path) -> None:
    async def story() -> None:
        server = Server(tmp_path)
        server.door.shut()
        assert (await server.ask("/metrics"))[0]["status"] == 200
        assert await server.ask("/v1/realtime", "websocket") == [{"type": "websocket.close", "code": 1013}]

    asyncio.run(story())


@pytest.mark.parametrize(
    ("image", "own", "wanted"),
    [
        ([], None, "/opt/reap-gate"),
        (["PATH=/bin", "PYTHONPATH=/in/image"], None, "/opt/reap-gate:/in/image"),
        (["PYTHONPATH=/in/image"], "/of/profile", "/opt/reap-gate:/of/profile"),
        (["PYTHONPATH=/in/image"], "", "/opt/reap-gate"),
    ],
)
def test_the_images_own_python_path_stays(image: list[str], own: str | None, wanted: str) -> None:
    assert python_path(image, own) == wanted
