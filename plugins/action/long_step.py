"""The controller's half of ``long_step``: wait for a detached command and show how far it is.

The module of the same name starts the command and looks after it; one call of it lasts a few seconds at most, so
nothing depends on one long connection. Options and results are documented there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

LINE_EVERY_S = 2.0
LOG_EVERY_S = 15.0
# After a line of another kind was printed the block waits, so that it is drawn below that line and not over it.
SETTLE_S = 0.7
RESTARTS = 3

# Workers have no terminal of their own: what the main process saw when it loaded this plugin is inherited by the fork.
_TERMINAL = sys.stdout.isatty()
_BOARD = Path(tempfile.gettempdir()) / f"reap-progress-{os.getuid()}-{os.getpid()}"


def size(count: float) -> str:
    """Bytes for people, in powers of ten as disks and networks are sold: ``94.0 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Time left for people: ``45 s``, ``9 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def describe(progress: dict[str, Any] | None, elapsed_s: float) -> str:
    """One line about a progress file's content (fields: done, total, unit, rate, eta_s, source, detail)."""
    if not progress:
        return f"running for {duration(elapsed_s)}"
    unit = str(progress.get("unit") or "")

    def amount(count: float) -> str:
        return size(count) if unit == "bytes" else f"{count:.0f} {unit}".rstrip()

    done, total, rate, eta = (progress.get(key) for key in ("done", "total", "rate", "eta_s"))
    parts = []
    if isinstance(done, (int, float)) and isinstance(total, (int, float)) and total > 0:
        parts.append(f"{100 * done // total:.0f} % {amount(done)} of {amount(total)}")
    elif isinstance(done, (int, float)) and done:
        parts.append(amount(done))
    if isinstance(rate, (int, float)) and rate > 0:
        parts.append(f"{amount(rate)}/s")
    if isinstance(eta, (int, float)):
        parts.append(f"{duration(eta)} left")
    if progress.get("source"):
        parts.append(f"from {progress['source']}")
    detail = str(progress.get("detail") or "")
    text = ", ".join(parts)
    return f"{text} ({detail})" if text and detail else text or detail or f"running for {duration(elapsed_s)}"


class Screen:
    """One line per host and step. On a terminal all lines are redrawn in place, by whichever worker has news.

    The worker that waits for a step of a host shows the other steps that run there too. The workers of one run share a
    small file (host -> step -> line, lines drawn) under a lock; every character goes through Ansible's display, which
    the main process alone writes.
    """

    def __init__(self, display: Display, host: str, step: str) -> None:
        self.display = display
        self.host = host
        self.step = step
        wish = os.environ.get("REAP_PROGRESS", "")
        self.form = wish if wish in ("line", "log", "off") else ("line" if _TERMINAL else "log")
        self.every_s = LINE_EVERY_S if self.form == "line" else LOG_EVERY_S
        self.last: dict[str, str] = {}

    @contextlib.contextmanager
    def _board(self) -> Any:
        with os.fdopen(os.open(_BOARD, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                board = json.loads(file.read() or "{}")
            except ValueError:
                board = {}
            board.setdefault("lines", {})
            yield board
            file.seek(0)
            file.truncate()
            json.dump(board, file)

    def _draw(self, board: dict[str, Any]) -> None:
        width = shutil.get_terminal_size((120, 24)).columns - 1
        back = f"\x1b[{board.get('drawn', 0)}A" if board.get("drawn") else ""
        rows = [
            f"\x1b[2K{text[:width]}\n"
            for _, steps in sorted(board["lines"].items())
            for _, text in sorted(steps.items())
        ]
        board["drawn"] = len(rows)
        # Clear to the end of the screen: a host that has finished leaves a row fewer.
        self.display.display(f"\r{back}\x1b[J{''.join(rows)}\r", newline=False, screen_only=True)

    def show(self, view: dict[str, Any]) -> None:
        """Show a job's state and that of the steps beside it, unless it is what was shown last."""
        views = {str(other.get("step")): other for other in view.get("others") or []} | {self.step: view}
        lines = {
            step: f"[{self.host}] {step}: {describe(one.get('progress'), float(one.get('elapsed_s') or 0))}"
            for step, one in views.items()
        }
        if path := os.environ.get("REAP_PROGRESS_JSON"):
            records = [
                {"host": self.host, "step": step, "time": time.time(), "progress": one.get("progress")}
                for step, one in views.items()
            ]
            with Path(path).open("a", encoding="utf-8") as out:
                out.write("".join(json.dumps(record) + "\n" for record in records))
        if self.form == "off" or lines == self.last:
            return
        before, self.last = self.last, lines
        if self.form == "log":
            for step, text in sorted(lines.items()):
                if text != before.get(step):
                    self.display.display(text)
            return
        with self._board() as board:
            board["lines"][self.host] = lines
            # Outside this range the last line of another kind is long past, or the clock was set back.
            if not 0 <= time.time() - board.get("settled", 0) < SETTLE_S:
                self._draw(board)

    def close(self) -> None:
        """Take this host's lines away, so that Ansible's own result line stands where it was."""
        if self.form != "line":
            return
        with self._board() as board:
            board["lines"].pop(self.host, None)
            if board.get("drawn"):
                self.display.display(f"\r\x1b[{board['drawn']}A\x1b[J", newline=False, screen_only=True)
            board["drawn"] = 0
            board["settled"] = time.time()
            last = not board["lines"]
        if last:
            _BOARD.unlink(missing_ok=True)


class ActionModule(ActionBase):
    """Start or attach, wait, show, collect."""

    TRANSFERS_FILES = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the step; the result is the module's last answer plus ``changed`` and ``failed``."""
        super().run(tmp, task_vars)
        self._task_vars = task_vars or {}
        args = dict(self._task.args)
        mode = args.get("mode", "run")
        if mode != "wait" and not args.get("argv"):
            raise AnsibleActionFail("long_step: argv is missing; give the command as a list")
        host = str(self._task_vars.get("inventory_hostname", "host"))
        screen = Screen(self._display, host, str(args.get("step", "")))
        try:
            view = self._follow(args, mode, screen)
        finally:
            screen.close()
        return self._result(view, args, mode)

    def _call(self, args: dict[str, Any], **more: Any) -> dict[str, Any]:
        """One call of the module, again while the connection is lost, for at most ``reconnect`` seconds."""
        limit = time.monotonic() + float(args.get("reconnect", 600))
        pause = 2.0
        while True:
            try:
                view = self._execute_module(
                    module_name="long_step", module_args={**args, **more}, task_vars=self._task_vars
                )
            except AnsibleConnectionFailure as error:
                view, lost = {}, str(error)
            else:
                # Some connection plugins report a lost connection as a result.
                lost = str(view.get("msg", "connection lost")) if view.get("unreachable") else ""
            if not lost:
                return dict(view)
            if time.monotonic() > limit or not more.get("job_id"):
                raise AnsibleConnectionFailure(lost)
            self._display.display(
                f"[{self._task_vars.get('inventory_hostname')}] {args.get('step')}: connection lost, the step runs on; "
                f"trying again in {pause:.0f} s"
            )
            time.sleep(pause)
            pause = min(pause * 2, 30.0)
            with contextlib.suppress(Exception):
                self._connection.reset()

    def _follow(self, args: dict[str, Any], mode: str, screen: Screen) -> dict[str, Any]:
        began = time.monotonic()
        timeout = float(args.get("timeout", 0))
        view = self._call(args, wait_s=0 if mode == "wait" else 2.0)
        if view.get("failed") or self._task.check_mode or mode == "start":
            return view
        attached = view.get("attached", False)
        restarts = 0

        def spent() -> float:
            # Who only waits did not see the start; the host did.
            return float(view.get("elapsed_s") or 0) if mode == "wait" else time.monotonic() - began

        while True:
            if view.get("running"):
                screen.show(view)
                if timeout and spent() > timeout:
                    view = self._call({**args, "mode": "end"}, job_id=view["job_id"])
                    return {**view, "failed": True, "msg": f"step {args['step']} took longer than {timeout:.0f} s"}
            elif view.get("failed") or view.get("ended"):
                return {**view, "attached": attached}
            elif not args.get("argv"):
                lost = (
                    f"step {args['step']} neither runs nor has ended on {screen.host}: nothing began it since the host "
                    "started; begin it again"
                )
                return {**view, "failed": True, "msg": lost}
            elif restarts < RESTARTS:
                # Neither running nor ended: the host restarted, or the runner was killed.
                restarts += 1
                self._display.display(f"[{screen.host}] {screen.step}: interrupted on the host; starting it again")
                view = self._call({**args, "mode": "run"}, wait_s=2.0, job_id="again")
                continue
            else:
                return {**view, "failed": True, "msg": f"step {args['step']} was interrupted {restarts + 1} times"}
            wait = screen.every_s if not timeout else min(screen.every_s, max(0.5, timeout - spent()))
            view = self._call({**args, "mode": "wait"}, wait_s=wait, job_id=view.get("job_id") or "any")

    def _result(self, view: dict[str, Any], args: dict[str, Any], mode: str) -> dict[str, Any]:
        for noise in ("signature", "command", "invocation", "ended", "others"):
            view.pop(noise, None)
        view["rc"] = view.pop("exit_status", None)
        # Without it Ansible takes an exit status of null for a failure.
        view.setdefault("failed", False)
        stdout, stderr = str(view.get("stdout", "")), str(view.get("stderr", ""))
        view["stdout_lines"], view["stderr_lines"] = stdout.splitlines(), stderr.splitlines()
        view["result"] = _last_json(stdout)
        rc = view["rc"]
        if view.get("failed") or view.get("skipped") or rc is None:
            return view
        told = view["result"] or {}
        if rc not in [int(code) for code in args.get("rc_ok", [0])]:
            said = (view.get("progress") or {}).get("error") if isinstance(view.get("progress"), dict) else None
            lines = [line for line in stderr.splitlines() if line.strip()]
            view["failed"] = True
            view["msg"] = said or told.get("error") or told.get("msg") or (lines[-1] if lines else f"exit status {rc}")
            view["changed"] = False
        elif self._task.check_mode:
            view["changed"] = bool(told.get("changed", False))
        else:
            view["changed"] = bool(told.get("changed", True))
        return view


def _last_json(text: str) -> dict[str, Any] | None:
    lines = text.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return None
    try:
        value = json.loads(lines[-1])
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
