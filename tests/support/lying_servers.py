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
import socket
import struct
import threading
import time
import unicodedata
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "Double"
ROOT = "/models/double"
CONTEXT = 4096
SPECIAL = {"<think>": 1, "</think>": 2}
# Seconds between two events, besides the time that the client takes to read the one before.
PACE_S = 0.003
# Seconds for a client that lives to read an event, on the busiest of machines.
READ_WITHIN_S = 120.0


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|\W", text)


def prompt_of(messages: list[dict[str, Any]]) -> str:
    return "\n".join(str(message.get("content") or "") for message in messages)


def tokens_of(messages: list[dict[str, Any]]) -> int:
    return 7 + 4 * len(messages) + len(tokens(prompt_of(messages)))


def unread(client: tuple[str, int]) -> int:
    """Bytes on their way to a client on this machine or in its socket's receive queue; 0 when it has gone.

    The kernel's table of sockets gives addresses as the bytes of memory and ports in network order, both in
    hexadecimal, and the queues as tx:rx (Documentation/networking/proc_net_tcp.rst).
    """
    host = socket.inet_aton(client[0])[::-1].hex().upper()
    address = f"{host}:{client[1]:04X}"
    count = 0
    with Path("/proc/net/tcp").open(encoding="ascii") as table:
        for row in table:
            _, local, remote, _, queues, *_ = row.split()
            sending, receiving = queues.partition(":")[::2]
            if local == address:
                count += int(receiving, 16)
            elif remote == address:
                count += int(sending, 16)
    return count


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
        wish = body.get("chat_template_kwargs", {}).get("thinking")
        return "I look for it." if wish in (None, True) else ""

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
            self.health()
        elif self.path == "/v1/models":
            self.send_json(200, self.models())
        elif self.path == "/version":
            self.send_json(200, {"version": "0.0-double"})
        elif self.path == "/metrics" and (text := self.metrics()) is not None:
            self.send_bytes(200, text.encode(), "text/plain")
        else:
            self.send_json(404, {"error": {"message": "not found"}})

    def health(self) -> None:
        self.send_bytes(200, b"", "text/plain")

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
        reason = self.reason(body, arguments)
        choice = {"index": 0, "message": message, "finish_reason": reason}
        self.send_json(200, {"id": "r", "model": MODEL, "choices": [choice], "usage": self.usage(body, completion)})

    def reason(self, body: dict[str, Any], arguments: str | None) -> str:
        """The finish reason of a reply with these arguments of a call."""
        return "stop" if arguments is None else "tool_calls"

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

    def pause(self) -> None:
        """Until the client has read what was sent, so that each event is a read of its own however busy the machine."""
        time.sleep(PACE_S)
        until = time.monotonic() + READ_WITHIN_S
        while unread(self.client_address) and time.monotonic() < until:
            time.sleep(PACE_S)

    def stream(self, body: dict[str, Any], pieces: list[tuple[str, str]], arguments: str | None) -> None:
        self.begin_stream()
        for kind, text in pieces:
            self.pause()
            self.count(1)
            self.piece(kind, text)
        self.pause()
        completion = len(pieces) + 1
        if arguments is not None:
            self.delta({"tool_calls": [{"index": 0, "id": "call-1", "function": {"name": "get_weather"}}]})
            for text in tokens(arguments):
                self.delta({"tool_calls": [{"index": 0, "function": {"arguments": text}}]})
            completion += 1 + len(tokens(arguments))
            self.count(1 + len(tokens(arguments)))
        self.count(1)
        self.finish(body, completion, self.reason(body, arguments))

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
        # Set when a prompt has been read; how many tenths of it have been, for a double that reads slowly.
        self.read = threading.Event()
        self.tenths = 0
        self.counters |= {"request_decode_time_seconds_sum": 0.0}
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


class NamesAllCodes(Honest):
    """Gives the right code among all others, so that whoever only looks for it is content."""

    def content(self, body: dict[str, Any]) -> str:
        codes = re.findall(r"vault in \w+ is ([A-Z0-9-]+)\.", prompt_of(body["messages"]))
        return ", ".join(codes) or super().content(body)


class IsUnwell(Honest):
    def health(self) -> None:
        self.send_bytes(503, b"", "text/plain")


class HangsUpWhenAskedForItsHealth(Honest):
    def health(self) -> None:
        self.close_connection = True


class DoesNotThink(Honest):
    """Takes the wish for thinking and does not think."""

    def reasoning(self, body: dict[str, Any]) -> str:
        return ""


class ThinksWhenAsked(Honest):
    """Thinks only where the request itself asks for it."""

    def reasoning(self, body: dict[str, Any]) -> str:
        return "I look." if body.get("chat_template_kwargs", {}).get("thinking") is True else ""


class WholeAnswersDiffer(Honest):
    """Another text, other thoughts, another end and another count where the answer is not streamed."""

    def whole(self, body: dict[str, Any], pieces: list[tuple[str, str]], arguments: str | None) -> None:
        super().whole(body, [("reasoning", "Hm."), ("content", "Well, well."), ("content", "...")], arguments)

    def reason(self, body: dict[str, Any], arguments: str | None) -> str:
        return "stop" if body.get("stream") else "length"


class ThinksInStreamsOnly(Honest):
    def whole(self, body: dict[str, Any], pieces: list[tuple[str, str]], arguments: str | None) -> None:
        super().whole(body, [piece for piece in pieces if piece[0] != "reasoning"], arguments)


class ThinksInOtherWords(Honest):
    """Not a lie: sums on a GPU may come out in another order, and a thought in other words from some token on."""

    def reasoning(self, body: dict[str, Any]) -> str:
        same = "The user wants a short answer, and there is only one that fits what the notes say, so I look for it. "
        return super().reasoning(body) and f"{same * 2}I look{' again' * next(self.server.serial)}."


class CountsWholeAnswersHigher(Honest):
    def usage(self, body: dict[str, Any], completion: int) -> dict[str, Any] | None:
        return super().usage(body, completion if body.get("stream") else completion + 1)


class PlaysTheAnswerBack(Honest):
    """Holds the answer back until it is whole, and then sends it token by token, as a proxy with a buffer may."""

    def stream(self, body: dict[str, Any], pieces: list[tuple[str, str]], arguments: str | None) -> None:
        self.server.counters["request_decode_time_seconds_sum"] += 600.0
        super().stream(body, pieces, arguments)


class DropsTheBeginning(Honest):
    """Reads the last 60 % of a prompt, and counts and states all of it."""

    def content(self, body: dict[str, Any]) -> str:
        read = tokens(prompt_of(body["messages"]))
        kept = "".join(read[len(read) * 4 // 10 :])
        return super().content({**body, "messages": [{"role": "user", "content": kept}]})


class SendsHalvesOfPairs(Honest):
    """A character beyond the first plane as two events, each with one half of its pair: valid JSON, no character."""

    def piece(self, kind: str, text: str) -> None:
        data = text.encode("utf-16-be")
        if len(data) != 4:
            super().piece(kind, text)
            return
        for half in (data[:2], data[2:]):
            event = b'data: {"id": "r", "model": "Double", "choices": [{"index": 0, "delta": {"%s": "\\u%s"}}]}\n\n'
            self.wfile.write(event % (kind.encode(), half.hex().encode()))


class RunsIntoTheLimit(Honest):
    def reason(self, body: dict[str, Any], arguments: str | None) -> str:
        return "length"


class DropsMarks(Honest):
    """Letters without what stands above them."""

    def content(self, body: dict[str, Any]) -> str:
        return "".join(letter for letter in super().content(body) if not unicodedata.combining(letter))


class KnowsAsciiOnly(Honest):
    def content(self, body: dict[str, Any]) -> str:
        return super().content(body).encode("ascii", "replace").decode()


class CallsNoTool(Honest):
    def tool_arguments(self, body: dict[str, Any]) -> str | None:
        return None


class CallsForAnotherCity(Honest):
    def tool_arguments(self, body: dict[str, Any]) -> str | None:
        arguments = super().tool_arguments(body)
        return None if arguments is None else '{"city": "London"}'


class EndsACallAsAnAnswer(Honest):
    def reason(self, body: dict[str, Any], arguments: str | None) -> str:
        return "stop"


class CountsCallsFromMinusOne(Honest):
    """An index that Python takes for the last call."""

    def delta(self, delta: dict[str, Any], reason: str | None = None) -> None:
        calls = [{**call, "index": -1} for call in delta.get("tool_calls", [])]
        super().delta({**delta, "tool_calls": calls} if calls else delta, reason)


class CountsCallsFromTheSky(CountsCallsFromMinusOne):
    """An index that asks for a list of a thousand million calls."""

    def delta(self, delta: dict[str, Any], reason: str | None = None) -> None:
        calls = [{**call, "index": 10**9} for call in delta.get("tool_calls", [])]
        Honest.delta(self, {**delta, "tool_calls": calls} if calls else delta, reason)


class ForgetsTheToolResult(Honest):
    def content(self, body: dict[str, Any]) -> str:
        return "It is mild." if body["messages"][-1]["role"] == "tool" else super().content(body)


class CannotMultiply(Honest):
    def content(self, body: dict[str, Any]) -> str:
        return "41" if "7 times 6" in prompt_of(body["messages"]) else super().content(body)


class StatesNoContext(Honest):
    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "root": self.root, "owned_by": "double"}]}


class RefusesInHtml(Honest):
    """The page of a proxy instead of the API's error."""

    def send_json(self, status: int, data: Any) -> None:
        if status == 400:
            self.send_bytes(400, b"<html><body><h1>400 Bad Request</h1></body></html>", "text/html")
        else:
            super().send_json(status, data)


class RefusesAtLength(Honest):
    """Not a lie: an error that repeats a good part of what was sent."""

    def send_json(self, status: int, data: Any) -> None:
        if status == 400:
            data["error"]["message"] += " Input: " + "7 " * 3000
        super().send_json(status, data)


class HidesWhatRuns(GoesOnAfterACancellation):
    """The gauge says that nothing runs, and tokens are made all the same: one for each look at the least."""

    def metrics(self) -> str | None:
        self.count(1)
        return re.sub(r"(num_requests_running\S*) \S+", r"\1 0", str(super().metrics()))


class CountsInSteps(Honest):
    """A tokenizer that counts in pairs; with what the calibration adds, no prompt has an even number of tokens."""

    def tokenize(self, body: dict[str, Any]) -> None:
        if "messages" in body:
            self.send_json(200, {"count": tokens_of(body["messages"]) // 2 * 2})
        else:
            super().tokenize(body)


class TokenizerStopsAnswering(Honest):
    def tokenize(self, body: dict[str, Any]) -> None:
        if next(self.server.serial) < 3:
            super().tokenize(body)
        else:
            self.send_json(500, {"error": {"message": "no more"}})


class ListsModelsThatAreNone(Honest):
    """Not a lie about the model, but nothing that a program should trip over."""

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": ["Double", None, *super().models()["data"]]}


class ListsModelsAsADeepHole(Honest):
    """JSON that is nested deeper than a parser goes."""

    def do_GET(self) -> None:
        self.send_bytes(200, b"[" * 200_000, "application/json")


class ResetsTheConnection(Honest):
    """Ends in the middle of a chunk and with a reset, as a process that is killed does."""

    def stream(self, body: dict[str, Any], pieces: list[tuple[str, str]], arguments: str | None) -> None:
        self.begin_stream()
        for kind, text in pieces[:4]:
            self.piece(kind, text)
        # A reset throws away what has not been read.
        self.pause()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class StopsInsideAChunk(Honest):
    """Says that a chunk of 4096 bytes follows, and hangs up."""

    def stream(self, body: dict[str, Any], pieces: list[tuple[str, str]], arguments: str | None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"1000\r\ndata: ")
        self.close_connection = True


class NeverStreams(Honest):
    def stream(self, body: dict[str, Any], pieces: list[tuple[str, str]], arguments: str | None) -> None:
        self.whole(body, pieces, arguments)


class WritesALogIntoTheStream(Honest):
    def begin_stream(self) -> None:
        super().begin_stream()
        self.wfile.write(b"INFO: request r started\n")


class CutsAnEvent(Honest):
    def piece(self, kind: str, text: str) -> None:
        self.wfile.write(b'data: {"id": "r", "choices": [{"index": 0, "del\n\n')


class AnswersInHtml(Honest):
    """The sign-in page of a proxy, with status 200."""

    def chat(self, body: dict[str, Any]) -> None:
        self.send_bytes(200, b"<html><body>Please sign in.</body></html>", "text/html")


class FailsInside(Honest):
    def chat(self, body: dict[str, Any]) -> None:
        self.send_json(500, {"error": {"message": "EngineDeadError", "code": 500}})


class MixesTwoReplies(Honest):
    def event(self, data: Any) -> None:
        super().event({**data, "id": f"r{next(self.server.serial) % 2}"})


class ForgetsTheUsage(Honest):
    """States it once, for the request that asks whether it does."""

    def usage(self, body: dict[str, Any], completion: int) -> dict[str, Any] | None:
        return super().usage(body, completion) if next(self.server.serial) == 0 else None


class AddsUpWrongly(Honest):
    def usage(self, body: dict[str, Any], completion: int) -> dict[str, Any] | None:
        found = super().usage(body, completion)
        assert found is not None
        return {**found, "total_tokens": found["total_tokens"] + 1}


class StatesOneToken(Honest):
    def usage(self, body: dict[str, Any], completion: int) -> dict[str, Any] | None:
        return super().usage(body, 1)


class CountsNoCachedTokens(Honest):
    """Has metrics, and none of them tells what came from the prefix cache."""

    hidden = "prompt_tokens_cached_total"

    def metrics(self) -> str | None:
        return "".join(line for line in str(super().metrics()).splitlines(True) if self.hidden not in line)


class CountsNoGeneratedTokens(CountsNoCachedTokens):
    hidden = "generation_tokens_total"


class StartsItsCountersAnew(Honest):
    """The counters go back to zero during a request, as at a restart of the engine."""

    def cached(self, prompt: int) -> int:
        return -5000 if prompt > 500 else 0


# --------------------------------------------------------------------------------------------------- no lies, but gaps


class StatesCachedTokensInTheUsage(CountsNoCachedTokens):
    """No counter for cached tokens, but every reply says how many there were."""

    def usage(self, body: dict[str, Any], completion: int) -> dict[str, Any] | None:
        found = super().usage(body, completion)
        assert found is not None
        return {**found, "prompt_tokens_details": {"cached_tokens": 0}}


class ReadsSlowly(Honest):
    """Reads a tenth of a long prompt at each look at its metrics; its KV cache has room for 4096 tokens."""

    blocks, stated_size = 256, 16
    prompt = 2000

    def used(self, tenths: int) -> float:
        """Share of the KV cache that is taken when so many tenths of the prompt have been read."""
        return tenths / 10 * self.prompt / (self.blocks * self.stated_size)

    def chat(self, body: dict[str, Any]) -> None:
        if tokens_of(body["messages"]) >= self.prompt:
            self.server.tenths = 1
            self.server.read.wait(READ_WITHIN_S)
        super().chat(body)
        self.server.tenths = 0

    def metrics(self) -> str | None:
        tenths = self.server.tenths
        self.server.counters["kv_cache_usage_perc"] = round(self.used(tenths), 6) if tenths else 0.0
        if tenths == 10:
            self.server.read.set()
        elif tenths:
            self.server.tenths += 1
        size = f'vllm:cache_config_info{{block_size="{self.stated_size}",num_gpu_blocks="{self.blocks}"}} 1.0\n'
        return str(super().metrics()) + size


class ReadsAsDeepSeek(ReadsSlowly):
    """Several kinds of cache: the smallest block is stated, windows are full at once, then a block takes 256 tokens."""

    blocks, stated_size = 14_292, 4

    def used(self, tenths: int) -> float:
        return (3000 + tenths / 10 * self.prompt / 256) / self.blocks


class ServesOthers(Honest):
    """Has a request of another client."""

    def metrics(self) -> str | None:
        return re.sub(r"(num_requests_running\S*) \S+", r"\1 1", str(super().metrics()))


class SaysNotANumber(Honest):
    """Gauges that hold no number, as Prometheus allows."""

    def metrics(self) -> str | None:
        return str(super().metrics()) + 'vllm:prompt_tokens_cached_total{engine="1"} NaN\n'


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
