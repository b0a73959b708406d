"""The HTTP side of the local hub: Hugging Face's routes, status codes and headers, and the control routes.

Routes and headers as huggingface_hub uses them (model info, revision, tree, paths-info, refs, resolve); the meaning of
the errors is in its `hf_raise_for_status`: the header X-Error-Code tells a missing repository from a missing file.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import ipaddress
import json
import re
import select
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, quote, unquote, urlsplit

from .faults import FaultError, Faults, Rule
from .repository import COMMIT_DATE, RepoFile, Repositories, RepositoryError, Revision
from .requestlog import Entry, RequestLog

CDN = "/_cdn"  # where a redirect rule sends a download: the same files, asked without a token
_CHUNK = 256 * 1024
# Of a socket's buffer: what is sent to a host that has vanished counts as handed to the network, up to this.
_UNSENT = 64 * 1024
_PAGE = 1000  # entries of a tree listing, as on the hub
_DATE = datetime.fromtimestamp(COMMIT_DATE, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass
class Failure(Exception):
    """An error answer: status, X-Error-Code and message."""

    status: int
    code: str | None
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """A byte range of a file: first byte, number of bytes, and whether the client asked for a range."""

    first: int
    count: int
    ranged: bool


class Hub(ThreadingHTTPServer):
    """A hub over one root folder. `port` 0 takes a free one; `control_token` opens /_control to other machines too."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(
        self,
        root: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        faults_file: Path | None = None,
        log_file: Path | None = None,
        control_token: str | None = None,
    ) -> None:
        self.repositories = Repositories(root)
        self.faults = Faults(faults_file)
        self.log = RequestLog(log_file)
        self.control_token = control_token
        self.stopping = threading.Event()
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Return the address as http://host:port."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that went away: tests kill clients on purpose, and the request log has it."""

    def server_close(self) -> None:
        """End stalled answers and close the socket."""
        self.stopping.set()
        super().server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    server_version = "sim-hub"
    sys_version = ""
    disable_nagle_algorithm = True
    entry: Entry
    rules: list[Rule]

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._request()

    def do_HEAD(self) -> None:
        self._request()

    def do_POST(self) -> None:
        self._request()

    def do_DELETE(self) -> None:
        self._request()

    def _request(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        path = unquote(url.path)
        self.rules = []
        if path == "/_control" or path.startswith("/_control/"):
            self.entry = self._new_entry(path)
            self._guarded(lambda: self._control(path, query))
            return
        with self.server.log.request(self._new_entry(path)) as self.entry:
            self.rules = self.server.faults.take(self.command, path)
            known = self.server.faults.current().rules
            self.entry.rules = [number for number, rule in enumerate(known) if any(rule is hit for hit in self.rules)]
            self._guarded(lambda: self._answer(url.path, query))

    def _new_entry(self, path: str) -> Entry:
        return Entry(
            self.command,
            path,
            self.headers.get("Host"),
            str(self.client_address[0]),
            self.headers.get("Range"),
            "Authorization" in self.headers,
        )

    def _guarded(self, answer: Any) -> None:
        try:
            answer()
        except Failure as failure:
            headers = dict(failure.headers)
            if failure.code:
                headers["X-Error-Code"] = failure.code
            headers["X-Error-Message"] = failure.message
            self._send_json(failure.status, {"error": failure.message}, headers)
        except RepositoryError as error:
            self._send_json(500, {"error": str(error)}, {"X-Error-Message": str(error)})
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    # ------------------------------------------------------------------ routes

    def _answer(self, raw_path: str, query: Mapping[str, str]) -> None:
        for rule in self.rules:
            if rule.delay_s:
                self.server.stopping.wait(rule.delay_s)
        for rule in self.rules:
            if rule.status is not None:
                headers = {} if rule.retry_after is None else {"Retry-After": str(rule.retry_after)}
                raise Failure(rule.status, rule.error_code, rule.message, headers)
        parts = [unquote(part) for part in raw_path.strip("/").split("/")]
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api(f"{parts[2]}/{parts[3]}", parts[4:], query)
        elif parts == ["api", "whoami-v2"] and self._token():
            self._send_json(200, {"type": "user", "name": "sim", "fullname": "sim", "orgs": []})
        elif parts == ["api", "whoami-v2"]:
            raise Failure(401, None, "Invalid username or password.")
        elif parts[0] == CDN[1:] and len(parts) >= 6 and parts[3] == "resolve":
            self._resolve(f"{parts[1]}/{parts[2]}", parts[4], "/".join(parts[5:]), from_cdn=True)
        elif len(parts) >= 5 and parts[2] == "resolve" and self.command in ("GET", "HEAD"):
            self._resolve(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]), from_cdn=False)
        else:
            raise Failure(404, None, "Sorry, we can't find the page you are looking for.")

    def _api(self, repo: str, rest: list[str], query: Mapping[str, str]) -> None:
        self._check_access(repo, files=False)
        if not rest or (rest[0] == "revision" and len(rest) == 2):
            self._model_info(repo, rest[1] if rest else "main", "blobs" in query)
        elif rest[0] == "tree" and len(rest) >= 2:
            self._tree(repo, rest[1], "/".join(rest[2:]), query)
        elif rest[0] == "paths-info" and len(rest) == 2 and self.command == "POST":
            self._paths_info(repo, rest[1])
        elif rest == ["refs"]:
            self._refs(repo)
        else:
            raise Failure(404, None, "Sorry, we can't find the page you are looking for.")

    def _model_info(self, repo: str, wanted: str, with_blobs: bool) -> None:
        revision = self._revision(repo, wanted)
        siblings: list[dict[str, object]] = []
        for file in self._visible(repo, wanted, revision):
            row: dict[str, object] = {"rfilename": file.path}
            if with_blobs:
                row |= {"blobId": file.blob, "size": file.size}
                if file.sha256:
                    row["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
            siblings.append(row)
        access = self.server.faults.current().access.get(repo)
        self._send_json(
            200,
            {
                "_id": commit_like(repo),
                "id": repo,
                "modelId": repo,
                "author": repo.split("/")[0],
                "sha": revision.commit,
                "private": bool(access and access.kind == "private"),
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "gated": "auto" if access and access.kind == "gated" else False,
                "likes": 0,
                "createdAt": _DATE,
                "lastModified": _DATE,
                "siblings": siblings,
            },
        )

    def _tree(self, repo: str, wanted: str, below: str, query: Mapping[str, str]) -> None:
        revision = self._revision(repo, wanted)
        prefix = f"{below}/" if below else ""
        recursive = query.get("recursive", "").lower() in ("1", "true")
        rows: dict[str, dict[str, object]] = {}
        for file in self._visible(repo, wanted, revision):
            if not file.path.startswith(prefix):
                continue
            inner = file.path[len(prefix) :].split("/")
            for depth in range(1, len(inner)):
                folder = prefix + "/".join(inner[:depth])
                rows[folder] = {"type": "directory", "oid": commit_like(folder), "size": 0, "path": folder}
                if not recursive:
                    break
            if recursive or len(inner) == 1:
                rows[file.path] = _tree_row(file)
        if below and not rows:
            raise Failure(404, "EntryNotFound", f'{below} does not exist on "{wanted}"')
        first, limit = int(query.get("cursor", "0")), int(query.get("limit", str(_PAGE)))
        entries = list(rows.values())
        headers = {"X-Repo-Commit": revision.commit}
        if first + limit < len(entries):
            address = f"http://{self.headers.get('Host', '')}{quote(urlsplit(self.path).path, safe='/%')}"
            flags = "&".join(f"{key}={quote(query[key])}" for key in ("recursive", "expand", "limit") if key in query)
            headers["Link"] = f'<{address}?{flags}&cursor={first + limit}>; rel="next"'
        self._send_json(200, entries[first : first + limit], headers)

    def _paths_info(self, repo: str, wanted: str) -> None:
        revision = self._revision(repo, wanted)
        body = self._body()
        if "json" in self.headers.get("Content-Type", ""):
            asked = json.loads(body or b"{}").get("paths", [])
        else:
            asked = parse_qs(body.decode()).get("paths", [])
        asked = [asked] if isinstance(asked, str) else asked
        self._send_json(200, [_tree_row(file) for file in self._visible(repo, wanted, revision) if file.path in asked])

    def _refs(self, repo: str) -> None:
        rows: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": []}
        for name in self.server.repositories.references(repo):
            revision = self._revision(repo, name)
            kind, prefix = ("branches", "refs/heads/") if name == "main" else ("tags", "refs/tags/")
            rows[kind].append({"name": name, "ref": prefix + name, "targetCommit": revision.commit})
        self._send_json(200, rows)

    def _resolve(self, repo: str, wanted: str, path: str, from_cdn: bool) -> None:
        if not from_cdn:
            self._check_access(repo, files=True)
        revision = self._revision(repo, wanted)
        file = next((file for file in self._visible(repo, wanted, revision) if file.path == path), None)
        headers = {"X-Repo-Commit": revision.commit}
        if file is None or not file.location.is_file():
            raise Failure(404, "EntryNotFound", "Entry not found", headers)
        size, etag = file.size, file.etag
        redirect = None
        for rule in self.rules:
            size = min(size, rule.truncate) if rule.truncate is not None else size
            etag = rule.etag if rule.etag is not None else etag
            redirect = rule.redirect or redirect
        headers |= {
            "ETag": f'"{etag}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(Path(path).name)};",
        }
        if file.sha256:
            headers |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{etag}"'}
        for name in (name for rule in self.rules for name in rule.omit_headers):
            headers = {key: value for key, value in headers.items() if key.lower() != name.lower()}
        if redirect and not from_cdn:
            where = f"{redirect.rstrip('/')}{CDN}/{quote(f'{repo}/resolve')}/{quote(wanted, safe='')}/{quote(path)}"
            self._send(302, {**headers, "Location": where}, io.BytesIO(), _Part(0, 0, False))
            return
        part = _requested(self.headers.get("Range"), size)
        if part is None:
            raise Failure(416, None, "Range not satisfiable", {**headers, "Content-Range": f"bytes */{size}"})
        if part.ranged:
            headers["Content-Range"] = f"bytes {part.first}-{part.first + part.count - 1}/{size}"
        self.entry.offset = part.first
        with file.location.open("rb") as stream:
            self._send(206 if part.ranged else 200, headers, stream, part)

    # ------------------------------------------------------------------ who may, and what is there

    def _token(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return hashlib.sha256(token.strip().encode()).hexdigest() if scheme.lower() == "bearer" and token else None

    def _check_access(self, repo: str, files: bool) -> None:
        token = self._token()
        access = self.server.faults.current().access.get(repo)
        exists = bool(self.server.repositories.references(repo))
        allowed = access is None or token in access.token_sha256
        if not exists or (access and access.kind == "private" and not allowed):
            # The hub does not tell a stranger whether a repository is missing or private.
            if token:
                raise Failure(404, "RepoNotFound", "Repository not found")
            raise Failure(401, "RepoNotFound", "Invalid username or password.")
        if files and not allowed:
            if token:
                raise Failure(
                    403,
                    "GatedRepo",
                    f"Access to model {repo} is restricted and you are not in the"
                    f" authorized list. Visit {self.server.url}/{repo} to ask for access.",
                )
            raise Failure(
                401,
                "GatedRepo",
                f"Access to model {repo} is restricted. You must have access to it and be"
                " authenticated to access it. Please log in.",
            )

    def _revision(self, repo: str, wanted: str) -> Revision:
        revision = self.server.repositories.revision(repo, wanted)
        if revision is None:
            raise Failure(404, "RevisionNotFound", f"Invalid rev id: {wanted}")
        return revision

    def _visible(self, repo: str, wanted: str, revision: Revision) -> list[RepoFile]:
        """Return the revision's files as the rules in force let the hub tell of them."""
        files = []
        for file in revision.files.values():
            lies = self.server.faults.lies(f"/{repo}/resolve/{wanted}/{file.path}")
            lies += [rule for rule in self.rules if rule.hide or rule.sha256]
            if any(rule.hide for rule in lies):
                continue
            wrong = next((rule.sha256 for rule in lies if rule.sha256), None)
            if wrong and file.sha256:
                file = RepoFile(file.path, file.location, file.size, file.blob, wrong)
            files.append(file)
        return files

    # ------------------------------------------------------------------ control

    def _control(self, path: str, query: Mapping[str, str]) -> None:
        token = self.server.control_token
        if token is not None:
            if not hmac.compare_digest(self.headers.get("X-Control-Token", "").encode(), token.encode()):
                raise Failure(403, None, "the control routes want the header X-Control-Token")
        elif not ipaddress.ip_address(self.client_address[0]).is_loopback:
            raise Failure(403, None, "without a control token the control routes are for this machine only")
        if path == "/_control" and self.command == "GET":
            self._send_json(200, {**self.server.faults.report(), "repositories": self.server.repositories.names()})
        elif path == "/_control" and self.command == "POST":
            try:
                self.server.faults.replace(json.loads(self._body() or b"{}"))
            except FaultError as error:
                raise Failure(400, None, str(error)) from error
            except ValueError as error:
                raise Failure(400, None, f"the body is no JSON: {error}") from error
            self._send_json(200, self.server.faults.report())
        elif path == "/_control/log" and self.command == "GET":
            text = self.server.log.lines(float(query.get("wait_s", "2"))).encode()
            self._send(200, {"Content-Type": "application/jsonl"}, io.BytesIO(text), _Part(0, len(text), False))
        elif path == "/_control/log" and self.command == "DELETE":
            self.server.log.clear(float(query.get("wait_s", "2")))
            self._send_json(200, {})
        else:
            raise Failure(404, None, "control routes: GET or POST /_control, GET or DELETE /_control/log")

    # ------------------------------------------------------------------ sending

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def _send_json(self, status: int, content: object, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self._send(
            status,
            {**(headers or {}), "Content-Type": "application/json; charset=utf-8"},
            io.BytesIO(body),
            _Part(0, len(body), False),
        )

    def _send(self, status: int, headers: Mapping[str, str], stream: BinaryIO, part: _Part) -> None:
        self.entry.status = status
        self.send_response(status)
        for name, value in headers.items():
            # A header is one line of Latin-1.
            self.send_header(name, value.replace("\n", " ").encode("latin-1", "replace").decode("latin-1"))
        self.send_header("Content-Length", str(part.count))
        self.end_headers()
        if self.command == "HEAD":
            self.entry.complete = True
            return
        self._send_body(stream, part)

    def _send_body(self, stream: BinaryIO, part: _Part) -> None:
        limits = self.server.faults.limits(self.rules)
        step = _CHUNK
        for limit in limits:
            step = max(1, min(step, int(limit.bytes_per_s / 10)))
        flips = {rule.flip_byte for rule in self.rules if rule.flip_byte is not None}
        cut = min((rule.cut_after for rule in self.rules if rule.cut_after is not None), default=part.count)
        stall = min((rule.stall_after for rule in self.rules if rule.stall_after is not None), default=part.count)
        end = min(part.count, cut, stall)
        stream.seek(part.first)
        while self.entry.bytes < end:
            chunk = bytearray(stream.read(min(step, end - self.entry.bytes)))
            if not chunk:
                break  # the file became shorter: the length that was promised cannot be kept
            start = part.first + self.entry.bytes
            for offset in flips:
                if offset is not None and start <= offset < start + len(chunk):
                    chunk[offset - start] ^= 0xFF
            self._send_all(chunk)
            waits = [limit.reserve(len(chunk)) for limit in limits]
            if waits and self.server.stopping.wait(max(waits)):
                break
        self.entry.complete = self.entry.bytes == part.count
        if not self.entry.complete:
            self.close_connection = True
            if stall < part.count and self.entry.bytes == stall:
                self._wait_for_client_to_leave()
            self.connection.shutdown(socket.SHUT_WR)

    def _send_all(self, chunk: bytearray) -> None:
        left = memoryview(chunk)
        while left:
            sent = self.connection.send(left)
            self.entry.bytes += sent
            self.server.log.sent(self.entry)
            left = left[sent:]

    def _wait_for_client_to_leave(self) -> None:
        while not self.server.stopping.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.2)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                return


def commit_like(text: str) -> str:
    """Return 40 hexadecimal digits that depend on a text only, for identifiers that nobody checks."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def _tree_row(file: RepoFile) -> dict[str, object]:
    row: dict[str, object] = {"type": "file", "oid": file.blob, "size": file.size, "path": file.path}
    if file.sha256:
        row["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return row


def _requested(header: str | None, size: int) -> _Part | None:
    """Return the part that a Range header asks for, the whole without one; None when it lies behind the end.

    One range is understood (RFC 9110, section 14.1.2); anything else is ignored, as the RFC allows.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").strip())
    if not match or match.groups() == ("", ""):
        return _Part(0, size, False)
    first_text, last_text = match.groups()
    if not first_text:
        count = min(int(last_text), size)
        return _Part(size - count, count, True) if count else None
    first = int(first_text)
    last = min(int(last_text), size - 1) if last_text else size - 1
    if first >= size:
        return None
    if last < first:
        return _Part(0, size, False)
    return _Part(first, last - first + 1, True)
