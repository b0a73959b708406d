"""Doubles of an inference server: one that is honest, and one for each way of lying.

They hold no model. A token is a word or a single other character; the honest double finds codes by pattern. Each lie
changes one thing, so that the check which catches it is the one that is named for it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "Double"
ROOT = "/models/double"
CONTEXT = 4096
SPECIAL = {"<think>": 1, "</think>": 2}
# Seconds between two events: enough that each is a read of its own.
PACE_S = 0.003


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|\W", text)


def prompt_of(messages: list[dict[str, Any]]) -> str:
    return "\n".join(str(message.get("content") or "") for message in messages)


def tokens_of(messages: list[dict[str, Any]]) -> int:
    return 7 + 4 * len(messages) + len(tokens(prompt_of(messages)))


class Honest(BaseHTTPRequestHandler):
    """Keeps every promise of the API that the verification asks for."""

    protocol_version = "HTTP/1.1"
    server: DoubleServer
    served_length = CONTEXT
    root = ROOT
    special = SPECIAL
    stream_done = 1

    def log_message(self, *_args: object) -> None:
        """Quiet."""

    # ------------------------------------------------------------------ answers

    def reasoning(self, body: dict[str, Any]) -> str:
        return "I look for it."

    def content(self, body: dict[str, Any]) -> str:
        text = prompt_of(body["messages"])
        vault = re.search(r"vault in (\w+)\?", text)
        if vault:
            found = re.search(rf"vault in {vault[1]} is ([A-Z0-9-]+)\.", text)
            return found[1] if found else "I do not know."
        code = re.search(r"secret code is (.+?)\.(?:\s|$)", text)
        if code:
            return code[1]
        if body["messages"][-1]["role"] == "tool":
            return f"It is {body['messages'][-1]['content']}."
        if "7 times 6" in text:
            return "42"
        if "Count from" in text:
            return " ".join(str(number) for number in range(1, 5001))
        seed = body.get("seed", 0) if body.get("temperature", 1) > 0 else 0
        return random.Random(seed).choice(["Ora", "Bel", "Tir", "Kem"]) + str(seed)

    def tool_arguments(self, body: dict[str, Any]) -> str | None:
        """Arguments of a call of get_weather, or None for no call."""
        asked = body.get("tools") and "weather in Paris" in prompt_of(body["messages"])
        return '{"city": "Paris"}' if asked and body["messages"][-1]["role"] == "user" else None

    def usage(self, body: dict[str, Any], completion: int) -> dict[str, Any] | None:
        prompt = tokens_of(body["messages"])
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def cached(self, prompt: int) -> int:
        return 0

    def models(self) -> dict[str, Any]:
        item = {"id": MODEL, "root": self.root, "max_model_len": self.served_length, "owned_by": "double"}
        return {"object": "list", "data": [item]}

    def metrics(self) -> str | None:
        counters = self.server.counters
        return "".join(f'vllm:{name}{{engine="0"}} {value}\n' for name, value in sorted(counters.items()))

    # ------------------------------------------------------------------ transport

    def send_json(self, status: int, data: Any) -> None:
        self.send_bytes(status, json.dumps(data, ensure_ascii=False).encode(), "application/json")

    def send_bytes(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.send_bytes(200, b"", "text/plain")
        elif self.path == "/v1/models":
            self.send_json(200, self.models())
        elif self.path == "/version":
            self.send_json(200, {"version": "0.0-double"})
        elif self.path == "/metrics" and self.metrics() is not None:
            self.send_bytes(200, str(self.metrics()).encode(), "text/plain")
        else:
            self.send_json(404, {"error": {"message": "not found"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.tokenize(body)
        elif self.path == "/v1/chat/completions":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.chat(body)
        else:
            self.send_json(404, {"error": {"message": "not found"}})

    def tokenize(self, body: dict[str, Any]) -> None:
        if "messages" in body:
            self.send_json(200, {"count": tokens_of(body["messages"])})
        else:
            self.send_json(200, {"tokens": [self.special.get(body["prompt"], 9)], "count": 1})

    def chat(self, body: dict[str, Any]) -> None:
        prompt = tokens_of(body["messages"])
        if prompt > CONTEXT:
            message = f"This model's maximum context length is {CONTEXT} tokens; the prompt has {prompt}."
            self.send_json(400, {"error": {"message": message, "type": "BadRequestError", "code": 400}})
            return
        arguments = self.tool_arguments(body)
        pieces = [("reasoning", piece) for piece in tokens(self.reasoning(body))]
        if arguments is None:
            pieces += [("content", piece) for piece in tokens(self.content(body))]
        counters = self.server.counters
        counters["num_requests_running"] = 1
        counters["prompt_tokens_total"] += prompt
        counters["prompt_tokens_cached_total"] += self.cached(prompt)
        try:
            if body.get("stream"):
                self.stream(body, pieces, arguments)
            else:
                self.whole(body, pieces, arguments)
        finally:
            counters["num_requests_running"] = 0

    def count(self, number: int) -> None:
        self.server.counters["generation_tokens_total"] += number

    def whole(self, body: dict[str, Any], pieces: list[tuple[str, str]], arguments: str | None) -> None:
        message: dict[str, Any] = {"role": "assistant", "content": None, "reasoning": None}
        for kind in ("reasoning", "content"):
            message[kind] = "".join(text for name, text in pieces if name == kind) or None
        completion = len(pieces) + 1
        if arguments is not None:
            message["tool_calls"] = [
                {"id": "call-1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
            ]
            completion += len(tokens(arguments))
        self.count(completion)
        reason = "stop" if arguments is None else "tool_calls"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        self.send_json(200, {"id": "r", "model": MODEL, "choices": [choice], "usage": self.usage(body, completion)})

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def event(self, data: Any) -> None:
        self.wfile.write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode())
        self.wfile.flush()

    def delta(self, delta: dict[str, Any], reason: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        self.event({"id": "r", "model": MODEL, "choices": [choice]})

    def piece(self, kind: str, text: str) -> None:
        self.delta({kind: text})

    def stream(self, body: dict[str, Any], pieces: list[tuple[str, str]], arguments: str | None) -> None:
        self.begin_stream()
        for kind, text in pieces:
            time.sleep(PACE_S)
            self.count(1)
            self.piece(kind, text)
        completion = len(pieces) + 1
        if arguments is not None:
            self.delta({"tool_calls": [{"index": 0, "id": "call-1", "function": {"name": "get_weather"}}]})
            for text in tokens(arguments):
                self.delta({"tool_calls": [{"index": 0, "function": {"arguments": text}}]})
            completion += 1 + len(tokens(arguments))
            self.count(1 + len(tokens(arguments)))
        self.count(1)
        self.finish(body, completion, "stop" if arguments is None else "tool_calls")

    def finish(self, body: dict[str, Any], completion: int, reason: str) -> None:
        self.delta({}, reason)
        usage = self.usage(body, completion)
        if usage is not None:
            self.event({"id": "r", "model": MODEL, "choices": [], "usage": usage})
        for _ in range(self.stream_done):
            self.wfile.write(b"data: [DONE]\n\n")


class DoubleServer(ThreadingHTTPServer):
    """A double on a free port of the loopback address."""

    daemon_threads = True

    def __init__(self, handler: type[Honest]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        names = ("prompt_tokens_total", "generation_tokens_total", "prompt_tokens_cached_total")
        self.counters: dict[str, float] = dict.fromkeys(names, 0)
        # Set at the end: what a double holds back then goes on. Numbers for a double that never says the same twice.
        self.released = threading.Event()
        self.serial = itertools.count()
        self.counters |= {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0.0}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_args: Any) -> None:
        """A client that goes away is part of the tests."""


@contextlib.contextmanager
def serving(handler: type[Honest]) -> Iterator[DoubleServer]:
    """The double while the block runs."""
    server = DoubleServer(handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


# --------------------------------------------------------------------------------------------------- lies


class EchoesThePrompt(Honest):
    def content(self, body: dict[str, Any]) -> str:
        return prompt_of(body["messages"])


class AnswersInTheReasoningOnly(Honest):
    def reasoning(self, body: dict[str, Any]) -> str:
        return super().content(body)

    def content(self, body: dict[str, Any]) -> str:
        return ""


class AlwaysTheSameCode(Honest):
    def content(self, body: dict[str, Any]) -> str:
        return "ABCD-EFGH-JKLM"


class TruncatesTheContext(Honest):
    """Keeps the last 600 tokens and says so in the usage only."""

    def content(self, body: dict[str, Any]) -> str:
        kept = "".join(tokens(prompt_of(body["messages"]))[-600:])
        return super().content({**body, "messages": [{"role": "user", "content": kept}]})

    def usage(self, body: dict[str, Any], completion: int) -> dict[str, Any] | None:
        prompt = min(600, tokens_of(body["messages"]))
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class StatesTooManyTokens(Honest):
    """Twice the completion tokens make the decode rate look twice as high."""

    def usage(self, body: dict[str, Any], completion: int) -> dict[str, Any] | None:
        return super().usage(body, 2 * completion)


class StatesADifferentPromptLength(Honest):
    def usage(self, body: dict[str, Any], completion: int) -> dict[str, Any] | None:
        prompt = 2 * tokens_of(body["messages"])
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class StreamsOneChunkAtTheEnd(Honest):
    def stream(self, body: dict[str, Any], pieces: list[tuple[str, str]], arguments: str | None) -> None:
        self.begin_stream()
        self.count(len(pieces) + 1)
        for kind in ("reasoning", "content"):
            self.piece(kind, "".join(text for name, text in pieces if name == kind))
        self.finish(body, len(pieces) + 1, "stop")


class StreamsABurstAtTheEnd(Honest):
    """Every token has its event, and all leave the server in one write."""

    def stream(self, body: dict[str, Any], pieces: list[tuple[str, str]], arguments: str | None) -> None:
        self.begin_stream()
        self.count(len(pieces) + 1)
        burst = b""
        for kind, text in pieces:
            choice = {"index": 0, "delta": {kind: text}, "finish_reason": None}
            data = {"id": "r", "model": MODEL, "choices": [choice]}
            burst += f"data: {json.dumps(data)}\n\n".encode()
        self.wfile.write(burst)
        self.finish(body, len(pieces) + 1, "stop")


class CutsCharactersBetweenEvents(Honest):
    """Decodes each byte by itself, as a server that does not hold back unfinished characters."""

    def piece(self, kind: str, text: str) -> None:
        data = text.encode()
        if len(data) == len(text):
            super().piece(kind, text)
            return
        for byte in data:
            super().piece(kind, bytes([byte]).decode("utf-8", "replace"))


class SendsHalfCharacters(Honest):
    """Sends the bytes of a character in two events."""

    def piece(self, kind: str, text: str) -> None:
        data = text.encode()
        if len(data) == len(text):
            super().piece(kind, text)
            return
        for half in (data[:1], data[1:]):
            event = b'data: {"id": "r", "model": "Double", "choices": [{"index": 0, "delta": {"%s": "%s"}}]}\n\n'
            self.wfile.write(event % (kind.encode(), half))


class SaysDoneTwice(Honest):
    stream_done = 2


class NeverSaysDone(Honest):
    stream_done = 0


class ErrorBodyWithStatus200(Honest):
    def chat(self, body: dict[str, Any]) -> None:
        self.send_json(200, {"error": {"message": "CUDA out of memory", "code": 500}})


class ErrorEventInTheStream(Honest):
    def finish(self, body: dict[str, Any], completion: int, reason: str) -> None:
        self.event({"error": {"message": "EngineDeadError", "code": 500}})
        self.wfile.write(b"data: [DONE]\n\n")


class HangsAfterTheFirstToken(Honest):
    def piece(self, kind: str, text: str) -> None:
        super().piece(kind, text)
        self.server.released.wait(20)


class ToolCallWithInvalidJson(Honest):
    def tool_arguments(self, body: dict[str, Any]) -> str | None:
        arguments = super().tool_arguments(body)
        return None if arguments is None else '{"city": Paris'


class ToolCallWithAnotherSchema(Honest):
    def tool_arguments(self, body: dict[str, Any]) -> str | None:
        arguments = super().tool_arguments(body)
        return None if arguments is None else '{"location": "Paris"}'


class CallsAToolForEverything(Honest):
    def tool_arguments(self, body: dict[str, Any]) -> str | None:
        return '{"city": "Paris"}' if body.get("tools") else None


class SamplesAtTemperatureZero(Honest):
    def content(self, body: dict[str, Any]) -> str:
        return f"{super().content(body)} {next(self.server.serial)}"


class GreedyAtAnyTemperature(Honest):
    def content(self, body: dict[str, Any]) -> str:
        return super().content({**body, "temperature": 0, "seed": 0})


class AnotherModelUnderTheName(Honest):
    special = {"<think>": 128799, "</think>": 128800}  # noqa: RUF012


class ShorterContextUnderTheName(Honest):
    served_length = 2048


class AnotherPathUnderTheName(Honest):
    root = "/models/other"


class AnswersUnderAnotherName(Honest):
    def event(self, data: Any) -> None:
        super().event({**data, "model": "Other"})


class DropsTheConnectionAt90Percent(Honest):
    def stream(self, body: dict[str, Any], pieces: list[tuple[str, str]], arguments: str | None) -> None:
        self.begin_stream()
        for kind, text in pieces[: max(1, len(pieces) * 9 // 10)]:
            self.piece(kind, text)


class AnswersFromThePrefixCache(Honest):
    def cached(self, prompt: int) -> int:
        return prompt - 16 if prompt > 500 else 0


class GoesOnAfterACancellation(Honest):
    """Does not notice that the client went away."""

    def stream(self, body: dict[str, Any], pieces: list[tuple[str, str]], arguments: str | None) -> None:
        try:
            super().stream(body, pieces, arguments)
        except OSError:
            while not self.server.released.wait(0.05):
                self.count(1)


class AcceptsAnyLength(Honest):
    """Takes a prompt over the context and answers as if it had read it."""

    def chat(self, body: dict[str, Any]) -> None:
        if tokens_of(body["messages"]) > CONTEXT:
            body = {**body, "messages": [{"role": "user", "content": "short"}]}
        super().chat(body)


class MixesUpTheNeedles(Honest):
    def content(self, body: dict[str, Any]) -> str:
        text = prompt_of(body["messages"])
        vault = re.search(r"vault in (\w+)\?", text)
        if vault:
            found = re.search(rf"vault in (?!{vault[1]})\w+ is ([A-Z0-9-]+)\.", text)
            return found[1] if found else ""
        return super().content(body)


# --------------------------------------------------------------------------------------------------- no lies, but gaps


class WithoutUsage(Honest):
    def usage(self, body: dict[str, Any], completion: int) -> dict[str, Any] | None:
        return None


class WithoutMetrics(Honest):
    def metrics(self) -> str | None:
        return None


class WithoutTokenizer(Honest):
    def tokenize(self, body: dict[str, Any]) -> None:
        self.send_json(404, {"error": {"message": "not found"}})


class WantsAKey(Honest):
    def do_GET(self) -> None:
        if self.path.startswith("/v1") and self.headers.get("Authorization") != "Bearer right":
            self.send_json(401, {"error": {"message": "Unauthorized"}})
        else:
            super().do_GET()
