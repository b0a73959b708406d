"""The life of reap.service's main process: gate, container, first answer, watch, drain, removal.

systemd sees Type=notify: READY=1 is said after the model has answered a request. Exit statuses are what the unit's
Restart= policy tells apart: see the constants.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

# Everything this process needs later is imported here and now: a new provision replaces the program's archive while
# the model is being served, and an import from a replaced archive fails.
from ..errors import ReapError
from ..memory import start_gate
from . import cgroups, evidence, shm
from .aftermath import note_of_return
from .cleanup import clean_up
from .config import CONTAINER_NAME, ServiceConfig, Timings
from .docker import Docker, DockerDown, run_command
from .failure import Failure, Restarts, Stopped
from .gate import Gate
from .generations import Generations
from .host import drop_page_cache, key_mtime_ns, mem_available_kb, port_taken, require_parts
from .notify import Notifier
from .probe import Endpoint, parse_metrics
from .progress import LoadProgress
from .state import ServiceState, write_json, write_text
from .watchdog import differs, give_back, guards, missing, state_of

STOPPED = 0
FAILED = 1
"""The model ended or did not start: systemd starts again, after the backoff."""
LATCHED = 76
"""Too many failures: systemd leaves it (RestartPreventExitStatus=) until a person or a provision starts it."""
WRONG = 78
"""It cannot work as configured: systemd leaves it."""

UNIT = "reap.service"
PATIENCE_S = 60
"""Given to systemd with every sign of life while a start or stop goes on."""

SILENCE_S = 20.0
"""How long a stop waits for a server that does not say how many requests run: busy cores can cost it seconds."""

TIMINGS_S = 10.0
"""How often the times are read again while the model serves."""


class Supervisor:
    """One run of ``reap serve``."""

    def __init__(
        self,
        config_path: Path,
        *,
        docker: Docker | None = None,
        notifier: Notifier | None = None,
        tick_s: float = 1.0,
        automatic_restart: bool | None = None,
    ) -> None:
        self._config_path = config_path
        self._docker = docker or Docker()
        self._notifier = notifier or Notifier()
        self._tick_s = tick_s
        self._automatic = _automatic_restart() if automatic_restart is None else automatic_restart
        self._stop_asked = threading.Event()
        self._stop_signals = 0
        self._wanted = ServiceConfig.read(config_path)
        run_dir = Path(self._wanted.run_dir)
        self._run_dir = run_dir
        self._state = ServiceState(run_dir / "service.json", CONTAINER_NAME)
        self._progress_path = run_dir / "progress" / "model_load.json"
        self._restarts = Restarts(run_dir / "restarts.json")
        self._generations = Generations(Path(self._wanted.state_dir), lambda text: self._say(text, error=True))
        self._client: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._tail: deque[str] = deque(maxlen=200)
        self._load = LoadProgress()
        self._segments: set[str] = set()
        self._watchdog_before: dict[str, Any] = {}
        self._gate = Gate(run_dir / "gate")
        self._is_ready = False

    def run(self) -> int:
        """Serve until asked to stop or until serving fails; returns the exit status."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        timings = self._wanted.timings
        try:
            note_of_return(self._run_dir).unlink(missing_ok=True)
            if not self._automatic:
                self._restarts.clear()
            failures = self._restarts.recent(timings.restart_window_s)
            if len(failures) >= timings.restart_limit:
                return self._latch(*_too_many(failures[-1]["reason"], len(failures)))
            self._pause(timings.backoff(len(failures)), f"restart {len(failures)} of {timings.restart_limit - 1}")
            self._serve_one_of_them()
        except Stopped:
            self._tear_down()
            self._say("stopped")
            self._state.publish(phase="absent", detail="stopped", progress=None)
            # The count stays: systemd ends a start that takes too long by the same signal and starts again. A start by
            # a person, a provision or the boot begins a new one.
            return STOPPED
        except Failure as failure:
            return self._fail(failure)
        except Exception as error:
            # A full disk, a mistake in this program: it counts like any failure, or systemd would start it for ever.
            traceback.print_exc()
            return self._fail(Failure(f"the program failed: {type(error).__name__}: {error}", blames=False))
        finally:
            self._tear_down()
        raise AssertionError("serving ends by an exception")

    # ---- what to serve -------------------------------------------------------------------------------------------

    def _serve_one_of_them(self) -> None:
        """Serve what is wanted; where that never served and fails, serve what served before."""
        wanted, name = self._wanted, self._wanted.generation
        reason = self._generations.failure(name)
        if reason is None:
            self._generations.begin(name)
            reason = self._generations.failure(name)
        previous = self._generations.previous(name)
        if reason is None or previous is None:
            try:
                self._serve(wanted, None)
            except Stopped:
                self._generations.undone(name)
                raise
            except Failure as failure:
                if name in self._generations.good or not failure.blames:
                    self._generations.undone(name)
                    raise
                reason = str(failure)
                self._generations.failed(name, reason)
                if previous is None:
                    raise
                self._tear_down()
                self._say(f"generation {name} failed: {reason}; going back to {previous.generation}", error=True)
        assert previous is not None
        self._give_back_the_watchdog(previous)
        try:
            # With the times of now: they belong to the host, not to the generation.
            self._serve(replace(previous, timings=wanted.timings), {"generation": name, "reason": reason})
        except Failure as failure:
            text = f"generation {name} failed: {reason}; the previous one, {previous.generation}, failed too: {failure}"
            raise Failure(text, permanent=failure.permanent) from failure

    def _give_back_the_watchdog(self, config: ServiceConfig) -> None:
        """A provision has given the watchdog the floor of the generation that failed: this one may need another."""
        settings = self._generations.watchdog_settings(config.generation)
        if settings is None or not differs(config, settings):
            return
        try:
            give_back(config, settings)
            self._say(f"the watchdog guards by the settings of {config.generation} again")
        except ReapError as error:
            self._say(str(error), error=True)

    def _serve(self, config: ServiceConfig, replaced: dict[str, str | None] | None) -> None:
        """Load one configuration and serve it; ends by Stopped or Failure only."""
        try:
            self._load_and_watch(config, replaced)
        except Stopped:
            self._tear_down()
            shed = self._shed()
            # A second signal is systemd's or a person's: they want it stopped.
            if shed is None or self._stop_signals > 1:
                raise
            self._stop_signals = 0
            self._stop_asked.clear()
            raise Failure(shed) from None
        except DockerDown as down:
            raise Failure(str(down), blames=False) from down
        except ReapError as error:
            raise Failure(str(error), permanent=True) from error

    def _load_and_watch(self, config: ServiceConfig, replaced: dict[str, str | None] | None) -> None:
        self._state.publish(
            phase="absent",
            generation=config.generation,
            profile=config.profile,
            served_model_name=config.served_model_name,
            image=config.image,
            endpoint=config.endpoint,
            replaced=replaced,
            detail="preparing",
            container_id=None,
            container_pid=None,
            cgroup=cgroups.NOWHERE,
            started_unix=None,
        )
        key = self._prepare(config)
        if config.drop_page_cache:
            drop_page_cache()
        self._pass_gate(config)
        self._launch(config, key)
        deadline = time.monotonic() + config.timings.start_timeout_s
        self._note_container(deadline)
        self._await_answer(config, key, deadline)
        self._generations.serves(config)
        self._report_load("done")
        text = f"serving {config.served_model_name} on {config.endpoint}, generation {config.generation}"
        if replaced:
            text += f"; NOT {replaced['generation']}, which failed: {replaced['reason']}"
        self._state.publish(phase="serving", detail=text, progress=None)
        self._say(text)
        self._notifier.send("READY=1")
        self._is_ready = True
        self._watch(config, key)

    # ---- before the load -----------------------------------------------------------------------------------------

    def _prepare(self, config: ServiceConfig) -> str | None:
        """Make sure of everything that can be known before the load; returns the API key."""
        self._await_engine()
        self._remove_leftovers()
        key = require_parts(config, self._docker)
        self._state.publish(key_mtime_ns=key_mtime_ns(config), image_id=self._docker.image_id(config.image))
        taken = port_taken(config.host, config.port)
        if taken:
            raise Failure(taken, blames=False)
        Path(config.cache_dir).mkdir(parents=True, exist_ok=True)
        return key

    def _await_engine(self) -> None:
        """The engine may still be coming up after a reboot or its own restart."""
        deadline = time.monotonic() + PATIENCE_S
        while fault := self._docker.fault():
            if time.monotonic() > deadline:
                raise Failure(f"the container engine does not answer: {fault}", blames=False)
            self._wait(f"waiting for the container engine: {fault}")

    def _remove_leftovers(self) -> None:
        found = self._docker.find(CONTAINER_NAME)
        if found and found.generation is None:
            text = f"a container named {CONTAINER_NAME} is there that this service did not make; remove it"
            raise Failure(f"{text}: docker rm -f {CONTAINER_NAME}", permanent=True, blames=False)
        clean_up(self._docker, self._run_dir)

    def _pass_gate(self, config: ServiceConfig) -> None:
        """Wait for memory that a killed model still holds, then ask whether the profile fits."""
        begun = time.monotonic()
        while True:
            self._watchdog_before = watchdog = state_of(self._run_dir)
            if watchdog.get("latched"):
                why = (watchdog.get("last_event") or {}).get("reason", "its budget of stops is spent")
                raise Failure(f"the memory watchdog allows no start: {why}", blames=False, latches=True)
            unguarded = missing(config)
            if unguarded:
                if time.monotonic() - begun >= min(PATIENCE_S, config.timings.memory_wait_s):
                    raise Failure(unguarded, blames=False)
                self._wait(f"waiting for the watchdog: {unguarded}")
                continue
            hold = watchdog.get("hold_until_available_kb")
            available = mem_available_kb()
            refusal, ledger = None, None
            # A watchdog that lives says itself when memory has come back to stay; of one that is gone, only what it
            # asked for is known.
            if hold is not None and (guards(watchdog) or available < int(hold)):
                refusal = f"{available} kB available, the watchdog asks for {hold} kB before the next start"
            elif config.fit is not None:
                gate = start_gate(config.fit, hold_until_available_kb=hold)
                if gate.allowed:
                    print(gate.text, flush=True)
                    return
                refusal, ledger = gate.message, gate.text
            if refusal is None:
                return
            if time.monotonic() - begun > config.timings.memory_wait_s:
                if ledger:
                    print(ledger, flush=True)
                raise Failure(f"memory gate: {refusal}")
            self._wait(f"waiting for memory: {refusal}", self._tick_s * 5)

    # ---- the load ------------------------------------------------------------------------------------------------

    def _launch(self, config: ServiceConfig, key: str | None) -> None:
        environment_file = None
        if key:
            environment_file = self._run_dir / "model.env"
            write_text(environment_file, f"VLLM_API_KEY={key}\n", 0o600)
        self._gate.open()
        image_environment = self._docker.image_environment(config.image)
        self._tail.clear()
        self._load = LoadProgress()
        self._segments = set()
        self._state.publish(phase="loading", detail="starting the container", progress=self._load.to_mapping())
        command = run_command(config, environment_file, self._gate.folder, image_environment, self._docker.binary)
        self._client = subprocess.Popen(
            # Dies with this process, so that nothing but the container is left of a killed one: on cgroup v1 systemd
            # waits for a whole stop timeout for any other process to be gone.
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A signal to this process's group must not reach the client: the stop is this process's own business.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, args=(self._client, self._load), daemon=True)
        self._reader.start()

    def _note_container(self, deadline: float) -> None:
        """Publish where the container's processes are, so that the watchdog can reach them without the engine."""
        while True:
            self._raise_if_over()
            found = self._docker.find(CONTAINER_NAME)
            if found and found.pid:
                break
            if time.monotonic() > deadline:
                raise Failure("the container engine did not start the container in time", blames=False)
            self._wait("starting the container", self._tick_s / 5)
        (self._run_dir / "model.env").unlink(missing_ok=True)
        self._state.publish(
            container_id=found.id,
            container_pid=found.pid,
            cgroup=cgroups.of_process(found.pid),
            started_unix=time.time(),
        )

    def _await_answer(self, config: ServiceConfig, key: str | None, deadline: float) -> None:
        """Wait until the model has answered; the request is made aside, so that a signal is heard meanwhile."""
        endpoint = Endpoint(config.endpoint, key)
        outcome: list[str | None] = []
        asking: threading.Thread | None = None

        def ask() -> None:
            fault = endpoint.fault(config.served_model_name, max(5.0, deadline - time.monotonic()))
            outcome.append(fault)

        while True:
            self._raise_if_over()
            if asking is None and endpoint.healthy(2.0):
                self._load.read("Application startup complete")
                asking = threading.Thread(target=ask, daemon=True)
                asking.start()
            elif outcome and outcome[0] is None:
                return
            elif outcome:
                raise Failure(f"the model is up and does not answer as it should: {outcome[0]}")
            if time.monotonic() > deadline:
                last = self._tail[-1] if self._tail else "nothing logged"
                limit = config.timings.start_timeout_s
                raise Failure(f"no answer within {limit} s ({self._load.text()}); last log line: {last}")
            self._note_segments()
            self._state.publish(detail=self._load.text(), progress=self._load.to_mapping())
            self._report_load("running")
            self._wait(self._load.text())

    def _read_log(self, client: subprocess.Popen[bytes], load: LoadProgress) -> None:
        """Hand the container's output to the journal; a progress bar's redraws only every 10 s."""
        assert client.stdout is not None
        last_redraw = 0.0
        pending = b""
        while chunk := os.read(client.stdout.fileno(), 65536):
            pending += chunk
            while (cut := _line_end(pending)) is not None:
                raw, redraw, pending = pending[:cut], pending[cut : cut + 1] == b"\r", pending[cut + 1 :]
                line = raw.decode(errors="replace").rstrip()
                if not line:
                    continue
                load.read(line)
                if redraw:
                    if time.monotonic() - last_redraw < 10:
                        continue
                    last_redraw = time.monotonic()
                self._tail.append(line)
                print(line, flush=True)

    def _report_load(self, state: str, error: str | None = None) -> None:
        content: dict[str, Any] = {
            "step": "model_load",
            "state": state,
            "rate": None,
            "eta_s": None,
            "source": "disk",
            "error": error,
        }
        mapping = self._load.to_mapping()
        content |= {key: mapping[key] for key in ("done", "total", "unit")}
        content |= {"detail": self._load.text(), "updated_unix": time.time()}
        write_json(self._progress_path, content)

    # ---- serving -------------------------------------------------------------------------------------------------

    def _watch(self, config: ServiceConfig, key: str | None) -> None:
        """Until the container ends, a stop is asked for, or the engine stands still with a request to answer.

        An engine that stopped while it was idle reports no request, however many wait in the API server: vLLM counts
        what the engine last told. So a quiet engine is asked for a few tokens now and then.
        """
        endpoint = Endpoint(config.endpoint, key)
        position: tuple[int, float] | None = None
        moved = waiting_since = time.monotonic()
        looked = read = 0.0
        stall_s = config.timings.stall_s
        asking: threading.Thread | None = None
        samples: deque[dict[str, Any]] = deque(maxlen=200)
        while True:
            self._raise_if_over()
            now = time.monotonic()
            if now - read >= TIMINGS_S:
                # They may change while the model serves, without a new generation.
                read, stall_s = now, self._timings().stall_s
            if stall_s and now - looked >= min(10.0, stall_s / 4):
                looked = now
                self._note_segments()
                metrics = endpoint.metrics()
                activity = parse_metrics(metrics)
                samples.append({"unix": round(time.time(), 3), **(vars(activity) if activity else {})})
                if activity is not None and activity.position != position:
                    position, moved = activity.position, now
                # A server that lives and does not even give its metrics is wedged like one that stands still.
                asked = asking is not None and asking.is_alive()
                if activity is not None and not activity.busy and not asked:
                    waiting_since = now
                    if now - moved > stall_s:
                        asking = threading.Thread(
                            target=endpoint.fault, args=(config.served_model_name, 2.0 * stall_s), daemon=True
                        )
                        asking.start()
                elif now - max(moved, waiting_since) > stall_s:
                    what = "/metrics does not answer" if activity is None else "a request waits"
                    idle_s = now - max(moved, waiting_since)
                    reason = f"wedged: {what} and nothing moved for {idle_s:.0f} s"
                    raise Failure(reason + self._keep_evidence(config, reason, samples, metrics), blames=False)
            self._stop_asked.wait(self._tick_s)

    def _keep_evidence(self, config: ServiceConfig, reason: str, samples: deque[dict[str, Any]], metrics: str) -> str:
        """Save what is seen of a wedged engine; returns where, as the end of a sentence."""
        bundle = evidence.collect(
            reason=reason,
            state=self._state.content,
            samples=samples,
            metrics=metrics,
            container_state=self._docker.state(CONTAINER_NAME),
            log=list(self._tail),
            pids=cgroups.processes(self._state["cgroup"]),
        )
        try:
            return f"; evidence: {evidence.save(Path(config.evidence_dir), bundle)}"
        except OSError as error:
            return f"; no evidence kept: {error}"

    def _note_segments(self) -> None:
        found = self._segments | shm.mapped(cgroups.processes(self._state["cgroup"]))
        if found != self._segments:
            self._segments = found
            write_json(self._run_dir / "segments.json", {"names": sorted(found)})

    # ---- the end -------------------------------------------------------------------------------------------------

    def _tear_down(self) -> None:
        """Drain when serving, stop, kill what is left, remove what it left behind."""
        client, self._client = self._client, None
        if client is None:
            return
        timings = self._timings()
        if client.poll() is None:
            serving = self._state["phase"] == "serving"
            self._state.publish(phase="stopping", detail="stopping", progress=None)
            # Not on the way to the generation before: some systemd hears no READY=1 after it.
            if self._is_ready or self._stop_asked.is_set():
                self._notifier.send("STOPPING=1")
            if serving and self._stop_asked.is_set():
                self._drain(timings.drain_s)
            self._note_segments()
            self._notifier.extend(timings.grace_s + PATIENCE_S)
            try:
                # vLLM has been seen to hang on SIGTERM while a client is connected: the grace bounds it.
                self._docker.stop(CONTAINER_NAME, timings.grace_s)
            except DockerDown as down:
                self._say(f"{down}; killing the container's processes without it", error=True)
                cgroups.kill(self._state["cgroup"])
        self._notifier.extend(PATIENCE_S)
        clean_up(self._docker, self._run_dir, self._state["cgroup"])
        try:
            client.wait(15)
        except subprocess.TimeoutExpired:
            client.kill()
            client.wait()
        if self._reader:
            self._reader.join(5)
        self._state.publish(phase="absent", container_id=None, container_pid=None, cgroup=cgroups.NOWHERE)

    def _drain(self, drain_s: float) -> None:
        """Refuse new requests and let running ones go on for their time; after a shed there is none."""
        self._gate.shut()
        endpoint = Endpoint(self._state["endpoint"])
        deadline = time.monotonic() + drain_s
        answered = time.monotonic()
        while (left := deadline - (now := time.monotonic())) > 0:
            inside = endpoint.requests_inside()
            refused = "" if inside is None else ", new ones are refused"
            if inside is None and (activity := endpoint.activity(2.0)):
                # No answer from the door; the engine's own count misses what has not reached it or not left the server.
                inside = activity.running + activity.waiting
            if inside is not None:
                answered = now
            silent = inside is None and now - answered < SILENCE_S
            if not (inside or silent) or self._shed() or (self._client and self._client.poll() is not None):
                return
            text = f"stopping: {inside} requests have {left:.0f} s left{refused}"
            if silent:
                text = f"stopping: the server does not say whether requests run; they have {left:.0f} s left"
            self._state.publish(detail=text)
            self._notifier.status(text)
            self._notifier.extend(PATIENCE_S)
            time.sleep(min(self._tick_s, left))

    def _fail(self, failure: Failure) -> int:
        """Record why, and choose the exit status."""
        reason = " ".join(str(failure).split())
        timings = self._timings()
        self._report_load("failed", reason)
        if failure.latches:
            return self._latch(
                f"because {reason}", f"playbooks/start.yml, or: reap watch --lift; systemctl start {UNIT}"
            )
        if not failure.permanent:
            count = self._restarts.add(reason, timings.restart_window_s)
            if count >= timings.restart_limit:
                return self._latch(*_too_many(reason, count))
            text, status = f"failed ({count} of {timings.restart_limit}): {reason}", FAILED
        else:
            text, status = f"cannot start: {reason}", WRONG
        self._say(text, error=True)
        self._tear_down()
        self._state.publish(phase="absent", detail=text, progress=None)
        return status

    def _latch(self, why: str, remedy: str) -> int:
        text = f"latched {why}. Lift with: {remedy}"
        self._say(text, error=True)
        self._tear_down()
        self._state.publish(phase="absent", detail=text, progress=None)
        return LATCHED

    # ---- waiting -------------------------------------------------------------------------------------------------

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stop_signals += 1
        self._stop_asked.set()

    def _wait(self, status: str, seconds: float | None = None) -> None:
        """One tick of a start: systemd hears that it goes on."""
        self._notifier.status(status)
        self._notifier.extend(PATIENCE_S)
        if self._stop_asked.wait(self._tick_s if seconds is None else seconds):
            raise Stopped

    def _pause(self, seconds: float, why: str) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            text = f"{why} in {left:.0f} s"
            self._state.publish(phase="absent", detail=text)
            self._wait(text, min(self._tick_s, left))

    def _raise_if_over(self) -> None:
        if self._stop_asked.is_set():
            raise Stopped
        client = self._client
        if client is None or client.poll() is None:
            return
        raise Failure(self._ending(client.returncode))

    def _ending(self, status: int) -> str:
        """Why the container ended, as far as anybody knows."""
        killed = self._watchdog_did("kills")
        if killed is not None:
            return f"the memory watchdog stopped the model: {killed}"
        doing = "serving" if self._state["phase"] == "serving" else self._load.text()
        # The reader may be a moment behind the client's end.
        end = time.monotonic() + 10
        while self._reader and self._reader.is_alive() and time.monotonic() < end:
            self._reader.join(0.1)
        told = self._load.error or (self._tail[-1] if self._tail else "nothing logged")
        # The engine's client gives the container's status: 128 + signal where a signal ended it.
        signalled = status - 128 if status > 128 else -status
        how = f"was killed by signal {signalled}" if signalled > 0 else f"ended with exit status {status}"
        return f"the container {how} while {doing}: {told}"

    def _shed(self) -> str | None:
        """Why the watchdog asked for this stop, or nothing where it did not. It writes that just after its signal."""
        shed = self._watchdog_did("sheds")
        return None if shed is None else f"the memory watchdog asked for a stop: {shed}"

    def _watchdog_did(self, counter: str) -> str | None:
        """The reason of the watchdog's last event, where a counter of its grew since this load began."""
        watchdog = state_of(self._run_dir)
        if int(watchdog.get(counter) or 0) <= int(self._watchdog_before.get(counter) or 0):
            return None
        event = watchdog.get("last_event") or {}
        return str(event.get("reason") or event)

    def _timings(self) -> Timings:
        """Times as the file has them now: they may have changed without a new generation."""
        try:
            return ServiceConfig.read(self._config_path).timings
        except ReapError:
            return self._wanted.timings

    def _say(self, text: str, error: bool = False) -> None:
        """One line for the journal and for ``systemctl status``."""
        print(f"reap serve: {text}", file=sys.stderr if error else sys.stdout, flush=True)
        self._notifier.status(text)


def _too_many(reason: str, count: int) -> tuple[str, str]:
    """Why the service latches after so many failures, and what lifts that."""
    return f"after {count} failures, the last: {reason}", f"systemctl start {UNIT}"


def _automatic_restart() -> bool:
    """Whether systemd started this by its Restart= policy, and not a person, a provision or the boot."""
    command = ["systemctl", "show", "--property=NRestarts", "--value", UNIT]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return False
    return shown.isdigit() and int(shown) > 0


def _line_end(data: bytes) -> int | None:
    """Where the first line ends: at a line feed, or at the carriage return of a progress bar."""
    ends = [place for place in (data.find(b"\n"), data.find(b"\r")) if place >= 0]
    return min(ends) if ends else None
