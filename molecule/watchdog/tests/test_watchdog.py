"""The watchdog on a real systemd host with real containers.

MemAvailable is the machine's own and other programs move it. So floors are set relative to what is available now,
the memory hog has a hard size, and where no hog is needed the floor is put above what is available.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

FILES = Path(__file__).parents[1] / "files"
AWAIT_S = 300.0
HOG_MOST_MIB = 1536
EVENTS = "/var/lib/reap/watchdog/events.jsonl"
# An image of nothing but links into the host's /usr: nothing has to be pulled for a process in a container.
IMAGE = """
cd "$(mktemp -d)" && mkdir usr proc sys dev etc go tmp
ln -s usr/bin bin && ln -s usr/lib lib && ln -s usr/lib64 lib64
tar -c . | docker import - stand-in:latest
"""


def await_true(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + AWAIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {AWAIT_S:.0f} s for: {what}"
        time.sleep(0.2)


class Spark:
    """The host, with what the tests do to it."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def run(self, command: str, good: tuple[int, ...] = (0,)) -> str:
        done = self._host.run(command)
        assert done.rc in good, f"{command}: {done.rc}\n{done.stdout}\n{done.stderr}"
        return str(done.stdout)

    def lines(self, below_now_mib: int, then: str = "true") -> int:
        """Guard with a floor that far below (or, negative, above) what is available now; returns it in kB.

        Everything else stays as the role wrote it. ``then`` runs at once, before other programs have moved memory.
        """
        self.run(f"cat > /srv/lines.py <<'EOF'\n{(FILES / 'lines.py').read_text()}\nEOF")
        restart = "systemctl restart reap-watchdog"
        return int(self.run(f"python3 /srv/lines.py {below_now_mib} && {restart} && {then}"))

    def container(self, hog: bool = False) -> None:
        self.run("docker rm -f stand-in >/dev/null 2>&1; rm -rf /srv/go; mkdir -p /srv/go")
        command = f"python3 /go/hog.py {HOG_MOST_MIB} 50 0.02" if hog else "sleep 3600"
        hog_text = (FILES / "hog.py").read_text()
        self.run(f"cat > /srv/go/hog.py <<'EOF'\n{hog_text}\nEOF")
        mounts = "-v /usr:/usr:ro -v /etc/alternatives:/etc/alternatives:ro -v /srv/go:/go:ro"
        self.run(f"docker run -d --name stand-in --network none {mounts} stand-in {command}")

    def serve(self, phase: str, supervisor: int | None = None) -> None:
        """What ``reap serve`` would write. A stand-in: the scenario of the whole recipe has the real one."""
        shown = self.run("docker inspect -f '{{.Id}} {{.State.Pid}}' stand-in").split()
        cgroups = [line.split(":", 2) for line in self.run(f"cat /proc/{shown[1]}/cgroup").splitlines()]
        state = {
            "phase": phase,
            "boot_id": self.run("cat /proc/sys/kernel/random/boot_id").strip(),
            "pid": supervisor,
            "container_name": "stand-in",
            "container_id": shown[0],
            "container_pid": int(shown[1]),
            "cgroup": {
                "v2": next((path for number, names, path in cgroups if number == "0" and not names), None),
                "v1": {names: path for number, names, path in cgroups if number != "0"},
            },
            "profile": "stand-in",
        }
        self.run(f"cat > /run/reap/.new <<'EOF'\n{json.dumps(state)}\nEOF\nmv /run/reap/.new /run/reap/service.json")
        await_true(lambda: self.state().get("phase") == phase, f"the phase {phase}")

    def serve_group(self, folder: str, pid: int) -> None:
        """The same for a control group that no engine made, so that it outlives one."""
        state = {"phase": "serving", "container_name": "stand-in", "container_pid": pid}
        state |= {"cgroup": {"v2": None, "v1": {"pids": folder}}, "profile": "stand-in"}
        self.run(f"cat > /run/reap/.new <<'EOF'\n{json.dumps(state)}\nEOF\nmv /run/reap/.new /run/reap/service.json")
        await_true(lambda: self.state().get("guarding") is True, "a guarded group")

    def writer(self) -> int:
        """The process that writes: child of the keeper, which is the only child of the one that guards."""
        pid = self.main_pid()
        for _ in range(2):
            pid = int(self.run(f"cat /proc/{pid}/task/{pid}/children"))
        return pid

    def state(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.run("cat /run/reap/watchdog.json"))
        return loaded

    def events(self, kind: str) -> list[dict[str, Any]]:
        text = self.run(f"cat {EVENTS}", good=(0, 1))
        return [event for event in map(json.loads, text.splitlines()) if event["event"] == kind]

    def lives(self) -> bool:
        return "true" in self.run("docker inspect -f '{{.State.Running}}' stand-in")

    def pids_left(self) -> str:
        """Processes of the stand-in, without asking the engine."""
        return self.run("pgrep -f 'sleep [3]600|/go/[h]og.py'", good=(0, 1)).strip()

    def main_pid(self) -> int:
        return int(self.run("systemctl show -p MainPID --value reap-watchdog"))


@pytest.fixture(scope="module")
def engine(host: Host) -> Iterator[Spark]:
    spark = Spark(host)
    spark.run("command -v docker || apt-get install -y --no-install-recommends docker.io iptables", good=(0,))
    spark.run("systemctl start docker")
    spark.run(IMAGE)
    spark.run("cp -p /etc/reap/watchdog.toml /srv/watchdog.toml")
    yield spark
    spark.run("cp -p /srv/watchdog.toml /etc/reap/watchdog.toml; systemctl restart reap-watchdog")


@pytest.fixture
def spark(engine: Spark) -> Iterator[Spark]:
    engine.run(f"rm -f {EVENTS} /run/reap/service.json")
    restore = "rm -f /run/reap/watchdog.json; cp -p /srv/watchdog.toml /etc/reap/watchdog.toml"
    engine.run(f"systemctl stop reap-watchdog; {restore}; systemctl start reap-watchdog")
    yield engine
    engine.run("docker rm -f stand-in >/dev/null 2>&1; rm -f /run/reap/service.json", good=(0, 1))


@contextmanager
def stopped_process(spark: Spark, unit: str) -> Iterator[None]:
    """The unit's main process does not answer (SIGSTOP), and answers again afterwards."""
    spark.run(f"systemctl kill --kill-whom=main --signal=SIGSTOP {unit}")
    try:
        yield
    finally:
        spark.run(f"systemctl kill --kill-whom=main --signal=SIGCONT {unit}")


def test_it_runs_at_boot_locked_in_memory_and_hardened(spark: Spark, host: Host) -> None:
    unit = host.service("reap-watchdog")
    assert unit.is_running
    assert unit.is_enabled
    pid = spark.main_pid()
    status = spark.run(f"cat /proc/{pid}/status")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    assert fields["NoNewPrivs"].strip() == "1"
    assert fields["Seccomp"].strip() == "2"
    locked, resident = int(fields["VmLck"].split()[0]), int(fields["VmRSS"].split()[0])
    assert locked > 0.9 * resident
    assert spark.run("systemctl show -p OOMScoreAdjust --value reap-watchdog").strip() == "-1000"


def test_a_hog_that_crosses_the_floor_is_killed_and_the_evidence_says_how(spark: Spark) -> None:
    spark.container(hog=True)
    spark.serve("serving")
    floor = spark.lines(400, then="touch /srv/go/now")
    await_true(lambda: not spark.pids_left(), "the end of the hog")
    await_true(lambda: spark.events("killed"), "the word that it is gone")
    (kill,) = spark.events("kill")
    assert kill["mem_available_kb"] < floor
    assert kill["processes"] >= 1
    assert spark.state()["kills"] == 1
    bundle = f"/var/lib/reap/evidence/watchdog/{kill['evidence']}/bundle.json"
    await_true(lambda: spark.run(f"ls {bundle}", good=(0, 2)), "the evidence bundle")
    saved = json.loads(spark.run(f"cat {bundle}"))
    assert len(saved["series"]) > 5
    assert min(kb for _, kb in saved["series"]) < floor < max(kb for _, kb in saved["series"])
    assert saved["container_state"]["ExitCode"] in (0, 137)
    assert "reap_watchdog_kills_total 1\n" in spark.run("cat /run/reap/watchdog.prom")


def test_a_planned_stop_is_no_kill_and_serving_below_the_floor_is_one(spark: Spark) -> None:
    spark.container()
    spark.serve("stopping")
    spark.lines(-4096)
    readings = "awk '/^reap_watchdog_readings_total/ {print $2}' /run/reap/watchdog.prom"
    before = int(spark.run(readings))
    await_true(lambda: int(spark.run(readings)) > before, "more readings of the watchdog")
    assert spark.lives()
    assert not spark.events("kill")
    assert not spark.events("shed")
    spark.serve("serving")
    await_true(lambda: not spark.pids_left(), "the end of the container: there is no supervisor to ask")


def test_a_slow_crossing_asks_the_supervisor_first(spark: Spark) -> None:
    spark.container()
    script = "trap 'docker stop -t 1 stand-in; exit' TERM; while :; do sleep 0.1; done"
    pid = int(spark.run(f'setsid bash -c "{script}" serve >/dev/null 2>&1 & echo $!'))
    spark.serve("serving", pid)
    spark.lines(-4096)
    await_true(lambda: not spark.pids_left(), "the end of the container")
    assert len(spark.events("shed")) == 1
    assert not spark.events("kill")


@pytest.mark.parametrize("how", ["KILL", "STOP"])
def test_killed_or_hanging_it_comes_back_guarding_and_waits_for_no_writer(spark: Spark, how: str) -> None:
    spark.container()
    spark.serve("serving")
    before = spark.main_pid()
    writer = spark.writer()
    spark.run(f"kill -STOP {writer}; kill -{how} {before}")
    await_true(lambda: spark.main_pid() not in (0, before), "a new main process")
    await_true(lambda: spark.run("systemctl is-active reap-watchdog", good=(0, 3)).strip() == "active", "its unit")
    assert spark.run(f"ps -o stat= -p {writer}").startswith("T")
    spark.run(f"kill -9 {writer}")
    await_true(lambda: spark.state().get("guarding") is True, "a guarded container")
    spark.lines(-4096)
    await_true(lambda: not spark.pids_left(), "the end of the container")


def test_a_stopped_engine_stops_neither_the_watchdog_nor_its_kill(spark: Spark) -> None:
    spark.container()
    spark.serve("serving")
    with stopped_process(spark, "docker"):
        spark.lines(-4096)
        await_true(lambda: not spark.pids_left(), "the end of the container while the engine does not answer")


def test_without_an_engine_it_guards_and_kills(spark: Spark) -> None:
    """`systemctl stop docker` takes its containers along, so what is guarded here is a control group made by hand."""
    group = "/sys/fs/cgroup/pids/stand-in"
    pid = spark.main_pid()
    spark.run("systemctl stop docker.socket docker.service")
    try:
        assert spark.run("systemctl is-active docker", good=(3,)).strip() == "inactive"
        assert spark.main_pid() == pid
        start = f"mkdir -p {group}; setsid sleep 3600 >/dev/null 2>&1 & echo $! | tee {group}/cgroup.procs"
        spark.serve_group("/stand-in", int(spark.run(start)))
        spark.lines(-4096)
        await_true(lambda: not spark.pids_left(), "the end of the group's process with no engine there")
        await_true(lambda: spark.events("killed"), "the word that it is gone")
    finally:
        spark.run(f"rmdir {group}; systemctl start docker", good=(0, 1))


def test_a_full_disk_does_not_stop_the_kill_and_its_evidence_is_kept_in_memory(spark: Spark) -> None:
    spark.container()
    spark.serve("serving")
    folders = ("/var/lib/reap/watchdog", "/var/lib/reap/evidence/watchdog")
    try:
        for folder in folders:
            spark.run(f"mount -t tmpfs -o size=64k full {folder} && head -c 1M /dev/zero > {folder}/full; true")
        spark.lines(-4096)
        await_true(lambda: not spark.pids_left(), "the end of the container")
        await_true(lambda: spark.run("ls /run/reap/evidence/*/bundle.json", good=(0, 2)), "evidence in memory")
    finally:
        spark.run("systemctl stop reap-watchdog")
        for folder in folders:
            spark.run(f"umount {folder}")
        spark.run("systemctl start reap-watchdog")


def test_a_writer_that_is_killed_is_replaced(spark: Spark) -> None:
    spark.container()
    before, guard = spark.writer(), spark.main_pid()
    spark.run(f"kill -9 {before}")
    spark.serve("serving")
    await_true(lambda: spark.events("phase"), "the phase, told by the next writer")
    assert spark.writer() != before
    assert spark.main_pid() == guard


def test_a_full_journal_does_not_stop_the_kill(spark: Spark) -> None:
    """A journal of which not a page is left: what it is told may be lost, the kill and its evidence are not."""
    journal = f"/run/log/journal/{spark.run('cat /etc/machine-id').strip()}"
    settings = "/run/systemd/journald.conf.d/full.conf"
    spark.container()
    spark.run(f"mkdir -p {journal} $(dirname {settings}); printf '[Journal]\\nStorage=volatile\\n' > {settings}")
    spark.run(f"mount -t tmpfs -o size=16M full {journal}")
    try:
        spark.run("systemctl restart systemd-journald")
        spark.run(f"cat /dev/zero > {journal}/full", good=(1,))
        spark.run("head -c 1M /dev/urandom | base64 | systemd-cat")
        assert int(spark.run(f"df --output=avail {journal} | tail -1")) < 64, "kB: the least journal file has 512"
        spark.serve("serving")
        spark.lines(-4096)
        await_true(lambda: not spark.pids_left(), "the end of the container")
        await_true(lambda: spark.events("kill"), "the kill in the events file")
    finally:
        spark.run(f"rm -f {settings} {journal}/full; umount -l {journal}; systemctl restart systemd-journald")


def test_a_journal_that_takes_nothing_does_not_stop_the_kill(spark: Spark) -> None:
    spark.container()
    spark.lines(-4096)
    with stopped_process(spark, "systemd-journald"):
        spark.serve("serving")
        await_true(lambda: not spark.pids_left(), "the end of the container")
    await_true(lambda: spark.events("kill"), "the kill in the events file")
