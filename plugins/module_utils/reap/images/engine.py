"""A small client of the Docker Engine API over its Unix socket.

The API instead of the `docker` program: credentials go in a header instead of a command line or a file, a pull reports
its bytes, and the calls are the same for every engine from 20.10 on, whichever builder it ships.
Source: Docker Engine API reference, version 1.41 and later.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import tarfile
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ReapError

SOCKET = "/var/run/docker.sock"
_BROKE_OFF = "the container engine's answer broke off: is docker.service up? see its journal"


class EngineError(ReapError):
    """The engine refused; `status` is its HTTP status."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Engine:
    """Calls one engine. Every call is a connection of its own."""

    def __init__(self, path: str = SOCKET) -> None:
        self.path = path

    def open(
        self,
        method: str,
        target: str,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = 120,
    ) -> http.client.HTTPResponse:
        """Send a request; the answer's body is still to be read.

        Args:
            body: bytes or an open file are sent as a tar archive, anything else as JSON.
            timeout: seconds without a byte; None waits for ever.

        Raises:
            EngineError: no engine answers, or it answered with an error.
        """
        if query:
            target += "?" + urllib.parse.urlencode({key: value for key, value in query.items() if value is not None})
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes) and not hasattr(body, "read"):
            body, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
        elif body is not None:
            sent["Content-Type"] = "application/x-tar"
        connection = _Connection(self.path, timeout)
        try:
            connection.request(method, target, body, sent)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or error
            raise EngineError(f"no container engine answers at {self.path}: {reason}: start docker.service") from error
        if answer.status >= 400:
            text = answer.read().decode(errors="replace")
            try:
                text = json.loads(text)["message"]
            except (ValueError, KeyError, TypeError):
                text = text.strip() or answer.reason
            raise EngineError(text, answer.status)
        return answer

    def call(self, method: str, target: str, **options: Any) -> Any:
        """Send a request and return its JSON answer, None for an empty one."""
        answer = self.open(method, target, **options)
        try:
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(_BROKE_OFF) from error
        return json.loads(text) if text.strip() else None

    def lines(self, method: str, target: str, **options: Any) -> Iterator[dict[str, Any]]:
        """Send a request whose answer is one JSON object after another."""
        answer = self.open(method, target, **options)
        try:
            for line in iter(answer.readline, b""):
                if line.strip():
                    yield json.loads(line)
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(_BROKE_OFF) from error
        # An answer in chunks that is cut off looks like its end to readline; after the last chunk this is None.
        if getattr(answer, "chunked", False) and answer.chunk_left is not None:
            raise EngineError(_BROKE_OFF)

    # Images

    def image(self, name: str) -> dict[str, Any] | None:
        """What the engine knows of an image by name, digest reference or ID; None where it has none."""
        try:
            found: dict[str, Any] = self.call("GET", f"/images/{urllib.parse.quote(name, safe='/:@')}/json")
        except EngineError as error:
            if error.status in (400, 404):
                return None
            raise
        return found

    def tag(self, image: str, repository: str, tag: str) -> None:
        """Name an image."""
        self.open(
            "POST", f"/images/{urllib.parse.quote(image, safe='/:@')}/tag", query={"repo": repository, "tag": tag}
        ).read()

    def remove_image(self, name: str) -> bool:
        """Remove an image or one name of it; False where it is gone already or something uses it."""
        try:
            self.call("DELETE", f"/images/{urllib.parse.quote(name, safe='/:@')}")
        except EngineError as error:
            if error.status in (404, 409):
                return False
            raise
        return True

    # Containers

    def create(self, image: str, config: Mapping[str, Any] | None = None, name: str | None = None) -> str:
        """Create a container, return its ID."""
        body = {**(config or {}), "Image": image}
        return str(self.call("POST", "/containers/create", query={"name": name}, body=body)["Id"])

    def put(self, container: str, archive: bytes) -> None:
        """Unpack a tar archive at the container's root."""
        self.open("PUT", f"/containers/{container}/archive", query={"path": "/"}, body=archive).read()

    def get(self, container: str, path: str) -> tuple[tarfile.TarInfo, bytes]:
        """One file of a container."""
        data = self.open("GET", f"/containers/{container}/archive", query={"path": path}).read()
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            member = archive.next()
            file = archive.extractfile(member) if member is not None else None
            if member is None or file is None:
                raise EngineError(f"{path} in the container is no plain file")
            return member, file.read()

    def run(self, container: str, timeout: float) -> tuple[int, str]:
        """Start a container and wait for its end.

        Returns:
            Exit status and the last 64 KiB of its output, both streams.
        """
        self.open("POST", f"/containers/{container}/start").read()
        status = self.call("POST", f"/containers/{container}/wait", timeout=timeout)["StatusCode"]
        raw = self.open("GET", f"/containers/{container}/logs", query={"stdout": 1, "stderr": 1, "tail": 2000}).read()
        return int(status), demultiplex(raw)[-65536:]

    def remove_container(self, container: str) -> None:
        """Remove a container, running or not."""
        try:
            self.call("DELETE", f"/containers/{container}", query={"force": 1, "v": 1})
        except EngineError as error:
            if error.status not in (404, 409):
                raise


def demultiplex(raw: bytes) -> str:
    """Text of a container's log stream: frames of 8 header bytes (stream, 0, 0, 0, length big-endian) and data."""
    text, place = [], 0
    while place + 8 <= len(raw):
        length = int.from_bytes(raw[place + 4 : place + 8], "big")
        text.append(raw[place + 8 : place + 8 + length])
        place += 8 + length
    return b"".join(text).decode(errors="replace")


def auth_header(registry: str, user: str, password: str) -> dict[str, str]:
    """Credentials of a pull, as the engine takes them: in memory, for this one request."""
    text = json.dumps({"username": user, "password": password, "serveraddress": registry})
    return {"X-Registry-Auth": base64.urlsafe_b64encode(text.encode()).decode()}
