"""The guarding half: reads MemAvailable, asks the policy, kills.

Its loop starts no process and leaves no object behind: one turn reads into kept buffers, and what Python makes for a
number or a line is given back at its end, out of memory that is locked and stays in the process.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ReapError
from .cgroup import Target, find_folder, parse_proc_cgroup
from .config import Settings
from .kernel import Meminfo, Pressure, Systemd, lock_memory, protect_from_oom_killer, run_before_others
from .policy import Action, Phase, Policy
from .ring import Ring
from .secretary import Secretary
from .state import ServiceFile, ServiceState, carried_from_json, read_boot_id, read_json, write_atomic

_REPORT_S = 5.0
_METRICS_S = 10.0
_ALIVE_S = 1.0
# Far from the floor; near it, and so before every decision, the service's state is looked at each time.
_SERVICE_S = 0.1
# So long without a reading, and systemd is not told any more that all is well: it starts the watchdog anew.
_BLIND_LIMIT_S = 10.0
_REOPEN_S = 1.0
# A container that is named but not held (its control group was not found, or could not be opened) is tried again.
_RETRY_S = 1.0
# SIGKILL cannot be refused, but a process in an uninterruptible wait takes it late: said once after this time.
_KILL_LATE_S = 5.0


class Guardian:
    """One run of the watchdog."""

    def __init__(self, settings: Settings, environment: dict[str, str]) -> None:
        self._settings = settings
        self._limits = settings.limits
        self._systemd = Systemd(environment)
        self._boot_id = read_boot_id()
        self._meminfo = Meminfo(settings.paths.meminfo)
        self._kb = self._meminfo.read()
        if self._kb is None:
            raise ReapError(f"{settings.paths.meminfo} gives no MemAvailable; the watchdog cannot guard this host")
        self._ring = Ring(int(settings.series_minutes * 60 / self._limits.fast_interval_s))
        self._secretary = Secretary(settings, self._ring)
        self._service = ServiceFile(settings.paths.service_state, self._boot_id)
        before = read_json(settings.paths.state)
        before = before if isinstance(before, dict) and before.get("boot_id") == self._boot_id else {}
        self._policy = Policy(self._limits, carried_from_json(before.get("carried")))
        self._last_event: dict[str, Any] | None = before.get("last_event")
        # A group that holds this very process is never killed. Read now: later it might not be readable.
        self._own_cgroups = parse_proc_cgroup(_read_text("/proc/self/cgroup"))
        self._target: Target | None = None
        # The container whose processes were seen to be gone, and the one that was said not to be found.
        self._gone: str | None = None
        self._missed: str | None = None
        self._guarding: bool | None = None
        self._supervisor = -1
        self._supervisor_pid: int | None = None
        self._killing: Target | None = None
        self._killed_at = 0.0
        self._kill_late = False
        self._phase = Phase.ABSENT
        self._readings = self._unreadable = self._pressures = 0
        self._stop = self._lift = False
        self._protection: dict[str, Any] = {}

    # -- life ----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Guard until SIGTERM. Returns the exit status."""
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_lift)
        self._settings.paths.state.parent.mkdir(parents=True, exist_ok=True)
        self._secretary.start()
        self._pressure = Pressure(self._settings.paths.pressure)
        self._protection = {
            "memory_locked": lock_memory() or True,
            "oom_score_adj": protect_from_oom_killer(),
            "scheduling": run_before_others() if self._settings.realtime else "as started",
            "pressure_trigger": self._pressure.fd >= 0,
        }
        self._take_service(force=True)
        self._tell("start", f"guarding: {self._lines()}; {self._protection_text()}")
        self._systemd.send(b"READY=1")
        gc.collect()
        gc.freeze()
        # No cycle is made in the loop, and a collection at the wrong moment would cost milliseconds.
        gc.disable()
        self._guard()
        # At a shutdown the service ends just before, between two looks of an idle host.
        self._take_service()
        self._tell("stop", "the watchdog was asked to stop; nothing guards this host now")
        self._systemd.send(b"STOPPING=1")
        self._save_state()
        self._secretary.finish()
        return 0

    def _on_stop(self, *_: object) -> None:
        self._stop = True

    def _on_lift(self, *_: object) -> None:
        self._lift = True

    def _guard(self) -> None:
        poll = select.poll()
        if self._pressure.fd >= 0:
            poll.register(self._pressure.fd, select.POLLPRI)
        monotonic, policy = time.monotonic, self._policy
        next_service = next_alive = next_report = next_metrics = next_ping = next_reopen = next_retry = 0.0
        near_kb = self._limits.floor_kb + self._limits.warn_margin_kb
        pressure = False
        while not self._stop:
            now = monotonic()
            self._kb = kb = self._meminfo.read()
            self._readings += 1
            self._ring.append(now, -1 if kb is None else kb)
            near = policy.near or kb is None or kb < near_kb
            if near or now >= next_service:
                next_service = now + _SERVICE_S
                self._take_service()
            if self._target is not None and (near or now >= next_alive):
                next_alive = now + _ALIVE_S
                if not self._target.alive():
                    self._gone = self._target.identity
                    self._forget_target()
                    self._note_guarding()
            if now >= next_retry:
                next_retry = now + _RETRY_S
                self._take_supervisor(self._service.state.supervisor_pid)
                self._take_target()
            action = policy.step(now, kb, self._phase, self._identity(), pressure)
            if action is not Action.NONE:
                self._act(action, now)
            if self._killing is not None:
                self._follow_kill(now)
            if kb is None:
                self._unreadable += 1
                if now >= next_reopen:
                    next_reopen = now + _REOPEN_S
                    self._meminfo.reopen()
            if self._lift:
                self._lift = False
                policy.lift()
                self._tell("lifted", "hold, latch and spent budget were lifted by hand; a start is allowed")
                self._save_state()
            if now >= next_ping and policy.blind_s < _BLIND_LIMIT_S:
                next_ping = now + (self._systemd.ping_s or _REPORT_S)
                self._systemd.send(b"WATCHDOG=1")
            # Nothing is written while memory falls: a page for it may have to be waited for.
            if policy.fall_kb_s < self._limits.warn_margin_kb // 8 and self._killing is None:
                if now >= next_report:
                    next_report = now + _REPORT_S
                    self._save_state()
                    self._systemd.send(f"STATUS={self._lines()}".encode())
                if now >= next_metrics:
                    next_metrics = now + _METRICS_S
                    self._report(None)
            wait_s = policy.interval_s if self._killing is None else self._limits.fast_interval_s
            pressure = bool(poll.poll(max(1, int(wait_s * 1000))))
            if pressure:
                self._pressures += 1

    # -- the service and its container ---------------------------------------------------------------------------

    def _take_service(self, force: bool = False) -> None:
        if not self._service.refresh() and not force:
            return
        if self._service.problem is not None:
            self._tell("problem", f"the service's state cannot be read, its last one is kept: {self._service.problem}")
            return
        state = self._service.state
        if state.phase is not self._phase:
            before, self._phase = self._phase, state.phase
            self._tell("phase", f"phase {before.value} -> {state.phase.value}: {self._lines()}")
        self._take_supervisor(state.supervisor_pid)
        self._take_target()

    def _take_target(self) -> None:
        """Hold the container that the service names; called again every second for as long as it is not held."""
        state = self._service.state
        identity = self._identity_of(state)
        if identity != self._identity():
            self._forget_target()
            if identity is not None:
                self._open_target(identity, state)
        self._note_guarding()

    def _open_target(self, identity: str, state: ServiceState) -> None:
        name = state.container_id or state.container_name
        folder = self._find_folder(state)
        why = f"no control group of container {name} was found" if folder is None else ""
        target = None
        if folder is not None:
            try:
                target = Target(identity, folder)
            except OSError as error:
                why = f"the control group {folder} of container {name} cannot be opened: {error.strerror or error}"
        if target is not None and not target.alive():
            # It ended before it was looked at; should it begin again, a later try sees it.
            target.close()
            self._gone = identity
            return
        if folder is None and state.container_pid is not None and _is_gone(f"/proc/{state.container_pid}"):
            self._gone = identity
            return
        if target is None:
            if identity not in (self._gone, self._missed):
                self._missed = identity
                self._tell("problem", f"{why}; THE MODEL IS NOT GUARDED, tried again every {_RETRY_S:.0f} s")
            return
        self._target = target
        if identity == self._missed:
            self._missed = None
            self._tell("found", f"container {name} is guarded now: {folder}")

    def _note_guarding(self) -> None:
        """True: a container is held. False: one is named and is not held. None: there is none to guard."""
        identity = self._identity_of(self._service.state)
        known_to_be_gone = identity is None or (identity == self._gone and self._target is None)
        guarding = None if known_to_be_gone else self._target is not None
        if guarding is not self._guarding:
            self._guarding = guarding
            self._save_state()

    def _identity(self) -> str | None:
        return self._target.identity if self._target is not None else None

    @staticmethod
    def _identity_of(state: ServiceState) -> str | None:
        if state.phase is Phase.ABSENT or (state.container_id is None and state.container_pid is None):
            return None
        return f"{state.container_id}:{state.container_pid}"

    def _find_folder(self, state: ServiceState) -> Any:
        root, own = self._settings.paths.cgroup_root, self._own_cgroups
        folder = find_folder(root, state.cgroups, own)
        if folder is None and state.container_pid is not None:
            paths = parse_proc_cgroup(_read_text(f"/proc/{state.container_pid}/cgroup"))
            folder = find_folder(root, paths, own)
        return folder

    def _take_supervisor(self, pid: int | None) -> None:
        if pid == self._supervisor_pid:
            return
        if self._supervisor >= 0:
            os.close(self._supervisor)
        self._supervisor, self._supervisor_pid = -1, None
        if pid is None:
            return
        # A stale file may name a process number that now belongs to somebody else. Without success, tried again.
        if "serve" in _read_text(f"/proc/{pid}/cmdline"):
            with contextlib.suppress(OSError):
                self._supervisor = os.pidfd_open(pid)
                self._supervisor_pid = pid

    def _forget_target(self) -> None:
        if self._target is not None and self._target is not self._killing:
            self._target.close()
        self._target = None

    # -- actions -------------------------------------------------------------------------------------------------

    def _act(self, action: Action, now: float) -> None:
        if action is Action.SHED and not self._ask_supervisor():
            action = self._policy.no_graceful_stop(now, self._kb or 0)
        if action is Action.KILL:
            self._kill(now)
            return
        self._tell(action.value, self._policy.reason)
        if action in (Action.SHED, Action.RELEASE):
            self._save_state()

    def _ask_supervisor(self) -> bool:
        if self._supervisor < 0:
            return False
        try:
            signal.pidfd_send_signal(self._supervisor, signal.SIGTERM)
        except OSError:
            return False
        return True

    def _kill(self, now: float) -> None:
        target = self._target
        if target is None:
            return
        killed = target.kill()
        sent = time.monotonic()
        self._killing, self._killed_at, self._kill_late = target, now, False
        name = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + "-kill"
        self._tell(
            "kill",
            self._policy.reason,
            evidence=name,
            processes=killed,
            decision_to_kill_ms=round(1000 * (sent - now), 3),
            container_id=self._service.state.container_id,
        )
        self._save_state()

    def _follow_kill(self, now: float) -> None:
        target = self._killing
        assert target is not None
        if target.alive():
            target.kill()
            if not self._kill_late and now - self._killed_at > _KILL_LATE_S:
                self._kill_late = True
                self._tell("kill_failed", f"processes of the container live {_KILL_LATE_S:.0f} s after SIGKILL")
            return
        self._killing = None
        self._gone = target.identity
        if self._target is target:
            self._forget_target()
        target.close()
        self._note_guarding()
        after_ms = 1000 * (now - self._killed_at)
        self._tell("killed", f"the container's processes are gone {after_ms:.0f} ms after the kill", after_ms=after_ms)

    # -- telling -------------------------------------------------------------------------------------------------

    def _floor_kb(self) -> int | None:
        if self._phase is Phase.SERVING:
            return self._limits.floor_kb
        return self._limits.loading_floor_kb if self._phase is Phase.LOADING else None

    def _lines(self) -> str:
        floor = self._floor_kb()
        return (
            f"{self._phase.value}, MemAvailable {self._kb if self._kb is not None else 'unreadable'} kB,"
            f" floor {floor if floor is not None else 'none'}, hard floor {self._limits.hard_floor_kb} kB"
        )

    def _protection_text(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._protection.items())

    def _tell(self, event: str, reason: str, **more: Any) -> None:
        now = time.time()
        record: dict[str, Any] = {
            "event": event,
            "reason": reason,
            "unix": round(now, 3),
            "monotonic": round(time.monotonic(), 4),
            "phase": self._phase.value,
            "mem_available_kb": self._kb,
            "floor_kb": self._floor_kb(),
            "hard_floor_kb": self._limits.hard_floor_kb,
            "fall_kb_s": self._policy.fall_kb_s,
            "profile": self._service.state.profile,
            **more,
        }
        if event in ("kill", "shed", "kill_failed", "warn", "release", "lifted", "blind"):
            self._last_event = record
        self._report(record)

    def _report(self, event: dict[str, Any] | None) -> None:
        carried = self._policy.carried
        message: dict[str, Any] = {
            "phase": self._phase.value,
            "near": self._policy.near,
            "container_id": self._service.state.container_id,
            "values": {
                "guarding": int(self._guarding is True),
                "unguarded": int(self._guarding is False),
                "mem_available_kb": self._kb or 0,
                "floor_kb": self._floor_kb() or 0,
                "hard_floor_kb": self._limits.hard_floor_kb,
                "hold_kb": carried.hold_kb or 0,
                "latched": int(carried.latched),
                "kills_total": carried.kills,
                "sheds_total": carried.sheds,
                "readings_total": self._readings,
                "unreadable_total": self._unreadable,
                "pressure_total": self._pressures,
                "messages_lost_total": self._secretary.lost,
                "last_report_seconds": int(time.time()),
            },
        }
        if event is not None:
            message["event"] = event
            if "evidence" in event:
                message["meminfo"] = self._meminfo.text()
        self._secretary.send(message)

    def _save_state(self) -> None:
        carried = self._policy.carried
        # A latch is a hold that no host reaches, so a reader that knows only the hold obeys it too.
        hold_kb = self._meminfo.total_kb + 1 if carried.latched else carried.hold_kb
        state = {
            "pid": os.getpid(),
            "boot_id": self._boot_id,
            "unix": round(time.time(), 3),
            "phase": self._phase.value,
            "guarding": self._guarding,
            "mem_available_kb": self._kb,
            "floor_kb": self._floor_kb(),
            "hard_floor_kb": self._limits.hard_floor_kb,
            "last_event": self._last_event,
            "kills": carried.kills,
            "sheds": carried.sheds,
            "stops_in_window": carried.stops_since(time.monotonic() - self._limits.budget_window_s),
            "budget": self._limits.budget,
            "hold_until_available_kb": hold_kb,
            "latched": carried.latched,
            "protection": self._protection,
            "carried": asdict(carried),
        }
        with contextlib.suppress(OSError):
            write_atomic(self._settings.paths.state, json.dumps(state) + "\n")


def _is_gone(path: str) -> bool:
    """Whether it surely does not exist; an error says nothing."""
    try:
        Path(path).stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _read_text(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, 65536).decode("utf-8", "replace")
    except OSError:
        return ""
    finally:
        os.close(fd)
