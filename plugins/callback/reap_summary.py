"""The end of a run in one line a host, and where the time went."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = r"""
name: reap_summary
type: aggregate
short_description: One line for each host at the end of a run
description:
  - Says for each host whether the run was good, what it serves or why it failed, and how long each role took.
  - A role adds to a host's line with C(ansible.builtin.set_stats), key C(reap), C(per_host=true); with key
    C(reap_pages), of the whole run, it names the page of all hosts.
  - A host whose batch was not begun, because every host of the batch before it failed, is not called good.
requirements:
  - enabled in ansible.cfg
"""

# What a failed result may carry, the most telling first.
MESSAGE_KEYS = ("msg", "stderr", "stdout", "exception")
SHOWN_CHARACTERS = 400
REFUSED = "failed to validate"


def first_message(result: dict[str, Any]) -> str:
    """Why a task failed, in one line."""
    for key in MESSAGE_KEYS:
        text = str(result.get(key) or "").strip()
        if text == REFUSED:
            # template and copy say only this of `validate:`; the reason is what that program printed.
            said = (str(result.get(name) or "").strip() for name in ("stdout", "stderr"))
            text = ": ".join(filter(None, (text, *said)))
        if text:
            line = " ".join(text.split())
            return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 1] + "…"
    return "no message"


class CallbackModule(CallbackBase):
    """Collects the first failure of each host, how far each came, and the seconds of each role."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "reap_summary"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self._failures: dict[str, str] = {}
        self._play = ""
        self._last_play: dict[str, str] = {}  # by host, the last in which it had a task
        self._seconds: dict[str, float] = defaultdict(float)
        self._stage = ""
        self._since = 0.0

    def _close_stage(self) -> None:
        if self._stage:
            self._seconds[self._stage] += time.monotonic() - self._since
        self._since = time.monotonic()

    def v2_playbook_on_play_start(self, play: Any) -> None:
        self._close_stage()
        self._stage = self._play = play.get_name().strip()

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        self._close_stage()
        role = getattr(task, "_role", None)
        if role is not None:
            self._stage = role.get_name()

    def v2_runner_on_start(self, host: Any, task: Any) -> None:
        self._last_play.pop(host.get_name(), None)  # so that the newest is the last
        self._last_play[host.get_name()] = self._play

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            where = result._task.get_name() if hasattr(result, "_task") else ""
            # The last one counts: an earlier one was rescued.
            self._failures[result._host.get_name()] = f"{where}: {first_message(result._result)}"

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self._failures.setdefault(
            result._host.get_name(),
            f"unreachable: {first_message(result._result)}; check ansible_host, the network and the SSH key",
        )

    def v2_playbook_on_stats(self, stats: Any) -> None:
        self._close_stage()
        hosts = sorted(stats.processed)
        if not hosts:
            return
        self._display.banner("HOSTS")
        width = max(len(host) for host in hosts)
        last = next(reversed(self._last_play.values()), "")
        for host in hosts:
            numbers = stats.summarize(host)
            custom = (getattr(stats, "custom", None) or {}).get(host) or {}
            said = custom.get("reap", "")
            state, color = "ok", "green"
            if numbers["failures"] or numbers["unreachable"]:
                state, color = "FAILED", "red"
                said = self._failures.get(host, said)
            elif self._last_play.get(host) != last:
                state, color = "HELD", "yellow"
                said = f"{last} was not begun: every host of the batch before failed; run it again for this host"
            self._display.display(
                f"{host:<{width}}  {state:<6}  changed={numbers['changed']:<3} {said}".rstrip(), color=color
            )
        pages = ((getattr(stats, "custom", None) or {}).get("_run") or {}).get("reap_pages")
        if pages:
            self._display.display(f"all hosts: {pages}")
        spent = [f"{stage} {seconds:.0f} s" for stage, seconds in self._seconds.items() if seconds >= 0.5]
        self._display.display("time: " + (", ".join(spent) or "under a second"))
