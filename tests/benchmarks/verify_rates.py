"""Does `reap verify` measure what `vllm bench serve` measures? The same server and lengths, one request at a time.

    python3 tests/benchmarks/verify_rates.py --endpoint URL --model NAME --tokenizer DIR --vllm PROGRAM [--runs N]

Run it where vLLM is installed, on an idle machine: rates of two runs differ by whatever else runs. Prints both sets of
figures and their ratios; exits 1 when a median differs by more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "plugins" / "module_utils"))
from reap.verify.client import Client
from reap.verify.measure import rates
from reap.verify.needle import Needle
from reap.verify.session import Session
from reap.verify.settings import Settings

LIMIT = 0.05


def ours(args: argparse.Namespace) -> list[dict[str, float]]:
    """TTFT (s) and time per output token (ms) of requests as the verification sends and measures them."""
    client = Client(args.endpoint, args.model)
    settings = Settings(endpoint=args.endpoint, model=args.model)
    session = Session(settings, client, f"bench-{args.seed}")
    session.has_tokenizer = True
    figures = []
    for number in range(args.runs + 1):
        prompt = session.long_prompt(args.tokens, [Needle("Nothing is hidden here.", 0.5)], "Go on.")
        reply = client.chat(prompt.messages, max_tokens=args.answer, extra={"ignore_eos": True})
        found = rates(reply)
        if found is None or found.decode_tok_s is None:
            raise SystemExit(f"nothing to measure: {reply.problems or reply.body}")
        # The first one warms up.
        if number:
            figures.append({"ttft_ms": 1000 * found.ttft_s, "tpot_ms": 1000 / found.decode_tok_s})
    return figures


def theirs(args: argparse.Namespace) -> dict[str, Any]:
    """The result file of `vllm bench serve` with the random dataset, one request at a time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            args.vllm, "bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
            "--base-url", args.endpoint, "--model", args.model, "--tokenizer", args.tokenizer,
            "--dataset-name", "random", "--random-input-len", str(args.tokens - args.template),
            "--random-output-len", str(args.answer), "--num-prompts", str(args.runs), "--max-concurrency", "1",
            "--ignore-eos", "--temperature", "0", "--seed", str(args.seed), "--num-warmups", "1",
            "--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "result.json",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--endpoint", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", required=True, help="folder of the checkpoint")
    parser.add_argument("--vllm", default="vllm", help="the vllm program")
    parser.add_argument("--tokens", type=int, default=4000, help="prompt tokens")
    parser.add_argument("--template", type=int, default=0, help="tokens the chat template adds")
    parser.add_argument("--answer", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--runs", type=int, default=5, help="requests of each in a round")
    parser.add_argument("--rounds", type=int, default=3)
    # A new one each time: the prompts of an earlier run are in the prefix cache.
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    # In turns, so that whatever else the machine does meets both.
    results, mine = [], []
    for number in range(args.rounds):
        args.seed += number
        results.append(theirs(args))
        mine += ours(args)
    # Every figure of theirs is of one request, as ours: so that medians are compared with medians.
    prompt = median(length for result in results for length in result["input_lens"])
    medians = {name: median(result[f"median_{name}"] for result in results) for name in ("ttft_ms", "tpot_ms")}
    worst = 0.0
    print(
        f"{args.rounds * args.runs} requests each, in turns, one at a time; "
        f"prompt {args.tokens} (theirs {prompt:g}), answer {args.answer} tokens"
    )
    print(f"{'':<28}{'reap verify':>14}{'vllm bench':>14}{'ratio':>9}")
    for name, other in medians.items():
        value = median(item[name] for item in mine)
        worst = max(worst, abs(value / other - 1))
        print(f"{name.removesuffix('_ms').upper() + ', ms':<28}{value:>14.2f}{other:>14.2f}{value / other:>9.3f}")
    print(f"largest difference {worst:.1%}, limit {LIMIT:.0%}")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
