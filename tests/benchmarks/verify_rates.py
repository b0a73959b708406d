"""Does `reap verify` measure what `vllm bench serve` measures?

    python3 tests/benchmarks/verify_rates.py --endpoint URL --model NAME --tokenizer DIR --vllm PROGRAM [--requests N]

Both measure the very same requests: vLLM's benchmark sends them to a relay in this process, which asks the server with
the client of the verification and passes on what it reads, piece by piece. So nothing that the machine does meanwhile
tells the two apart. The relay's own few milliseconds are in their TTFT, so the prompt is long. Prints both sets of
figures and their ratios; exits 1 when a median differs by more than 5 %. `make bench-rates` runs it on the demo's
Spark.

The verification takes the prompt's length from the usage that the server states, chat template included; vLLM's
benchmark takes what its own tokenizer counts of the text. Both lengths are compared, and the rates that follow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "plugins" / "module_utils"))
from reap.verify.client import Client, Reply
from reap.verify.measure import Rates, rates

LIMIT = 0.05


class Passing:
    """A response whose reader passes on what it reads."""

    def __init__(self, response: HTTPResponse, onward: BinaryIO) -> None:
        self._response, self._onward = response, onward

    def read1(self, most: int) -> bytes:
        data = self._response.read1(most)
        self._onward.write(data)
        self._onward.flush()
        return data


class PassingClient(Client):
    """The verification's client; only the source of its bytes is wrapped."""

    onward: BinaryIO

    def _read_stream(self, reply: Reply, response: Any, *rest: Any) -> None:
        super()._read_stream(reply, Passing(response, self.onward), *rest)  # type: ignore[arg-type]


class Relay(BaseHTTPRequestHandler):
    """Answers vLLM's benchmark."""

    endpoint = ""
    model = ""
    measured: list[Rates] = []  # noqa: RUF012

    def log_message(self, *_args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        status, data = Client(self.endpoint, self.model).exchange("GET", self.path)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("/chat/completions"):
            status, data = Client(self.endpoint, self.model).exchange("POST", self.path, body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        client = PassingClient(self.endpoint, self.model)
        client.onward = self.wfile  # type: ignore[assignment]
        most = body.get("max_completion_tokens") or body.get("max_tokens")
        found = rates(client.chat(body["messages"], max_tokens=most, extra=body))
        if found is not None:
            self.measured.append(found)


def bench(args: argparse.Namespace, url: str) -> dict[str, Any]:
    """The result file of `vllm bench serve` with the random dataset, one request at a time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            args.vllm, "bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
            "--base-url", url, "--model", args.model, "--tokenizer", args.tokenizer,
            "--dataset-name", "random", "--random-input-len", str(args.tokens),
            "--random-output-len", str(args.answer), "--num-prompts", str(args.requests), "--max-concurrency", "1",
            "--ignore-eos", "--temperature", "0", "--seed", str(int(time.time())),
            "--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "result.json",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(done.stderr[-2000:])
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
        return result


def main() -> int:
    """Returns 1 when a median differs by more than 5 %."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--endpoint", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", required=True, help="folder of the checkpoint")
    parser.add_argument("--vllm", default="vllm", help="the vllm program")
    parser.add_argument("--tokens", type=int, default=16000, help="prompt tokens, without the chat template")
    parser.add_argument("--answer", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--requests", type=int, default=6)
    args = parser.parse_args()
    Relay.endpoint, Relay.model = args.endpoint, args.model
    relay = ThreadingHTTPServer(("127.0.0.1", 0), Relay)
    threading.Thread(target=relay.serve_forever, daemon=True).start()
    result = bench(args, f"http://127.0.0.1:{relay.server_address[1]}")
    relay.shutdown()
    # The benchmark asks once before it begins to count.
    mine = Relay.measured[-args.requests :]
    lengths, waits = result["input_lens"][-args.requests :], result["ttfts"][-args.requests :]
    rows = [
        ("prompt tokens", median(item.prompt_tokens for item in mine), median(lengths)),
        ("TTFT, ms", median(1000 * item.ttft_s for item in mine), result["median_ttft_ms"]),
        (
            "prefill, tokens/s",
            median(item.prefill_tok_s for item in mine),
            median(length / wait for length, wait in zip(lengths, waits, strict=True)),
        ),
        (
            "time per output token, ms",
            median(1000 / item.decode_tok_s for item in mine if item.decode_tok_s),
            result["median_tpot_ms"],
        ),
        (
            "decode, tokens/s",
            median(item.decode_tok_s for item in mine if item.decode_tok_s),
            1000 / result["median_tpot_ms"],
        ),
    ]
    print(f"{len(mine)} requests with answers of {args.answer} tokens, one at a time")
    print(f"{'medians':<28}{'reap verify':>14}{'vllm bench':>14}{'ratio':>9}")
    worst = 0.0
    for name, value, other in rows:
        worst = max(worst, abs(value / other - 1))
        print(f"{name:<28}{value:>14,.2f}{other:>14,.2f}{value / other:>9.3f}")
    print(f"largest difference {worst:.1%}, limit {LIMIT:.0%}")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
