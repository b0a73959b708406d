"""What a vLLM server says of itself at /metrics, in the Prometheus text format."""

from __future__ import annotations

import http.client
import math
import re
from dataclasses import dataclass, field

from .client import Client

_LINE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+([^\s]+)(?:\s+\d+)?$")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')

PROMPT = "vllm:prompt_tokens_total"
GENERATED = "vllm:generation_tokens_total"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"
# Seconds from the first token to the last of finished requests, as the engine saw them.
DECODE_TIME = "vllm:request_decode_time_seconds_sum"
CACHE_CONFIG = "vllm:cache_config_info"
# Newer servers count cached prompt tokens; older ones count the hits of the prefix cache, in tokens as well.
CACHED = ("vllm:prompt_tokens_cached_total", "vllm:prefix_cache_hits_total")


@dataclass
class Snapshot:
    """The values of one reading, summed over label sets; `labels` keeps those of the information series."""

    values: dict[str, float] = field(default_factory=dict)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)

    def get(self, *names: str) -> float | None:
        """The first of these series that exists."""
        return next((self.values[name] for name in names if name in self.values), None)

    def growth(self, earlier: Snapshot, *names: str) -> float | None:
        """How much a counter grew since an earlier reading.

        None when either does not have it, and when it shrank: then it began anew, and says nothing of the time before.
        """
        for name in names:
            if name in self.values and name in earlier.values:
                grown = self.values[name] - earlier.values[name]
                return grown if grown >= 0 else None
        return None

    def kv_tokens(self, block_size: int | None = None) -> int | None:
        """Tokens the KV cache holds: blocks times block size; an upper bound for models with several kinds of layer.

        Args:
            block_size: tokens a block; None: what the server states.
        """
        info = self.labels.get(CACHE_CONFIG, {})
        try:
            return int(info["num_gpu_blocks"]) * (block_size or int(info["block_size"]))
        except (KeyError, ValueError):
            return None


def parse_metrics(text: str) -> Snapshot:
    """Read the text format; lines that are none are left out."""
    snapshot = Snapshot()
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = _LINE.match(line.strip())
        if not match:
            continue
        name, labels, value = match.groups()
        try:
            number = float(value)
        except ValueError:
            continue
        if not math.isfinite(number):
            continue
        snapshot.values[name] = snapshot.values.get(name, 0.0) + number
        if name.endswith("_info"):
            snapshot.labels.setdefault(name, dict(_LABEL.findall(labels or "")))
    return snapshot


def read_metrics(client: Client, timeout: float = 10.0) -> Snapshot | None:
    """The endpoint's metrics, or None when it has none or they are not vLLM's."""
    try:
        status, body = client.exchange("GET", "/metrics", timeout=timeout)
    except (OSError, http.client.HTTPException):
        return None
    if status != 200:
        return None
    snapshot = parse_metrics(body.decode("utf-8", "replace"))
    return snapshot if PROMPT in snapshot.values else None
