"""What vLLM's log says of a load: weights, CUDA graphs, warm-up.

The lines are those of vLLM 0.22 to 0.32 (model_loader/weight_utils.py, worker/gpu_model_runner.py, v1/engine/core.py,
entrypoints launcher). A version that words them otherwise costs the progress display, nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

_SHARDS = re.compile(r"Loading .*checkpoint shards.*?\| (\d+)/(\d+) ")
_GRAPHS = re.compile(r"Capturing CUDA graphs.*?\| (\d+)/(\d+) ")
_SERVER = re.compile(r"Starting vLLM (?:API )?server|Application startup complete")
_ENGINE = re.compile(r"init engine \(profile, create kv cache, warmup model\) took")
_LOADED = re.compile(r"Model loading took ([\d.]+) GiB(?: memory)? and ([\d.]+) seconds")
_KV = re.compile(r"KV cache size: ([\d,]+) tokens")
_GRAPHS_DONE = re.compile(r"Graph capturing finished in (\d+) secs, took ([\d.]+) GiB")
# The last line of a Python traceback, as vLLM's processes print it: "(EngineCore pid=1) ERROR ... ValueError: text".
_ERROR = re.compile(r"(?:^|[\s\])])((?:[A-Za-z_]+\.)*[A-Z]\w*(?:Error|Exception|Interrupt)): (.+)$")
# The outer error of vLLM says only "see above".
_HOLLOW = re.compile(r"Engine core initialization failed|EngineCore encountered an issue|EngineDeadError")


@dataclass
class LoadProgress:
    """Reads log lines one by one and keeps what was last known."""

    step: str = "weights"
    done: int = 0
    total: int | None = None
    unit: str = "shards"
    facts: dict[str, Any] = field(default_factory=dict)
    """weights_gib, weights_s, kv_cache_tokens, graphs_s, graphs_gib: as vLLM logged them."""
    error: str | None = None
    """The first telling error line."""

    def read(self, line: str) -> None:
        """Take in one line of the container's output."""
        if match := _SHARDS.search(line):
            self._at("weights", int(match[1]), int(match[2]), "shards")
        elif match := _GRAPHS.search(line):
            self._at("graphs", int(match[1]), int(match[2]), "graphs")
        elif match := _LOADED.search(line):
            self.facts |= {"weights_gib": float(match[1]), "weights_s": float(match[2])}
            self._at("graphs", 0, None, "graphs")
        elif match := _KV.search(line):
            self.facts["kv_cache_tokens"] = int(match[1].replace(",", ""))
        elif match := _GRAPHS_DONE.search(line):
            self.facts |= {"graphs_s": int(match[1]), "graphs_gib": float(match[2])}
            self._at("warmup", 0, None, "requests")
        elif _SERVER.search(line) or _ENGINE.search(line):
            self._at("warmup", 0, 1, "requests")
        elif (match := _ERROR.search(line)) and (self.error is None or _HOLLOW.search(self.error)):
            self.error = f"{match[1]}: {match[2]}"

    def to_mapping(self) -> dict[str, Any]:
        """As the state file has it."""
        return {"step": self.step, "done": self.done, "total": self.total, "unit": self.unit}

    def text(self) -> str:
        """One phrase for ``systemctl status``."""
        name = {"weights": "loading weights", "graphs": "preparing the engine", "warmup": "warming up"}[self.step]
        return name if not self.total else f"{name}, {self.done} of {self.total} {self.unit}"

    def _at(self, step: str, done: int, total: int | None, unit: str) -> None:
        order = ("weights", "graphs", "warmup")
        if order.index(step) >= order.index(self.step):
            self.step, self.done, self.total, self.unit = step, done, total, unit
