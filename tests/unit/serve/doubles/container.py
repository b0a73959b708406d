"""A double of the model container: prints a load's log, then speaks enough of vLLM's HTTP for the supervisor.

First argument, JSON: {"log": [lines], "exit": status after the log, "never_ready": true, "answers": false,
"stubborn": true (ignores SIGTERM), "busy": true (a request always runs), "wedged": true (and nothing moves),
"prefilling": true (a prompt is read: only the KV cache in use moves), "deaf": true (answers one request;
then shows no request, moves nothing and never answers), "starved": n (its first n answers after the door is shut
do not come)}.
The rest is the command line of the server; --port and --served-model-name are read from it.
"""

import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

behaviour = json.loads(sys.argv[1])
arguments = sys.argv[2:]
port = int(arguments[arguments.index("--port") + 1])
model = arguments[arguments.index("--served-model-name") + 1]
key = os.environ.get("VLLM_API_KEY")
moved = [0]
looked = [0]
asked = [0]
starved = [behaviour.get("starved", 0)]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        shut = Path(os.environ.get("DOUBLE_GATE", "/opt/reap-gate"), "shut").exists()
        if shut and starved[0]:
            starved[0] -= 1
            threading.Event().wait()
        if self.path == "/metrics":
            moved[0] += 0 if behaviour.get("wedged") or behaviour.get("deaf") or not behaviour.get("busy") else 1
            looked[0] += 1 if behaviour.get("prefilling") else 0
            busy = 1 if behaviour.keys() & {"busy", "wedged", "prefilling"} else 0
            self.reply(200, f"vllm:num_requests_running{{e=\"0\"}} {busy}.0\n"
                       f"vllm:kv_cache_usage_perc{{e=\"0\"}} {looked[0] / 1000}\n"
                       f"vllm:generation_tokens_total{{e=\"0\"}} {moved[0]}.0\n")  # fmt: skip
        elif shut:
            self.reply(503, json.dumps({"requests_inside": 7 if behaviour.get("busy") else 0}))
        elif self.path == "/v1/models":
            self.guarded({"data": [{"id": model}]})
        else:
            self.reply(200, "")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        asked[0] += 1
        if behaviour.get("deaf") and asked[0] > 1:
            threading.Event().wait()
        moved[0] += 8
        tokens = 0 if behaviour.get("answers") is False else 8
        self.guarded({"choices": [{"message": {"content": None}}], "usage": {"completion_tokens": tokens}})
        with Path(os.environ["DOUBLE_DOCKER_DIR"], "answered").open("a") as answered:
            answered.write("x")

    def guarded(self, data: object) -> None:
        allowed = key is None or self.headers.get("Authorization") == f"Bearer {key}"
        self.reply(200 if allowed else 401, json.dumps(data if allowed else {"error": "Unauthorized"}))

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        return


for line in behaviour.get("log", []):
    print(line, flush=True)
if behaviour.get("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "exit" in behaviour:
    sys.exit(behaviour["exit"])
if behaviour.get("never_ready"):
    threading.Event().wait()
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
