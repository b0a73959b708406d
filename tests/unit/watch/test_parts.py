"""Settings, control groups, meminfo, evidence: each part by itself."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from reap.cli import main
from reap.errors import ReapError
from reap.memory import HostMemory
from reap.watch import evidence
from reap.watch.cgroup import CgroupPaths, Target, find_folder, parse_proc_cgroup
from reap.watch.config import Settings, from_dict, load
from reap.watch.fitcheck import floor_problems
from reap.watch.kernel import Meminfo, parse_meminfo
from reap.watch.loop import Guardian
from reap.watch.policy import Carried, Limits, Phase, Policy
from reap.watch.ring import Ring
from reap.watch.secretary import render_metrics
from reap.watch.state import ABSENT, ServiceFile, carried_from_json, parse_service_state

GIB = 2**30
GIB_KB = 2**20
K144 = {
    "profile": "k144-nospec-200k",
    "routed_experts": 144,
    "kv_cache_memory": "14G",
    "max_model_len": 200000,
    "max_num_batched_tokens": 8192,
}


# -- settings


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "floor_kb is missing"),
        ({"floor_kb": "8G"}, "wanted a whole number of kB"),
        ({"floor_kb": 8.5}, "wanted a whole number"),
        ({"floor_kb": True}, "wanted a whole number"),
        ({"floor_kb": -1}, "wanted more than 0"),
        ({"floor_kb": 1000, "hard_floor_kb": 2000}, "hard_floor_kb <= loading_floor_kb <= floor_kb"),
        ({"floor_kb": 1000, "florr": 1}, "unknown setting 'florr'"),
        ({"floor_kb": 1000, "paths": {"events": "relative"}}, "wanted an absolute path"),
        ({"floor_kb": 1000, "paths": {"event": "/x"}}, "unknown path 'event'"),
        ({"floor_kb": 1000, "idle_interval_s": 2.0}, "idle_interval_s <= 1"),
        ({"floor_kb": 1000, "unit": 3}, "wanted a text"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_found_and_wanted(data: dict[str, object], words: str) -> None:
    with pytest.raises(ReapError) as error:
        from_dict(data, "watchdog.toml")
    assert words in str(error.value)
    assert "watchdog.toml" in str(error.value)


def test_floors_that_are_not_given_follow_from_the_floor() -> None:
    limits = from_dict({"floor_kb": 8 * GIB_KB}, "x").limits
    assert (limits.loading_floor_kb, limits.hard_floor_kb) == (6 * GIB_KB, 3 * GIB_KB)
    limits = from_dict({"floor_kb": 6 * GIB_KB}, "x").limits
    # Three quarters would be 4.5 GiB, where a kill at 14 GiB/s ends below the hard floor.
    assert limits.loading_floor_kb == limits.kill_line_kb
    limits = from_dict({"floor_kb": GIB_KB}, "x").limits
    assert (limits.loading_floor_kb, limits.hard_floor_kb) == (GIB_KB, GIB_KB // 2)


def test_a_file_that_is_missing_or_no_toml_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ReapError, match="cannot read"):
        load(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("floor_kb =")
    assert main(["watch", "--config", str(tmp_path / "bad.toml"), "--check"]) == 2
    assert "is no TOML" in capsys.readouterr().err


# -- floors against profile and host


def settings_for(floor_kb: int, **more: object) -> Settings:
    return from_dict({"floor_kb": floor_kb, "fit": {**K144, "engine": "gb10"}, **more}, "x")


def test_the_validated_floor_is_right_on_a_spark() -> None:
    assert floor_problems(settings_for(8 * GIB_KB), HostMemory(121 * GIB)) == []


def test_a_floor_above_what_the_profile_leaves_is_refused_with_the_highest_that_would_do() -> None:
    (problem,) = floor_problems(settings_for(40 * GIB_KB), HostMemory(121 * GIB))
    assert "more than k144-nospec-200k leaves free" in problem
    assert "at most" in problem


def test_a_floor_below_what_a_kill_needs_is_refused() -> None:
    (problem,) = floor_problems(settings_for(5 * GIB_KB), HostMemory(121 * GIB))
    assert "below what a kill needs" in problem


def test_a_floor_of_loading_below_what_a_kill_needs_is_refused() -> None:
    assert floor_problems(settings_for(6 * GIB_KB), HostMemory(121 * GIB)) == []
    (problem,) = floor_problems(settings_for(6 * GIB_KB, loading_floor_kb=4608 * 1024), HostMemory(121 * GIB))
    assert "loading_floor_kb is 4718592, below what a kill needs" in problem


def test_a_hard_floor_below_where_sparks_froze_is_refused() -> None:
    (problem,) = floor_problems(settings_for(6 * GIB_KB, hard_floor_kb=2 * GIB_KB), HostMemory(121 * GIB))
    assert "froze" in problem


def test_check_answers_with_its_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total_kb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024
    text = f"floor_kb = {2 * total_kb}\n{{}}[fit]\nengine = 'cpu'\nweights_bytes = 1\n" + "".join(
        f"{key} = {json.dumps(K144[key])}\n" for key in ("kv_cache_memory", "max_model_len", "max_num_batched_tokens")
    )
    path = tmp_path / "watchdog.toml"
    path.write_text(text.format(""))
    assert main(["watch", "--config", str(path), "--check"]) == 1
    path.write_text(text.format("enforce_fit = false\n"))
    assert main(["watch", "--config", str(path), "--check"]) == 0
    assert "not enforced" in capsys.readouterr().out


# -- control groups


def test_both_versions_of_proc_pid_cgroup_are_read() -> None:
    hybrid = (
        "8:pids:/docker/abc\n4:cpu,cpuacct:/docker/abc\n9:name=systemd:/docker/abc\n0::/system.slice/docker.service\n"
    )
    assert parse_proc_cgroup(hybrid) == CgroupPaths(
        "/system.slice/docker.service", {"pids": "/docker/abc", "cpu,cpuacct": "/docker/abc", "systemd": "/docker/abc"}
    )
    assert parse_proc_cgroup("0::/system.slice/docker-abc.scope (deleted)\n").v2 == "/system.slice/docker-abc.scope"


def make(root: Path, *folders: str) -> None:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        (root / folder / "cgroup.procs").write_text("")


def test_the_folder_is_found_from_paths_and_from_whole_folders(tmp_path: Path) -> None:
    own = CgroupPaths("/system.slice/reap-watchdog.service", {"pids": "/system.slice/reap-watchdog.service"})
    make(tmp_path, "pids/docker/abc", "system.slice/docker-abc.scope")
    assert find_folder(tmp_path, CgroupPaths(None, {"pids": "/docker/abc"}), own) == tmp_path / "pids/docker/abc"
    whole = CgroupPaths(None, {"pids": str(tmp_path / "pids/docker/abc")})
    assert find_folder(tmp_path, whole, own) == tmp_path / "pids/docker/abc"
    (tmp_path / "cgroup.controllers").write_text("")
    scope = CgroupPaths("/system.slice/docker-abc.scope", {})
    assert find_folder(tmp_path, scope, own) == tmp_path / "system.slice/docker-abc.scope"


@pytest.mark.parametrize("path", ["/", "", "/system.slice", "/system.slice/reap-watchdog.service", "/docker/../.."])
def test_a_group_that_holds_the_watchdog_or_everything_is_never_killed(tmp_path: Path, path: str) -> None:
    make(tmp_path, "pids/system.slice/reap-watchdog.service", "pids/docker")
    for folder in ("pids", "pids/system.slice"):
        (tmp_path / folder / "cgroup.procs").write_text("")
    own = CgroupPaths(None, {"pids": "/system.slice/reap-watchdog.service"})
    assert find_folder(tmp_path, CgroupPaths(None, {"pids": path}), own) is None


def test_processes_of_the_group_and_below_are_killed_and_pid_0_and_1_are_not(tmp_path: Path) -> None:
    make(tmp_path, "c/inner")
    outer, inner = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    (tmp_path / "c/cgroup.procs").write_text(f"0\n1\n{outer.pid}\n{os.getpid()}\n")
    (tmp_path / "c/inner/cgroup.procs").write_text(f"{inner.pid}\n")
    target = Target("c", tmp_path / "c")
    assert target.kill() == 2
    assert (outer.wait(60), inner.wait(60)) == (-9, -9)
    target.close()


def test_cgroup_v2_is_killed_with_one_write(tmp_path: Path) -> None:
    make(tmp_path, "c")
    (tmp_path / "c/cgroup.kill").write_text("")
    (tmp_path / "c/cgroup.procs").write_text("4000001\n4000002\n")
    target = Target("c", tmp_path / "c")
    assert target.kill() == 2
    assert (tmp_path / "c/cgroup.kill").read_text() == "1"


def test_the_kill_is_written_before_anything_else_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "c")
    (tmp_path / "c/cgroup.kill").write_text("")
    target = Target("c", tmp_path / "c")

    def no_descriptor(*_: object) -> int:
        assert (tmp_path / "c/cgroup.kill").stat().st_size == 1, "something was opened before the kill was written"
        raise OSError(errno.EMFILE, "no descriptor is left")

    monkeypatch.setattr("reap.watch.cgroup.os.open", no_descriptor)
    assert target.kill() == 0
    monkeypatch.undo()
    assert (tmp_path / "c/cgroup.kill").read_text() == "1"


@pytest.mark.parametrize(
    ("number", "alive"), [("ENOENT", False), ("ENODEV", False), ("ENOMEM", True), ("EMFILE", True)]
)
@pytest.mark.parametrize("call", ["open", "readv"])
def test_only_a_group_that_was_removed_counts_as_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: str, alive: bool
) -> None:
    """A model that cannot be looked at now is a model that is guarded on."""
    make(tmp_path, "c")
    target = Target("c", tmp_path / "c")

    def fails(*_: object) -> int:
        raise OSError(getattr(errno, number), number)

    monkeypatch.setattr(f"reap.watch.cgroup.os.{call}", fails)
    assert target.alive() is alive


def test_cgroup_v2_says_for_the_whole_subtree_whether_something_lives(tmp_path: Path) -> None:
    make(tmp_path, "c")
    for populated in (1, 0):
        (tmp_path / "c/cgroup.events").write_text(f"populated {populated}\nfrozen 0\n")
        target = Target("c", tmp_path / "c")
        assert target.alive() is bool(populated)
        target.close()


PIDS_V1 = Path("/sys/fs/cgroup/pids")


@pytest.mark.skipif(
    not os.access(PIDS_V1 / "cgroup.procs", os.W_OK),
    reason="needs root and cgroup v1, as molecule/watchdog has it; cgroup v2 was seen on the emulated machine",
)
def test_a_real_group_is_emptied_and_stays_empty() -> None:
    folder = PIDS_V1 / f"reap-test-{os.getpid()}"
    folder.mkdir()
    try:
        child = subprocess.Popen(["bash", "-c", "sleep 60 & sleep 60 & wait"])
        (folder / "cgroup.procs").write_text(str(child.pid))
        target = Target("real", folder)
        while target.alive():
            target.kill()
            child.poll()
        assert child.wait(60) == -9
        assert target.processes() == []
        target.close()
    finally:
        folder.rmdir()


# -- meminfo


def test_meminfo_is_read_from_its_line_only() -> None:
    text = b"MemTotal:       24684096 kB\nMemFree:  1 kB\nMemAvailable:   12345678 kB\n"
    assert parse_meminfo(text, len(text), b"MemAvailable:") == 12345678
    assert parse_meminfo(text, 40, b"MemAvailable:") is None
    assert parse_meminfo(b"MemAvailable: x kB\n", 19, b"MemAvailable:") is None


def test_an_unreadable_meminfo_is_none_and_can_be_opened_again(tmp_path: Path) -> None:
    meminfo = Meminfo(tmp_path / "meminfo")
    assert meminfo.read() is None
    (tmp_path / "meminfo").write_text("MemTotal: 10 kB\nMemAvailable: 7 kB\n")
    meminfo.reopen()
    assert meminfo.read() == 7
    assert meminfo.total_kb == 10


def test_a_thousand_readings_leave_no_object_behind(tmp_path: Path) -> None:
    """What the loop does each time, on the real file; and what it does at a kill, on control groups that are files."""
    meminfo, policy, ring = Meminfo(Path("/proc/meminfo")), Policy(Limits(2, 2, 1)), Ring(64)
    service = ServiceFile(Path("/nonexistent/service.json"), "")
    make(tmp_path, "v1/inner", "v2")
    (tmp_path / "v1/cgroup.procs").write_text("4000001\n")
    (tmp_path / "v2/cgroup.events").write_text("populated 1\n")
    (tmp_path / "v2/cgroup.kill").write_text("")
    targets = [Target("v1", tmp_path / "v1"), Target("v2", tmp_path / "v2")]
    guardian = Guardian(bundle_settings(tmp_path), {})
    guardian._secretary._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def turn(now: float) -> None:
        kb = meminfo.read()
        ring.append(now, kb or -1)
        service.refresh()
        policy.step(now, kb, Phase.SERVING, "container")
        for target in targets:
            assert target.alive()
            target.kill()
        guardian._tell("kill", "because", evidence="x")
        assert json.loads(other.recv(131072))["event"]["reason"] == "because"

    for number in range(2000):
        turn(number / 10)
    before = sys.getallocatedblocks()
    for number in range(2000, 3000):
        turn(number / 10)
    assert sys.getallocatedblocks() - before < 50


# -- state, ring, metrics, evidence


def test_a_state_that_cannot_be_looked_at_is_kept_and_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a file that is not there means that nothing is served."""
    path = tmp_path / "service.json"
    path.write_text(json.dumps({"phase": "serving", "container_id": "a", "container_pid": 7}))
    service = ServiceFile(path, "")
    assert service.refresh()

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    for name in ("stat", "read_text"):
        path.write_text(json.dumps({"phase": "stopping", "container_id": "a", "container_pid": 7}))
        with monkeypatch.context() as patched:
            patched.setattr(Path, name, fails)
            assert service.refresh()
        assert service.state.phase is Phase.SERVING
        assert "no memory" in str(service.problem)
        assert service.refresh()
        assert (service.state.phase, service.problem) == (Phase.STOPPING, None)
        path.write_text(json.dumps({"phase": "serving", "container_id": "a", "container_pid": 7}))
        assert service.refresh()
    path.unlink()
    assert service.refresh()
    assert service.state == ABSENT


def test_a_state_of_an_earlier_boot_is_absent() -> None:
    text = json.dumps({"phase": "serving", "boot_id": "old", "container_id": "c", "container_pid": 7})
    assert parse_service_state(text, "new") == ABSENT
    state = parse_service_state(text, "old")
    assert (state.phase, state.container_id, state.container_pid) == (Phase.SERVING, "c", 7)


@pytest.mark.parametrize("text", ["{", "[]", '{"phase": "asleep"}', "{}"])
def test_a_damaged_state_is_refused(text: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        parse_service_state(text, "")


def test_what_is_carried_over_is_taken_whole_or_not_at_all() -> None:
    carried = Carried(kills=2, stops=[1.0, 2.0], hold_kb=7, latched=True, stopped_target="a")
    data = json.loads(json.dumps(asdict(carried)))
    assert carried_from_json(data) == carried
    assert carried.stops_since(1.5) == 1
    del data["kills"]
    assert carried_from_json(data) == Carried()
    assert carried_from_json(None) == Carried()


def test_the_ring_gives_the_last_readings_oldest_first() -> None:
    ring = Ring(4)
    for number in range(10):
        ring.append(float(number), number)
    assert ring.last(100.0) == [(6.0, 6), (7.0, 7), (8.0, 8), (9.0, 9)]
    assert ring.last(1.0) == [(8.0, 8), (9.0, 9)]


def test_metrics_are_prometheus_text() -> None:
    values = {"kills_total": 3, "mem_available_kb": 5, "guarding": 1}
    text = render_metrics(values, {"kill": 3, "warn": 1}, "serving")
    assert "reap_watchdog_guarding 1\n" in text
    assert "reap_watchdog_unguarded 0\n" in text
    assert "reap_watchdog_kills_total 3\n" in text
    assert 'reap_watchdog_phase{phase="serving"} 1\n' in text
    assert 'reap_watchdog_events_total{event="warn"} 1\n' in text
    for line in text.splitlines():
        assert line.startswith("#") or len(line.rsplit(" ", 1)) == 2


def bundle_settings(tmp_path: Path) -> Settings:
    paths = {
        "evidence": f"{tmp_path}/evidence",
        "evidence_fallback": f"{tmp_path}/memory",
        "docker_data": f"{tmp_path}/docker",
    }
    return from_dict({"floor_kb": 1000, "keep_bundles": 2, "paths": paths}, "x")


def test_evidence_is_read_from_the_engines_files_without_the_engine(tmp_path: Path) -> None:
    folder = tmp_path / "docker" / "containers" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.v2.json").write_text(json.dumps({"State": {"ExitCode": 137}}))
    assert evidence.container_state(tmp_path / "docker", "abc") == {"ExitCode": 137}
    (folder / "config.v2.json").write_text("half a li")
    assert evidence.container_state(tmp_path / "docker", "abc") is None
    assert evidence.container_state(tmp_path / "docker", "gone") is None


def test_the_containers_last_words_are_those_of_its_unit_without_what_the_service_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A double of journalctl that answers the one question it is meant to be asked."""
    double = tmp_path / "journalctl"
    double.write_text(
        '#!/bin/sh\ncase "$*" in\n*_SYSTEMD_UNIT=reap.service*--output=cat*) '
        "printf 'reap serve: starting\\nINFO engine up\\nreap serve: ready\\nlast words\\n';;\nesac\n"
    )
    double.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert evidence.container_lines("reap.service") == ["INFO engine up", "last words"]


def test_the_kernels_lines_about_driver_and_memory_are_found(tmp_path: Path) -> None:
    """As /dev/kmsg gives them: priority, number, time, flags; the text of other subsystems stays out."""
    kmsg = tmp_path / "kmsg"
    kmsg.write_text(
        "6,1200,9000000,-;usb 1-1: new device\n"
        "4,1201,9000100,-;NVRM: GPU 000f:01:00.0: Out of memory [NV_ERR_NO_MEMORY] (0x51) returned from _memdescAlloc\n"
        "3,1202,9000200,-;NVRM: nvCheckOkFailedNoLog: Check failed: NV_ERR_NO_MEMORY (0x51) @ kernel_bus.c:1234\n"
        "6,1203,9000300,-;docker0: port 1 entered blocking state\n"
        "4,1204,9000400,-;vllm: page allocation failure: order:0\n"
    )
    found = evidence.kernel_lines(kmsg)
    assert [line.split(",")[1] for line in found] == ["1201", "1202", "1204"]
    assert all("NVRM" in line for line in found[:2])


def test_old_bundles_go_and_a_disk_that_takes_nothing_is_replaced_by_memory(tmp_path: Path) -> None:
    settings = bundle_settings(tmp_path)
    for name in ("1", "2", "3"):
        evidence.save(settings, name, {"n": name})
    assert sorted(entry.name for entry in settings.paths.evidence.iterdir()) == ["2", "3"]
    full = from_dict({"floor_kb": 1000, "paths": {"evidence": "/proc/none", "evidence_fallback": f"{tmp_path}/m"}}, "x")
    assert evidence.save(full, "4", {}) == tmp_path / "m" / "4" / "bundle.json"


def test_the_biggest_processes_are_listed_largest_first() -> None:
    processes = evidence.biggest_processes(most=5)
    sizes = [process["rss_kb"] for process in processes]
    assert sizes == sorted(sizes, reverse=True)
    assert len(processes) <= 5
