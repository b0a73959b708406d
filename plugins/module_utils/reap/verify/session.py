"""What every task works with: the client, the tokenizer, the metrics, and the record of what was seen."""

from __future__ import annotations

import http.client
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .checks import Check, protocol_checks, shorten
from .client import Client, CouldNotRun, Deadlines, Reply, Usage
from .measure import Rates, rates
from .metrics import CACHED, DECODE_TIME, GENERATED, PROMPT, RUNNING, WAITING, Snapshot, read_metrics
from .needle import Messages, Needle, Prompt, build_prompt, estimate_prompt
from .settings import Settings

# A calibration difference larger than this is no chat template, it is another count, and is not corrected.
LARGEST_TEMPLATE_OFFSET = 2048
# A shorter decode of the engine says nothing about how its tokens come, seconds.
LEAST_DECODE_S = 2.0
# Tokens of another request that may stand in the prefix cache: the blocks that hold the chat template's beginning.
COLD_CACHE_TOKENS = 1024


@dataclass
class TaskResult:
    """What a task found. `passed` is None for a task that did not run, with the reason in `note`."""

    name: str
    title: str
    expected: bool
    checks: list[Check] = field(default_factory=list)
    exchanges: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""
    ran: bool = False
    rates: Rates | None = None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        if not self.ran:
            return None
        return bool(self.checks) and all(check.passed for check in self.checks)

    def check(self, name: str, passed: bool, found: Any, wanted: Any) -> bool:
        """Add one judgement; returns it."""
        self.checks.append(Check(name, passed, str(found), str(wanted)))
        return passed

    @property
    def failed_checks(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "passed": self.passed,
            "expected": self.expected,
            "seconds": round(self.seconds, 3),
            "note": self.note,
            "checks": [check.to_dict() for check in self.checks],
            "exchanges": self.exchanges,
            "rates": self.rates.to_dict() if self.rates else None,
            "data": self.data,
        }


class Session:
    """One verification in progress.

    Args:
        step: called with (done, total, unit, detail) while a long request runs.
    """

    def __init__(
        self,
        settings: Settings,
        client: Client,
        run_id: str,
        step: Callable[[int, int | None, str, str], None] = lambda done, total, unit, detail: None,
    ) -> None:
        self.settings = settings
        self.client = client
        self.run_id = run_id
        self.rng = random.Random(run_id)
        self.step = step
        self.notes: list[str] = []
        self.has_tokenizer = False
        self.has_metrics = False
        self.template_offset = 0
        self.tokens_per_character = 0.25
        self.template_tokens = 16
        self.context: int | None = settings.max_model_len
        self.served: dict[str, Any] = {}
        self.vllm_version: str | None = None
        self.long_prompts: list[dict[str, Any]] = []
        self.token_times: list[list[float]] = []
        self._label = 0

    # ------------------------------------------------------------------------------------------ tokens

    def label(self) -> str:
        """A beginning for a prompt that no other request has or had."""
        self._label += 1
        return f"{self.run_id}/{self._label:03d}"

    def limit(self, tokens: int) -> int:
        """A limit of an answer that leaves half of a small context to the prompt: a server refuses any larger one."""
        return tokens if self.context is None else min(tokens, self.context // 2)

    def tokenize(self, messages: Messages) -> int | None:
        """Tokens of these messages by the server's tokenizer, chat template included; None when it has none."""
        body = {"model": self.client.model, "messages": messages, **self.client.extra}
        try:
            status, data = self.client.get_json("/tokenize", body, timeout=max(60.0, self.client.deadlines.connect_s))
        except (OSError, http.client.HTTPException):
            return None
        count = data.get("count") if status == 200 and isinstance(data, Mapping) else None
        return count if isinstance(count, int) else None

    def count(self, messages: Messages) -> int:
        """As `tokenize`, with the offset that calibration found.

        Raises:
            CouldNotRun: the tokenizer stopped answering.
        """
        found = self.tokenize(messages)
        if found is None:
            raise CouldNotRun(f"{self.client.url}/tokenize stopped answering")
        return found + self.template_offset

    def long_prompt(self, wanted: int, needles: Sequence[Needle], question: str) -> Prompt:
        """A prompt of so many tokens; exact where the server has a tokenizer."""
        if self.has_tokenizer:
            return build_prompt(wanted, needles, question, self.count, self.rng, label=self.label())
        return estimate_prompt(
            wanted, needles, question, self.tokens_per_character, self.template_tokens, self.rng, label=self.label()
        )

    # ------------------------------------------------------------------------------------------ metrics

    def snapshot(self) -> Snapshot | None:
        """The server's metrics, or None where it has none."""
        return read_metrics(self.client) if self.has_metrics else None

    def settled(self, earlier: Snapshot, prompt: int, timeout: float = 5.0) -> Snapshot:
        """A reading after a reply, waited for until the counters hold the reply: they lag a moment behind it."""
        deadline = time.monotonic() + timeout
        while True:
            now = self.snapshot() or Snapshot()
            grown = now.growth(earlier, PROMPT) or 0
            idle = (now.get(RUNNING) or 0) + (now.get(WAITING) or 0) == 0
            if (grown >= prompt and idle) or time.monotonic() > deadline:
                return now
            time.sleep(0.1)

    # ------------------------------------------------------------------------------------------ requests

    def ask(
        self,
        result: TaskResult,
        messages: Messages,
        max_tokens: int,
        *,
        wanted_tokens: int | None = None,
        count_tokens: bool = True,
        accounting: bool = False,
        cold: bool = False,
        deadlines: Deadlines | None = None,
        on_token: Callable[[Reply], bool | None] | None = None,
        judge: bool = True,
        tolerated: Sequence[str] = (),
        **options: Any,
    ) -> Reply:
        """Send one chat request, judge it by the rules every reply must keep, and keep it for the report.

        Args:
            wanted_tokens: prompt tokens the server must state; None: asked of its tokenizer, where it has one.
            accounting: compare the stated usage with the growth of the server's own counters.
            cold: prove through the counters that the prompt did not come from the prefix cache.
            tolerated: names of rules of the protocol that do not count here.
        """
        before = self.snapshot() if accounting or cold else None
        max_tokens = self.limit(max_tokens)
        reply = self.client.chat(messages, max_tokens=max_tokens, deadlines=deadlines, on_token=on_token, **options)
        self.keep(result, messages, reply)
        if not judge:
            return reply
        checks = protocol_checks(reply, self.client.model)
        result.checks.extend(check for check in checks if check.name not in tolerated)
        usage = reply.usage
        if usage is not None and count_tokens and not (options.get("extra") or {}).get("tools"):
            if wanted_tokens is None and self.has_tokenizer:
                wanted_tokens = self.count(messages)
            if wanted_tokens is not None:
                result.check("prompt_tokens_exact", usage.prompt == wanted_tokens, usage.prompt, wanted_tokens)
        if before is not None and usage is not None:
            self._judge_by_metrics(result, reply, usage, before, accounting, cold)
        return reply

    def _judge_by_metrics(
        self, result: TaskResult, reply: Reply, usage: Usage, before: Snapshot, accounting: bool, cold: bool
    ) -> None:
        after = self.settled(before, usage.prompt)
        if accounting:
            for name, series, stated in (
                ("prompt_tokens_metrics", PROMPT, usage.prompt),
                ("completion_tokens_metrics", GENERATED, usage.completion),
            ):
                grown = after.growth(before, series)
                if grown is None:
                    self._unproved(result, name, f"{self.client.url}/metrics does not count {series}", "a counter")
                else:
                    found = f"{stated} stated, {int(grown)} counted"
                    if int(grown) > stated:
                        found += " (another client's request meanwhile counts, too)"
                    result.check(name, int(grown) == stated, found, "the same")
            self._judge_decode_time(result, reply, before, after)
        if cold:
            grown = after.growth(before, *CACHED)
            known = [int(number) for number in (usage.cached, grown) if number is not None]
            if not known:
                found = "the server does not say how many prompt tokens came from the prefix cache"
                wanted = f"{' or '.join(CACHED)}, or prompt_tokens_details.cached_tokens in the usage"
                self._unproved(result, "prefix_cache_cold", found, wanted)
                return
            cached = max(known)
            result.data["cached_tokens"] = cached
            limit = max(COLD_CACHE_TOKENS, usage.prompt // 50)
            found = f"{cached} of {usage.prompt} prompt tokens came from the prefix cache"
            result.check("prefix_cache_cold", cached <= limit, found, f"at most {limit}")

    def _judge_decode_time(self, result: TaskResult, reply: Reply, before: Snapshot, after: Snapshot) -> None:
        """Tokens come as the engine makes them; an answer that is held back and played in a moment looks quick."""
        made = after.growth(before, DECODE_TIME)
        if made is None or made < LEAST_DECODE_S or reply.first_token_s is None or reply.last_chunk_s is None:
            return
        came = reply.last_chunk_s - reply.first_token_s
        found = f"the tokens came within {came:.2f} s, the engine made them in {made:.2f} s"
        result.check("decode_time_metrics", came >= made / 2, found, "tokens that come as they are made")

    def _unproved(self, result: TaskResult, name: str, found: str, wanted: str) -> None:
        """What nothing counts: a failed check where the proof is required, a note where it is not."""
        if self.settings.metrics == "required":
            result.check(name, False, found, wanted)
        else:
            result.note = f"{found}: {name} was not proved"

    def keep(self, result: TaskResult, messages: Messages, reply: Reply) -> None:
        """Remember what was sent and got, shortened."""
        sent = "\n\n".join(f"{m['role']}: {m.get('content') or m.get('tool_calls')}" for m in messages)
        result.exchanges.append(
            {
                "sent": shorten(sent),
                "content": shorten(reply.content),
                "reasoning": shorten(reply.reasoning),
                "tool_calls": reply.tool_calls,
                "status": reply.status,
                "body": shorten(reply.body, 600),
                "finish_reason": reply.finish_reason,
                "usage": reply.usage.to_dict() if reply.usage else None,
                "timing": reply.timing(),
                "problems": reply.problems,
            }
        )

    def measured(self, result: TaskResult, reply: Reply) -> Rates | None:
        """Take the rates of a reply into the task's result."""
        result.rates = rates(reply)
        return result.rates
