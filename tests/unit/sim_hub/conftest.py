"""A hub on a free port over a small repository, driven with the standard library's HTTP client."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sim.hub.server import Hub

SHARD = bytes(range(256)) * 40  # 10240 bytes


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes
    broken: bool = False  # the connection ended before the promised length

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One hub and how to talk to it."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.port = int(hub.server_address[1])

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            try:
                return Answer(response.status, response.headers, response.read())
            except http.client.IncompleteRead as cut:
                return Answer(response.status, response.headers, cut.partial, broken=True)
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def play(self, *rules: dict[str, object], **others: object) -> None:
        answer = self.ask("POST", "/_control", json.dumps({"rules": rules, **others}).encode())
        assert answer.status == 200, answer.body

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.get("/_control/log?wait_s=60").body.splitlines()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root" / "org" / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}\n")
    (folder / "sub" / "a.txt").write_bytes(b"a\n")
    (folder / "model-1.safetensors").write_bytes(SHARD)
    return tmp_path / "root"


@pytest.fixture
def client(root: Path) -> Iterator[Client]:
    yield from serve(Hub(root))


def serve(hub: Hub) -> Iterator[Client]:
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Client(hub)
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
