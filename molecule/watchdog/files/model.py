#!/usr/bin/env python3
"""A double of the model server: answers what `reap serve` asks, and a streamed request goes on until it is ended."""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LOAD_S = 8.0
port = int(sys.argv[sys.argv.index("--port") + 1])
model = sys.argv[sys.argv.index("--served-model-name") + 1]
numbers = {"num_requests_running": 0, "generation_tokens_total": 0}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.reply("".join(f'vllm:{name}{{e="0"}} {value}.0\n' for name, value in numbers.items()))
        else:
            self.reply(json.dumps({"data": [{"id": model}]}))

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        numbers["generation_tokens_total"] += 8
        if not request.get("stream"):
            choice = {"message": {"content": "x"}}
            self.reply(json.dumps({"choices": [choice], "usage": {"completion_tokens": 8}}))
            return
        self.send_response(200)
        self.end_headers()
        numbers["num_requests_running"] += 1
        try:
            while True:
                numbers["generation_tokens_total"] += 1
                self.wfile.write(b"data: {}\n\n")
                time.sleep(0.1)
        finally:
            numbers["num_requests_running"] -= 1

    def reply(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        return


time.sleep(LOAD_S)
print("model double: listening", flush=True)
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
