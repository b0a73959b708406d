"""A streaming client for OpenAI-compatible endpoints that accounts for every event it was sent.

A client library would repair what a server does wrong: join pieces, ignore a second ``[DONE]``, replace broken UTF-8.
This one keeps it, because what it keeps is what the verification judges.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ..errors import ReapError

Clock = Callable[[], float]

# Bytes asked of the socket at once. A read returns what has arrived, so a burst of events is one read.
READ_BYTES = 65536
# Longest part of an answer that is no stream which is kept for the report.
KEPT_BODY = 2000


class CouldNotRun(ReapError):
    """The verification has no answer: nothing was proved and nothing was refuted.

    Attributes:
        report: what is known, where the reason lies in what is verified (it does not answer, has another name, counts
            nothing); None where it lies in who asks (a wrong setting, a full disk).
        about_endpoint: whether the reason lies in what is verified.
    """

    report: dict[str, Any] | None = None
    about_endpoint = True


@dataclass(frozen=True)
class Deadlines:
    """Seconds a request may take. Each phase has its own, so a server that hangs is told from one that is slow."""

    connect_s: float = 10.0
    first_token_s: float = 120.0
    between_tokens_s: float = 60.0
    total_s: float = 900.0

    def for_prompt(self, tokens: int, slowest_tok_s: float) -> Deadlines:
        """The same, with time for a prompt of so many tokens at the slowest prefill rate worth waiting for."""
        extra = tokens / slowest_tok_s
        return Deadlines(self.connect_s, self.first_token_s + extra, self.between_tokens_s, self.total_s + extra)


@dataclass
class Usage:
    """The token counts a server states; `cached` is None where it does not say."""

    prompt: int
    completion: int
    total: int | None = None
    cached: int | None = None

    @classmethod
    def read(cls, data: Any) -> Usage | None:
        """From a ``usage`` object, or None when it is not one."""
        if not isinstance(data, Mapping):
            return None
        prompt, completion = data.get("prompt_tokens"), data.get("completion_tokens")
        if not isinstance(prompt, int) or not isinstance(completion, int):
            return None
        total, details = data.get("total_tokens"), data.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
        known = (number if isinstance(number, int) else None for number in (total, cached))
        return cls(prompt, completion, *known)

    def to_dict(self) -> dict[str, int | None]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.total,
            "cached_tokens": self.cached,
        }


@dataclass
class TokenEvent:
    """One event that carried text. `at` in seconds after the request was sent; `kind` reasoning, content or tool."""

    at: float
    kind: str
    text: str
    read: int


@dataclass
class Reply:
    """What a server sent for one chat request.

    Times are seconds after the request was sent. `problems` maps the name of a rule of the protocol that was broken
    to what was seen; an empty map is a clean reply.
    """

    status: int = 0
    streamed: bool = True
    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None
    models: set[str] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)
    events: list[TokenEvent] = field(default_factory=list)
    done: int = 0
    headers_s: float | None = None
    last_chunk_s: float | None = None
    end_s: float = 0.0
    cancelled: bool = False
    body: str = ""
    error: str | None = None
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def first_token_s(self) -> float | None:
        return self.events[0].at if self.events else None

    @property
    def last_token_s(self) -> float | None:
        return self.events[-1].at if self.events else None

    def first_of(self, kind: str) -> float | None:
        """When the first event of a kind came, in seconds; None when none came."""
        return next((event.at for event in self.events if event.kind == kind), None)

    @property
    def reads(self) -> int:
        """In how many separate reads from the network the events with text arrived."""
        return len({event.read for event in self.events})

    def problem(self, name: str, text: str) -> None:
        """Remember the first thing seen against a rule."""
        self.problems.setdefault(name, text)

    def timing(self) -> dict[str, float | None]:
        return {
            "headers_s": self.headers_s,
            "first_token_s": self.first_token_s,
            "first_reasoning_s": self.first_of("reasoning"),
            "first_content_s": self.first_of("content"),
            "last_token_s": self.last_token_s,
            "last_chunk_s": self.last_chunk_s,
            "end_s": self.end_s,
        }


def text_of(part: Mapping[str, Any], *names: str) -> str:
    """The first of these keys that holds text. vLLM says `reasoning`, older builds and others `reasoning_content`."""
    for name in names:
        value = part.get(name)
        if isinstance(value, str) and value:
            return value
    return ""


_HALVES = re.compile("[\ud800-\udfff]")


def mended(data: Any) -> Any:
    """Parsed JSON with U+FFFD in place of halves of surrogate pairs."""
    if isinstance(data, str):
        return _HALVES.sub("\ufffd", data)
    if isinstance(data, list):
        return [mended(item) for item in data]
    if isinstance(data, dict):
        return {mended(key): mended(value) for key, value in data.items()}
    return data


def merge_tool_calls(reply: Reply, parts: Any) -> str:
    """Add the pieces of one event to the reply's calls; returns the text that was added.

    A piece belongs to a call that has begun or begins the next one. Any other number would be another call of Python's
    list (-1), or as many calls as it says.
    """
    calls, added = reply.tool_calls, ""
    for part in parts if isinstance(parts, list) else []:
        if not isinstance(part, Mapping):
            continue
        index = part.get("index")
        index = index if isinstance(index, int) else len(calls)
        if not 0 <= index <= len(calls):
            reply.problem("tool_index", f"a piece of tool call number {index}, when {len(calls)} had begun")
            continue
        if index == len(calls):
            calls.append({"id": None, "name": "", "arguments": ""})
        call = calls[index]
        call["id"] = part.get("id") or call["id"]
        function = part.get("function")
        if isinstance(function, Mapping):
            name, arguments = text_of(function, "name"), text_of(function, "arguments")
            call["name"] += name
            call["arguments"] += arguments
            added += name + arguments
    return added


def header_safe(api_key: str | None) -> str | None:
    """The key without white space round it, or None for none.

    Raises:
        CouldNotRun: no header can carry it. The library's own error would print the key.
    """
    key = (api_key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise CouldNotRun(
            "the API key holds a line break, a control character or a letter beyond ASCII, which no HTTP header can "
            "carry: check the key file or REAP_API_KEY"
        )
    return key or None


class Client:
    """One endpoint. Every request has its own connection, so a broken one cannot spoil the next.

    Args:
        extra: keys of the body of every chat request.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        *,
        api_key: str | None = None,
        deadlines: Deadlines | None = None,
        extra: Mapping[str, Any] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        wanted = "wanted a URL like http://127.0.0.1:8000"
        try:
            parts = urlsplit(endpoint)
            port = parts.port
            # What the resolver does with a name later; it cannot do it with an empty label or one of 64 letters.
            (parts.hostname or "").encode("idna")
        except ValueError as error:
            raise CouldNotRun(f"endpoint is {endpoint!r} ({error}), {wanted}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CouldNotRun(f"endpoint is {endpoint!r}, {wanted}")
        if not parts.path.isascii() or not endpoint.isprintable() or " " in endpoint:
            raise CouldNotRun(f"endpoint is {endpoint!r}, which holds a character that no URL has; {wanted}")
        path = parts.path.rstrip("/")
        self.base_path = path.removesuffix("/v1")
        self.scheme, self.host = parts.scheme, parts.hostname
        self.port = port or (443 if parts.scheme == "https" else 80)
        self.url = f"{self.scheme}://{parts.netloc.rpartition('@')[2]}{self.base_path}"
        self.model = model
        self._api_key = header_safe(api_key)
        self.extra = dict(extra or {})
        self.deadlines = deadlines or Deadlines()
        self.clock = clock

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is on this machine, so that this machine's memory is the server's."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if self.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self.host, self.port, timeout=timeout, context=context)
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json, text/plain"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        return headers

    def exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> tuple[int, bytes]:
        """One plain request.

        Returns:
            Status and body.

        Raises:
            OSError, http.client.HTTPException: the connection failed or broke.
        """
        connection = self._connection(timeout or self.deadlines.connect_s)
        try:
            data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
            connection.request(method, self.base_path + path, body=data, headers=self._headers())
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def get_json(
        self, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> tuple[int, Any]:
        """GET, or POST where there is a body. Returns status and parsed body, or its text when it is no JSON."""
        status, data = self.exchange("GET" if body is None else "POST", path, body, timeout)
        try:
            return status, mended(json.loads(data))
        except ValueError:
            return status, data.decode("utf-8", "replace")

    def chat(
        self,
        messages: list[dict[str, Any]],
        *,
        max_tokens: int,
        stream: bool = True,
        temperature: float | None = 0.0,
        extra: Mapping[str, Any] | None = None,
        deadlines: Deadlines | None = None,
        on_token: Callable[[Reply], bool | None] | None = None,
    ) -> Reply:
        """Ask for one chat completion.

        Args:
            messages: as the OpenAI API takes them.
            max_tokens: limit of reasoning and content together.
            temperature: None leaves the server's default.
            extra: further keys of the request body.
            on_token: called after every event with text; returning False closes the connection (a cancellation).

        Returns:
            The reply with everything that was seen. Never raises for what a server does: see `Reply.problems`.
        """
        limits = deadlines or self.deadlines
        body: dict[str, Any] = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "stream": stream}
        if temperature is not None:
            body["temperature"] = temperature
        if stream:
            body["stream_options"] = {"include_usage": True}
        body.update(self.extra)
        body.update(extra or {})
        reply = Reply(streamed=stream)
        connection = self._connection(limits.connect_s)
        started = self.clock()
        try:
            connection.connect()
            sock = connection.sock
            assert sock is not None
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            data = json.dumps(body, ensure_ascii=False).encode()
            # A reply in one piece begins when its last token is made.
            sock.settimeout(limits.first_token_s if stream else limits.total_s)
            started = self.clock()
            connection.request("POST", self.base_path + "/v1/chat/completions", body=data, headers=self._headers())
            response = connection.getresponse()
            reply.status = response.status
            reply.headers_s = self.clock() - started
            kind = response.headers.get_content_type()
            if stream and response.status == 200 and kind == "text/event-stream":
                self._read_stream(reply, response, sock, started, limits, on_token)
            else:
                self._read_whole(reply, response, sock, started, limits, kind)
        except TimeoutError:
            waited = self.clock() - started
            seen = f"after {len(reply.events)} events with text" if reply.events else "before the first token"
            reply.problem("deadline", f"nothing came for too long {seen}, given up after {waited:.1f} s")
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            reply.problem("connection", f"the connection broke after {len(reply.events)} events with text: {reason}")
        finally:
            reply.end_s = self.clock() - started
            connection.close()
        return reply

    def _read_whole(
        self,
        reply: Reply,
        response: http.client.HTTPResponse,
        sock: socket.socket,
        started: float,
        limits: Deadlines,
        kind: str,
    ) -> None:
        """A reply that is one JSON object: an error, or what was asked for without streaming."""
        sock.settimeout(max(0.01, started + limits.total_s - self.clock()))
        raw = response.read()
        reply.body = raw[:KEPT_BODY].decode("utf-8", "replace")
        if reply.streamed and reply.status == 200:
            reply.problem("event_stream", f"asked for a stream, the answer is {kind}")
        try:
            data = self._whole_characters(reply, raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            reply.problem("utf8_intact", f"the body is no UTF-8: {error}")
            return
        except ValueError:
            reply.problem("json_body", f"the body is no JSON: {reply.body[:120]!r}")
            return
        if not isinstance(data, Mapping):
            reply.problem("json_body", f"the body is no JSON object: {reply.body[:120]!r}")
            return
        if reply.status != 200:
            stated = data.get("error")
            message = stated.get("message") if isinstance(stated, Mapping) else None
            reply.error = message if isinstance(message, str) and message else None
            return
        if "error" in data or not isinstance(data.get("choices"), list) or not data["choices"]:
            reply.problem("no_error_body", f"status 200, but the body is {reply.body[:160]!r}")
            return
        choice = data["choices"][0]
        message = choice.get("message") if isinstance(choice, Mapping) else None
        if not isinstance(message, Mapping):
            reply.problem("json_body", "the first choice has no message")
            return
        reply.content = text_of(message, "content")
        reply.reasoning = text_of(message, "reasoning", "reasoning_content")
        merge_tool_calls(reply, message.get("tool_calls"))
        reply.finish_reason = choice.get("finish_reason")
        reply.usage = Usage.read(data.get("usage"))
        self._identity(reply, data)
        if "\ufffd" in reply.content + reply.reasoning:
            reply.problem("utf8_intact", "the text holds U+FFFD: a character was broken on the way")

    def _read_stream(
        self,
        reply: Reply,
        response: http.client.HTTPResponse,
        sock: socket.socket,
        started: float,
        limits: Deadlines,
        on_token: Callable[[Reply], bool | None] | None,
    ) -> None:
        pending = b""
        reads = 0
        while True:
            now = self.clock()
            last = reply.last_token_s
            phase = started + limits.first_token_s if last is None else started + last + limits.between_tokens_s
            left = min(phase, started + limits.total_s) - now
            if left <= 0:
                raise TimeoutError
            sock.settimeout(left)
            data = response.read1(READ_BYTES)
            at = self.clock() - started
            if not data:
                break
            reads += 1
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                self._take_line(reply, line.rstrip(b"\r"), at, reads)
                if on_token is not None and reply.events and reply.events[-1].read == reads:
                    reply.cancelled = on_token(reply) is False
                    if reply.cancelled:
                        return
        if pending.strip():
            reply.problem("stream_complete", f"the stream ends inside a line: {pending[:80]!r}")

    def _take_line(self, reply: Reply, line: bytes, at: float, read: int) -> None:
        if not line or line.startswith((b":", b"event:", b"id:", b"retry:")):
            return
        if not line.startswith(b"data:"):
            reply.problem("event_stream", f"a line that is no event: {line[:80]!r}")
            return
        payload = line[5:].strip()
        if payload == b"[DONE]":
            reply.done += 1
            return
        if reply.done:
            reply.problem("done_once", "an event came after [DONE]")
        try:
            text = payload.decode("utf-8")
        except UnicodeDecodeError as error:
            reply.problem("utf8_intact", f"an event is no UTF-8 ({error.reason}): a character was cut in two")
            text = payload.decode("utf-8", "replace")
        try:
            data = self._whole_characters(reply, text)
        except ValueError:
            reply.problem("event_json", f"an event is no JSON: {text[:120]!r}")
            return
        if not isinstance(data, Mapping):
            reply.problem("event_json", f"an event is no JSON object: {text[:120]!r}")
            return
        if "error" in data:
            reply.problem("no_error_body", f"status 200, but an event is an error: {text[:160]!r}")
            return
        self._identity(reply, data)
        usage = Usage.read(data.get("usage"))
        if usage is not None:
            reply.usage = usage
        choices = data.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            if isinstance(choice, Mapping):
                self._take_choice(reply, choice, at, read)

    @staticmethod
    def _whole_characters(reply: Reply, text: str) -> Any:
        """Parsed JSON. Half a surrogate pair is valid in it, is no character, and can be neither sent nor stored."""
        data = json.loads(text)
        whole = mended(data)
        if whole != data:
            reply.problem("utf8_intact", "half of a surrogate pair: a character was cut in two")
        return whole

    @staticmethod
    def _identity(reply: Reply, data: Mapping[str, Any]) -> None:
        if isinstance(data.get("model"), str):
            reply.models.add(data["model"])
        if isinstance(data.get("id"), str):
            reply.ids.add(data["id"])

    @staticmethod
    def _take_choice(reply: Reply, choice: Mapping[str, Any], at: float, read: int) -> None:
        reply.last_chunk_s = at
        reason = choice.get("finish_reason")
        if isinstance(reason, str):
            reply.finish_reason = reason
        delta = choice.get("delta")
        if not isinstance(delta, Mapping):
            return
        reasoning = text_of(delta, "reasoning", "reasoning_content")
        content = text_of(delta, "content")
        tool = merge_tool_calls(reply, delta.get("tool_calls"))
        for kind, text in (("reasoning", reasoning), ("content", content), ("tool", tool)):
            if text:
                reply.events.append(TokenEvent(at, kind, text, read))
        reply.reasoning += reasoning
        reply.content += content
        if "\ufffd" in reasoning + content:
            reply.problem("utf8_intact", "the text holds U+FFFD: a character was broken on the way")
