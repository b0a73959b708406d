"""The watchdog as a process: a real kill of real processes, with a meminfo file that the test writes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reap.cli import status
from reap.watch.config import load
from reap.watch.loop import Guardian
from reap.watch.policy import Action

REPOSITORY = Path(__file__).parents[3]
FLOOR, LOADING, HARD = 800_000, 700_000, 300_000
AWAIT_S = 120.0


def await_true(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + AWAIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {AWAIT_S:.0f} s for: {what}"
        time.sleep(0.01)


class Host:
    """A host as the watchdog sees it: meminfo, service.json, one container with one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meminfo = folder / "meminfo"
        self.events_file = folder / "log" / "events.jsonl"
        self.state_file = folder / "run" / "watchdog.json"
        self.service_file = folder / "run" / "service.json"
        self.evidence = folder / "evidence" / "watchdog"
        (folder / "run").mkdir()
        self.set_memory(2_000_000)
        self.guard: subprocess.Popen[str] | None = None
        self.children: list[subprocess.Popen[bytes]] = []
        self.settings = folder / "watchdog.toml"
        self.write_settings()

    def write_settings(self, extra: str = "") -> None:
        self.settings.write_text(
            f"""floor_kb = {FLOOR}
loading_floor_kb = {LOADING}
hard_floor_kb = {HARD}
worst_fall_kb_s = 2000000
warn_margin_kb = 100000
return_stable_s = 0.2
shed_grace_s = 1.0
realtime = false
{extra}
[paths]
service_state = "{self.service_file}"
state = "{self.state_file}"
metrics = "{self.folder}/run/watchdog.prom"
events = "{self.events_file}"
evidence = "{self.evidence}"
evidence_fallback = "{self.folder}/run/evidence"
meminfo = "{self.meminfo}"
cgroup_root = "{self.folder}/cgroup"
docker_data = "{self.folder}/docker"
"""
        )

    def set_memory(self, kb: int | None) -> None:
        """One write of a fixed length, so that a reading sees the old or the new number."""
        number = "        garbage" if kb is None else f"{kb:15d}"
        text = f"MemTotal:       {4_000_000:15d} kB\nMemAvailable:   {number} kB\n"
        fd = os.open(self.meminfo, os.O_WRONLY | os.O_CREAT)
        os.write(fd, text.encode())
        os.close(fd)

    def child(self, *command: str) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.children.append(child)
        return child

    def container(self, container_id: str = "c" * 64) -> subprocess.Popen[bytes]:
        """A process in a folder that looks like its v1 cgroup; /proc cannot be made to look like a container."""
        process = self.child("sleep", "300")
        folder = self.folder / "cgroup" / "pids" / "docker" / container_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.procs").write_text(f"{process.pid}\n")
        return process

    def await_killed(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for SIGKILL, then do what the kernel does: take the dead process out of cgroup.procs."""
        assert process.wait(timeout=AWAIT_S) == -signal.SIGKILL
        for procs in (self.folder / "cgroup" / "pids" / "docker").glob("*/cgroup.procs"):
            procs.write_text("")

    def serve(self, phase: str, process: subprocess.Popen[bytes] | None, supervisor: int | None = None) -> None:
        container_id = "c" * 64 if process is not None else None
        state = {
            "phase": phase,
            "pid": supervisor,
            "container_id": container_id,
            "container_pid": process.pid if process is not None else None,
            "cgroup": {"v2": None, "v1": {"pids": f"/docker/{container_id}"}},
            "profile": "test",
            "boot_id": "",
        }
        self.tell_service(json.dumps(state))

    def tell_service(self, text: str) -> None:
        beside = self.service_file.with_suffix(".new")
        beside.write_text(text)
        beside.replace(self.service_file)

    def start(self) -> subprocess.Popen[str]:
        starts = len(self.events("start"))
        self.guard = subprocess.Popen(
            [sys.executable, "-m", "reap", "watch", "--config", str(self.settings)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "plugins/module_utils")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        await_true(lambda: len(self.events("start")) > starts, "the watchdog's start")
        return self.guard

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        if not self.events_file.exists():
            return []
        # What is written at this moment may be there by half.
        whole, _, _ = self.events_file.read_text().rpartition("\n")
        events = [json.loads(line) for line in whole.splitlines()]
        return [event for event in events if kind is None or event["event"] == kind]

    def phase(self) -> str:
        """The phase of the last change of phase."""
        changes = self.events("phase")
        return changes[-1]["phase"] if changes else ""

    def writer(self) -> int:
        """The writing process: the only child of the keeper, which is the only child of the guarding process."""
        assert self.guard is not None
        pid = self.guard.pid
        for _ in range(2):
            (pid,) = (int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return pid

    def metric(self, name: str) -> int:
        text = (self.folder / "run" / "watchdog.prom").read_text()
        return int(text.partition(f"\nreap_watchdog_{name} ")[2].split()[0])

    def await_guarding(self, phase: str) -> None:
        """Wait until the loop has read MemAvailable in this phase; watchdog.json is written before it begins, too."""
        await_true(lambda: self.state().get("phase") == phase, "the phase in watchdog.json")
        prom = self.folder / "run" / "watchdog.prom"
        await_true(lambda: prom.exists() and self.metric("readings_total") > 0, "the first reading")

    def state(self) -> dict[str, Any]:
        try:
            loaded: dict[str, Any] = json.loads(self.state_file.read_text())
        except (OSError, ValueError):
            return {}
        return loaded

    def stop(self) -> None:
        if self.guard is not None and self.guard.poll() is None:
            self.guard.terminate()
            self.guard.communicate(timeout=AWAIT_S)
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            child.wait()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.stop()


def serving(host: Host, phase: str = "serving") -> subprocess.Popen[bytes]:
    process = host.container()
    host.serve(phase, process)
    host.start()
    host.await_guarding(phase)
    return process


def test_a_crossed_floor_kills_the_container_and_leaves_evidence_and_a_hold(host: Host) -> None:
    process = serving(host)
    host.set_memory(310_000)
    host.await_killed(process)
    await_true(lambda: host.events("kill"), "the kill in the events file")
    (kill,) = host.events("kill")
    assert kill["mem_available_kb"] == 310_000
    assert "kill: MemAvailable" in kill["reason"]
    await_true(lambda: host.events("killed"), "the word that the processes are gone")
    state = host.state()
    assert state["kills"] == 1
    assert state["hold_until_available_kb"] > 310_000
    assert state["last_event"]["event"] == "kill"
    bundle_file = host.evidence / kill["evidence"] / "bundle.json"
    await_true(bundle_file.exists, "the evidence bundle")
    assert status.collect(host.folder / "run", host.folder / "evidence")["evidence"] == str(bundle_file)
    bundle = json.loads(bundle_file.read_text())
    assert bundle["meminfo"][1].split()[1] == "310000"
    assert bundle["series"][0][1] == 2_000_000
    assert bundle["series"][-1][1] == 310_000
    assert bundle["processes_after"]
    metrics = (host.folder / "run" / "watchdog.prom").read_text()
    assert "reap_watchdog_kills_total 1\n" in metrics


def test_a_hold_ends_only_when_memory_is_back(host: Host) -> None:
    process = serving(host)
    host.set_memory(310_000)
    host.await_killed(process)
    await_true(lambda: host.state().get("hold_until_available_kb"), "the hold")
    host.serve("absent", None)
    host.set_memory(1_900_000)
    await_true(lambda: host.events("release"), "the release")
    await_true(lambda: host.state()["hold_until_available_kb"] is None, "no hold in watchdog.json")


def test_a_planned_stop_below_the_floor_is_no_kill(host: Host) -> None:
    process = serving(host)
    host.serve("stopping", process)
    await_true(lambda: host.phase() == "stopping", "the phase event")
    host.set_memory(FLOOR - 200_000)
    host.serve("absent", process)
    await_true(lambda: host.phase() == "absent", "the phase event")
    assert process.poll() is None
    assert not host.events("kill")
    assert not host.events("shed")


def test_a_slow_crossing_asks_the_supervisor_and_kills_when_it_does_not_help(host: Host) -> None:
    process = host.container()
    script = "import signal,sys; signal.signal(15, lambda *_: print('asked', flush=True)); print('up', flush=True)\n"
    supervisor = host.child(sys.executable, "-c", script + "while True: signal.pause()", "serve")
    assert supervisor.stdout is not None
    assert supervisor.stdout.readline() == b"up\n"
    host.set_memory(FLOOR + 5_000)
    host.serve("serving", process, supervisor.pid)
    host.start()
    host.await_guarding("serving")
    host.set_memory(FLOOR - 5_000)
    assert supervisor.stdout.readline() == b"asked\n"
    host.await_killed(process)
    await_true(lambda: host.events("kill"), "the kill in the events file")
    shed, kill = (event for event in host.events() if event["event"] in ("shed", "kill"))
    assert (shed["event"], kill["event"]) == ("shed", "kill")
    # The supervisor was given its time (`shed_grace_s`).
    assert kill["monotonic"] - shed["monotonic"] >= 1.0


def test_without_a_supervisor_a_slow_crossing_is_a_kill(host: Host) -> None:
    process = host.container()
    host.set_memory(FLOOR + 5_000)
    host.serve("serving", process)
    host.start()
    host.await_guarding("serving")
    host.set_memory(FLOOR - 5_000)
    host.await_killed(process)
    await_true(lambda: host.events("kill"), "the kill in the events file")
    assert "no supervisor" in host.events("kill")[0]["reason"]


def test_unreadable_memory_stops_nothing(host: Host) -> None:
    process = serving(host)
    host.set_memory(None)
    await_true(lambda: host.events("blind"), "the word that memory cannot be read")
    host.set_memory(2_000_000)
    await_true(lambda: host.events("seeing"), "the word that it can be read again")
    assert process.poll() is None
    assert not host.events("kill")


def test_after_kill_9_the_next_instance_knows_the_hold_and_guards_the_next_container(host: Host) -> None:
    process = serving(host)
    host.set_memory(310_000)
    host.await_killed(process)
    await_true(lambda: host.state().get("kills") == 1, "the kill in watchdog.json")
    hold = host.state()["hold_until_available_kb"]
    assert host.guard is not None
    host.guard.kill()
    host.guard.communicate(timeout=AWAIT_S)
    host.start()
    assert host.state()["hold_until_available_kb"] == hold
    assert host.state()["kills"] == 1
    following = host.container()
    host.serve("serving", following)
    await_true(lambda: host.phase() == "serving", "the phase")
    host.set_memory(200_000)
    host.await_killed(following)


def test_a_spent_budget_latches_until_it_is_lifted(host: Host) -> None:
    host.write_settings("budget = 1\ncooldown_s = 0.01")
    host.start()
    for count in (1, 2):
        host.set_memory(2_000_000)
        process = host.container()
        host.serve("serving", process)
        await_true(lambda: host.phase() == "serving", "the phase")
        host.set_memory(200_000)
        host.await_killed(process)
        await_true(lambda count=count: host.state().get("kills") == count, "the kill")  # type: ignore[misc]
        host.serve("absent", None)
        await_true(lambda: host.phase() == "absent", "the phase")
    assert host.state()["latched"]
    assert host.state()["hold_until_available_kb"] > 4_000_000
    found = status.collect(host.folder / "run", host.folder / "evidence")
    line = status.one_line(found)
    assert "watchdog on guard, 2 kills, 2 of 1 stops in the budget's window; LATCHED" in line
    assert re.search(r"its last decision, \d+ (s|min) ago: kill: MemAvailable 195 MiB is below", line)
    done = subprocess.run(
        [sys.executable, "-m", "reap", "watch", "--config", str(host.settings), "--lift"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "plugins/module_utils")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # It ends when the lift is there, so that a start right after it is not held any more.
    state = host.state()
    assert (state["hold_until_available_kb"], state["latched"], state["stops_in_window"]) == (None, False, 0)
    await_true(lambda: host.events("lifted"), "the lift in the events file")


def test_a_container_that_is_not_found_at_first_is_said_and_guarded_as_soon_as_it_is(host: Host) -> None:
    process = host.child("sleep", "300")
    host.serve("serving", process)
    host.start()
    await_true(lambda: host.state().get("guarding") is False, "the word that it is not guarded")
    (problem,) = host.events("problem")
    assert "NOT GUARDED" in problem["reason"]
    host.set_memory(310_000)
    folder = host.folder / "cgroup/pids/docker" / ("c" * 64)
    folder.mkdir(parents=True)
    (folder / "cgroup.procs").write_text(f"{process.pid}\n")
    host.await_killed(process)
    await_true(lambda: host.events("kill"), "the kill in the events file")
    said = [event["event"] for event in host.events() if event["event"] in ("problem", "found", "kill")]
    assert said == ["problem", "found", "kill"]
    await_true(lambda: host.state()["guarding"] is None, "nothing to guard after the kill")


def test_a_container_whose_end_was_seen_wrongly_is_guarded_again(host: Host) -> None:
    """An empty list of processes for a moment, for whatever reason: it is looked at again."""
    process = serving(host)
    procs = host.folder / "cgroup/pids/docker" / ("c" * 64) / "cgroup.procs"
    await_true(lambda: host.state()["guarding"] is True, "a guarded container")
    procs.write_text("")
    await_true(lambda: host.state()["guarding"] is None, "a container that is gone")
    procs.write_text(f"{process.pid}\n")
    await_true(lambda: host.state()["guarding"] is True, "a container that is back")
    host.set_memory(310_000)
    host.await_killed(process)


def test_a_writer_that_is_killed_is_replaced_without_the_guard_starting_a_process(host: Host) -> None:
    process = serving(host)
    before = host.writer()
    os.kill(before, signal.SIGKILL)
    host.set_memory(310_000)
    host.await_killed(process)
    await_true(lambda: host.events("kill"), "the kill, told by the next writer")
    assert host.writer() != before


def test_a_writer_that_takes_nothing_and_a_full_line_to_it_do_not_delay_the_kill(host: Host) -> None:
    """As with a journal or disk that hangs: what cannot be told is counted, what has to be done is done."""
    process = serving(host, "stopping")
    writer = host.writer()
    os.kill(writer, signal.SIGSTOP)
    try:
        # Above the hard floor a planned stop goes on, and each turn of the loop looks at the state.
        host.set_memory(HARD + 100_000)
        for number in range(200):
            # Each phase that there is not is a problem of its own, and so a message: a few of this size fill the line.
            host.tell_service(json.dumps({"phase": f"{number}" + "x" * 60_000}))
            time.sleep(0.02)
        host.set_memory(HARD - 100_000)
        host.await_killed(process)
        assert not host.events("kill")
    finally:
        os.kill(writer, signal.SIGCONT)
    await_true(lambda: host.metric("messages_lost_total") > 0, "messages that found the line full")
    assert host.state()["kills"] == 1


def test_a_pressure_event_wakes_the_guard(host: Host) -> None:
    """A double of the kernel's trigger: out-of-band data makes a socket answer POLLPRI as a trigger does."""
    settings = load(host.settings)
    guardian = Guardian(settings, {})
    listener = socket.create_server(("127.0.0.1", 0))
    sender = socket.create_connection(listener.getsockname())
    trigger, _ = listener.accept()
    guardian._pressure = SimpleNamespace(fd=trigger.fileno())  # type: ignore[assignment]
    # So long a pace that only the event can end the wait within this test.
    guardian._policy = SimpleNamespace(  # type: ignore[assignment]
        interval_s=3600.0, near=False, fall_kb_s=10**9, blind_s=0.0, step=lambda *_: Action.NONE
    )
    thread = threading.Thread(target=guardian._guard, daemon=True)
    thread.start()
    await_true(lambda: guardian._readings == 1, "the first reading")
    time.sleep(0.3)
    assert (guardian._readings, guardian._pressures) == (1, 0)
    sender.send(b"!", socket.MSG_OOB)
    await_true(lambda: guardian._pressures > 0 and guardian._readings > 1, "a reading because of the pressure")
    guardian._stop = True
    thread.join(AWAIT_S)
    for end in (sender, trigger, listener):
        end.close()


def test_what_an_earlier_boot_left_is_not_taken_over(host: Host) -> None:
    left = {"boot_id": "another", "last_event": {"event": "kill"}, "carried": {"kills": 3, "latched": True}}
    host.state_file.write_text(json.dumps(left))
    host.start()
    await_true(lambda: host.state().get("boot_id") != "another", "a state of its own")
    state = host.state()
    assert (state["kills"], state["latched"], state["last_event"]) == (0, False, None)


def test_a_lift_without_a_watchdog_says_what_to_do(host: Host) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reap", "watch", "--config", str(host.settings), "--lift"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "plugins/module_utils")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "start reap-watchdog.service first" in done.stderr


def test_it_stops_when_asked_and_says_so(host: Host) -> None:
    guard = host.start()
    guard.terminate()
    guard.communicate(timeout=AWAIT_S)
    assert guard.returncode == 0
    assert host.events()[-1]["event"] == "stop"


def test_at_a_shutdown_the_end_of_the_service_is_told_however_soon_the_stop_comes(host: Host) -> None:
    host.serve("stopping", None)
    guard = host.start()
    os.kill(guard.pid, signal.SIGSTOP)
    host.serve("absent", None)
    guard.terminate()
    os.kill(guard.pid, signal.SIGCONT)
    guard.communicate(timeout=AWAIT_S)
    told = [f"{event['event']}:{event['phase']}" for event in host.events()]
    assert told[-2:] == ["phase:absent", "stop:absent"]


def test_a_damaged_state_file_is_said_and_the_last_one_kept(host: Host) -> None:
    process = serving(host)
    host.service_file.write_text("{")
    await_true(lambda: host.events("problem"), "the problem")
    host.set_memory(310_000)
    host.await_killed(process)


def test_a_refusal_is_told_to_systemd_and_not_repeated_at_once(host: Host) -> None:
    host.settings.write_text("floor_kb = 'much'\n")
    address = host.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(address))
        heard.settimeout(AWAIT_S)
        command = [sys.executable, "-m", "reap", "watch", "--config", str(host.settings)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY / "plugins/module_utils"),
            "NOTIFY_SOCKET": str(address),
        }
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert heard.recv(4096).startswith(b"STATUS=guards nothing: ")
            assert process.poll() is None
            assert "floor_kb" in process.communicate(timeout=AWAIT_S)[1]
            assert process.returncode == 2
