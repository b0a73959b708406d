"""What the supervisor asks of the model's server: is it there, does it answer, is it busy, does it move."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

_METRIC = re.compile(
    r"^vllm:(num_requests_running|num_requests_waiting|generation_tokens_total|prompt_tokens_total|kv_cache_usage_perc)"
    r"(?:\{[^}]*\})? ([0-9.eE+-]+)$",
    re.MULTILINE,
)
# Never through a proxy that the environment names: the endpoint is on this host.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Activity:
    """What /metrics says at one moment.

    ``running`` and ``waiting`` count requests, ``tokens`` those read and written since the start. vLLM counts a
    prompt's tokens only when all of it was read, which takes minutes at 200K: until then the part of the KV cache in
    use (``kv_usage``, 0 to 1) is what moves.
    """

    running: int
    waiting: int
    tokens: int
    kv_usage: float

    @property
    def busy(self) -> bool:
        """Whether any request is in the server."""
        return self.running + self.waiting > 0

    @property
    def position(self) -> tuple[int, float]:
        """What changes as long as the engine works."""
        return self.tokens, self.kv_usage


def parse_metrics(text: str) -> Activity | None:
    """Read the server's Prometheus text; nothing when its counters are not in it."""
    sums: dict[str, float] = {}
    for name, value in _METRIC.findall(text):
        sums[name] = sums.get(name, 0.0) + float(value)
    if "num_requests_running" not in sums or "generation_tokens_total" not in sums:
        return None
    return Activity(
        running=int(sums["num_requests_running"]),
        waiting=int(sums.get("num_requests_waiting", 0)),
        tokens=int(sums["generation_tokens_total"] + sums.get("prompt_tokens_total", 0)),
        kv_usage=sums.get("kv_cache_usage_perc", 0.0),
    )


class Endpoint:
    """A client of one OpenAI-compatible server on this host."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._url = url
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def healthy(self, timeout_s: float = 5.0) -> bool:
        """Whether /health says 200. It does so with a wedged engine too."""
        status, _ = self._ask("/health", None, timeout_s)
        return status == 200

    def activity(self, timeout_s: float = 5.0) -> Activity | None:
        """What /metrics says, or nothing when it does not answer."""
        return parse_metrics(self.metrics(timeout_s))

    def metrics(self, timeout_s: float = 5.0) -> str:
        """The text of /metrics; empty when it does not answer."""
        status, body = self._ask("/metrics", None, timeout_s)
        return body if status == 200 else ""

    def requests_inside(self, timeout_s: float = 2.0) -> int | None:
        """How many requests the server still answers, from its refusal of this one; nothing where it refuses none."""
        status, body = self._ask("/v1/models", None, timeout_s)
        inside = _json(body).get("requests_inside") if status == 503 else None
        return inside if isinstance(inside, int) else None

    def fault(self, model: str, timeout_s: float) -> str | None:
        """Ask the model for a few tokens.

        Args:
            model: the served model's name.
            timeout_s: seconds for the whole answer; a first request compiles kernels for up to a minute.

        Returns:
            Nothing when the server listed the model and the model wrote at least one token, else what went wrong.
        """
        status, body = self._ask("/v1/models", None, timeout_s)
        names = [entry.get("id") for entry in _json(body).get("data", [])] if status == 200 else []
        if model not in names:
            return f"/v1/models: status {status}, models {names}, wanted {model}"
        request = {"model": model, "messages": [{"role": "user", "content": "Say ready."}], "max_tokens": 8}
        status, body = self._ask("/v1/chat/completions", request, timeout_s)
        answer = _json(body)
        if status == 200 and answer.get("choices") and answer.get("usage", {}).get("completion_tokens", 0) >= 1:
            return None
        return f"/v1/chat/completions: status {status}, {body[:200]!r}"

    def _ask(self, path: str, request: dict[str, Any] | None, timeout_s: float) -> tuple[int, str]:
        """Status and body; status 0 when nobody answered."""
        data = None if request is None else json.dumps(request).encode()
        try:
            asked = urllib.request.Request(self._url + path, data=data, headers=self._headers)
            with _OPENER.open(asked, timeout=timeout_s) as reply:
                return reply.status, reply.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")
        except (OSError, ValueError) as error:
            return 0, str(error)


def _json(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}
