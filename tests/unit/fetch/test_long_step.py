"""``long_step`` through ansible-playbook on this machine: detached, attached again, quiet about secrets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SECRET = "sesame-0123456789"
# Counts lines in a file, so that a test sees how often it ran; reports progress; ends when told.
PROGRAM = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
with (folder / "starts").open("a") as out: out.write(f"{os.getpid()} {os.environ.get('SECRET')}\\n")
number = 0
while not (folder / "go").exists():
    number += 1
    new = folder / f"p{os.getpid()}.new"
    new.write_text(json.dumps({"step": "t", "state": "running", "done": number * 10**9, "total": 94 * 10**9,
                               "unit": "bytes", "rate": 1.1e8, "eta_s": 540, "detail": "model-7",
                               "source": "hub", "error": None}))
    new.rename(folder / "progress.json")
    time.sleep(0.1)
print("some text")
print(json.dumps({"changed": False, "secret_was_there": os.environ.get("SECRET", "") != ""}))
sys.exit(int(sys.argv[2]))
"""


class Play:
    """A playbook of one long_step task, its job and progress below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "program.py").write_text(PROGRAM)
        self.arguments: dict[str, Any] = {
            "step": "demo",
            "argv": [sys.executable, str(folder / "program.py"), str(folder), "0"],
            "job_dir": str(folder / "jobs"),
            "progress_file": str(folder / "progress.json"),
            "secrets": {"SECRET": SECRET, "EMPTY": ""},
        }

    def start(self, *more: str, hosts: str = "one,", form: str = "log", **changes: Any) -> subprocess.Popen[str]:
        save = {"content": "{{ r | to_json }}", "dest": str(self.folder / "result-{{ inventory_hostname }}.json")}
        tasks = [
            {"long_step": {**self.arguments, **changes}, "register": "r", "name": "Long"},
            {"ansible.builtin.copy": save, "check_mode": False},
        ]
        book = self.folder / "play.yml"
        book.write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("ansible-playbook")), "-i", hosts, "-c", "local", str(book),
             "-e", f"ansible_python_interpreter={sys.executable}", *more],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "REAP_PROGRESS": form},
        )  # fmt: skip

    def run(self, *more: str, **changes: Any) -> tuple[int, str]:
        process = self.start(*more, **changes)
        out, _ = process.communicate(timeout=300)
        return process.returncode, out

    def two_hosts(self) -> dict[str, Any]:
        """Two hosts that this machine stands for, each with its own folder of jobs."""
        jobs = str(self.folder / "jobs-{{ inventory_hostname }}")
        return {"hosts": "one,two,", "step": "demo-{{ inventory_hostname }}", "job_dir": jobs}

    def result(self, host: str = "one") -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.folder / f"result-{host}.json").read_text())
        return value

    def starts(self) -> list[str]:
        path = self.folder / "starts"
        return path.read_text().splitlines() if path.exists() else []

    def go(self) -> None:
        (self.folder / "go").touch()

    def await_start(self, count: int = 1) -> None:
        limit = time.monotonic() + 300
        while len(self.starts()) < count:
            assert time.monotonic() < limit, "the command did not start"
            time.sleep(0.05)


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    made = Play(tmp_path)
    yield made
    made.go()
    for line in made.starts():
        pid = int(line.split()[0])
        limit = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and time.monotonic() < limit:
            time.sleep(0.05)


def test_result_and_secret(play: Play) -> None:
    play.go()
    rc, out = play.run("-vvv")
    assert rc == 0, out
    result = play.result()
    assert (result["rc"], result["changed"], result["attached"], result["running"]) == (0, False, False, False)
    assert result["result"]["secret_was_there"] is True
    assert result["stdout_lines"][0] == "some text"
    assert SECRET not in out
    assert SECRET not in json.dumps(result)
    held = [path for path in play.folder.rglob("*") if path.is_file() and SECRET in path.read_text()]
    # The playbook that the test wrote and the program's own record of what it was given: nothing of long_step's.
    assert {path.name for path in held} == {"play.yml", "starts"}


def test_a_failure_says_what_the_command_said(play: Play) -> None:
    play.go()
    rc, out = play.run(argv=["sh", "-c", "echo first >&2; echo the disk is full >&2; exit 3"])
    assert rc != 0
    assert "the disk is full" in out
    rc, out = play.run(argv=["sh", "-c", "exit 3"], rc_ok=[0, 3])
    assert rc == 0, out
    rc, out = play.run(argv=["/nonexistent/program"])
    assert "/nonexistent/program: No such file or directory" in out


def test_a_killed_playbook_leaves_the_command_and_the_next_one_attaches(play: Play) -> None:
    first = play.start()
    play.await_start()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    pid = play.starts()[0].split()[0]
    assert Path(f"/proc/{pid}").exists()
    second = play.start()

    limit = time.monotonic() + 300
    assert second.stdout is not None
    seen = []
    while not any("94.0 GB" in line for line in seen):
        assert time.monotonic() < limit, "".join(seen)
        seen.append(second.stdout.readline())
        assert seen[-1], "it ended: " + "".join(seen)
    assert re.search(r"\[one\] demo: \d+ % .* of 94\.0 GB, 110\.0 MB/s, 9 min left, from hub \(model-7\)", seen[-1])
    play.go()
    out, _ = second.communicate(timeout=300)
    assert second.returncode == 0, out
    assert len(play.starts()) == 1
    assert play.result()["attached"] is True


def test_another_command_under_the_same_name_is_refused(play: Play) -> None:
    first = play.start()
    play.await_start()
    rc, out = play.run(argv=["true"])
    assert rc != 0
    assert "already running with another command" in out
    play.go()
    assert first.wait(timeout=300) == 0
    first.communicate()


def test_the_same_step_with_another_command_is_attached_to(play: Play) -> None:
    """As a fleet's: who is still missing changes the command, and not what it is about."""
    about = {"repo": "org/m", "revision": "1" * 40}
    first = play.start(identity=about)
    play.await_start()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    rc, out = play.run(identity={**about, "revision": "2" * 40})
    assert rc != 0
    assert "already running with another command" in out
    rc, out = play.run(identity=about, argv=[*play.arguments["argv"], "--another"], mode="start")
    assert rc == 0, out
    assert len(play.starts()) == 1
    assert (play.result()["attached"], play.result()["running"]) == (True, True)


def test_every_update_is_a_json_line_for_programs(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    file = play.folder / "updates.jsonl"
    monkeypatch.setenv("REAP_PROGRESS_JSON", str(file))
    # The lines for people are another matter.
    process = play.start(form="off", **play.two_hosts())
    limit = time.monotonic() + 300
    lines: list[dict[str, Any]] = []
    while {line["host"] for line in lines if line["progress"]} != {"one", "two"}:
        assert time.monotonic() < limit, lines
        time.sleep(0.2)
        lines = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    play.go()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert {line["step"] for line in lines} == {"demo-one", "demo-two"}
    told = [line["progress"] for line in lines if line["progress"]]
    assert (told[0]["total"], told[0]["source"]) == (94 * 10**9, "hub")
    assert "94.0 GB" not in out
    assert SECRET not in file.read_text()


def test_a_command_whose_host_died_is_started_again(play: Play) -> None:
    process = play.start()
    play.await_start()
    runner = json.loads((play.folder / "jobs" / "demo" / "job.json").read_text())["pid"]
    os.killpg(runner, signal.SIGKILL)
    play.await_start(2)
    play.go()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert len(play.starts()) == 2


def test_a_time_limit_ends_the_command(play: Play) -> None:
    rc, out = play.run(timeout=20)
    assert rc != 0
    assert "took longer than 20 s" in out
    pid = play.starts()[0].split()[0]
    assert not Path(f"/proc/{pid}").exists()


def test_check_mode_runs_only_what_changes_nothing(play: Play) -> None:
    rc, out = play.run("--check")
    assert rc == 0, out
    assert play.starts() == []
    rc, out = play.run("--check", check_argv=["sh", "-c", "echo '{\"changed\": true}'"])
    assert (rc, play.result()["changed"]) == (0, True), out


def test_start_now_and_wait_later(play: Play) -> None:
    rc, out = play.run(mode="start")
    assert rc == 0, out
    assert play.result()["running"] is True
    play.go()
    rc, out = play.run(mode="wait")
    assert (rc, play.result()["rc"]) == (0, 0), out
    rc, out = play.run(mode="wait", step="never", argv=[])
    assert rc != 0
    assert "step never neither runs nor has ended on one" in out


def test_who_waits_begins_again_what_a_restart_of_the_host_ended(play: Play) -> None:
    """A pull that ran beside the model download and is gone has not ended well."""
    rc, out = play.run(mode="start")
    assert rc == 0, out
    play.await_start()
    runner = json.loads((play.folder / "jobs" / "demo" / "job.json").read_text())["pid"]
    os.killpg(runner, signal.SIGKILL)
    play.go()
    rc, out = play.run(mode="wait")
    assert (rc, play.result()["rc"]) == (0, 0), out
    assert len(play.starts()) == 2


def test_a_terminal_has_one_line_per_host_drawn_in_place(play: Play) -> None:
    process = play.start(form="line", **play.two_hosts())
    play.await_start(2)
    assert process.stdout is not None
    text = ""
    limit = time.monotonic() + 300
    while not ("\x1b[2A" in text and "[two]" in text):
        assert time.monotonic() < limit, text
        text += os.read(process.stdout.fileno(), 4096).decode()
    play.go()
    text += process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    rows = re.findall(r"\x1b\[2K\[(one|two)\] demo-\1: ", text)
    assert rows.count("one") >= 1
    assert rows.count("two") >= 1
    # The results stand on lines of their own, whole.
    assert re.search(r"\x1b\[J\S*ok: \[one\]|^ok: \[one\]", text, re.MULTILINE)


def screen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str, host: str = "one", step: str = "model") -> Any:
    """A screen of the plugin, and what it wrote."""
    from plugins.action import long_step

    monkeypatch.setenv("REAP_PROGRESS", form)
    monkeypatch.setattr(long_step, "_BOARD", tmp_path / "board")
    written: list[str] = []

    class Display:
        def display(self, text: str, **_: object) -> None:
            written.append(text)

    made = long_step.Screen(Display(), host, step)
    return made, written


def seen(done: int, *others: tuple[str, int]) -> dict[str, Any]:
    """A view of a step and of those beside it."""
    rows = [{"step": step, "progress": {"done": count, "unit": "files"}, "elapsed_s": 1.0} for step, count in others]
    return {"progress": {"done": done, "unit": "files"}, "elapsed_s": 1.0, "others": rows}


def test_a_step_that_was_only_started_has_a_row_beside_the_one_that_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, written = screen(monkeypatch, tmp_path, "line")
    one.show(seen(1, ("image_pull", 7)))
    assert re.findall(r"\x1b\[2K(.*)\n", written[-1]) == ["[one] image_pull: 7 files", "[one] model: 1 files"]
    # News of the other step alone is news; another host's rows stand below; one that has ended leaves no row.
    one.show(seen(1, ("image_pull", 8)))
    assert "[one] image_pull: 8 files" in written[-1]
    two, by_two = screen(monkeypatch, tmp_path, "line", "two")
    two.show(seen(3, ("image_pull", 4)))
    assert by_two[-1].startswith("\r\x1b[2A")
    assert re.findall(r"\[(\w+)\] (\w+): (\d)", by_two[-1]) == [
        ("one", "image_pull", "8"), ("one", "model", "1"), ("two", "image_pull", "4"), ("two", "model", "3"),
    ]  # fmt: skip
    one.show(seen(2))
    assert written[-1].startswith("\r\x1b[4A")
    assert "[one] image_pull" not in written[-1]
    one.close()
    assert written[-1] == "\r\x1b[3A\x1b[J"
    two.close()
    assert not (tmp_path / "board").exists()


def test_a_log_has_a_line_for_each_step_that_has_news(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REAP_PROGRESS_JSON", str(tmp_path / "updates"))
    one, written = screen(monkeypatch, tmp_path, "log")
    one.show(seen(1, ("image_pull", 7)))
    one.show(seen(1, ("image_pull", 8)))
    one.show(seen(1, ("image_pull", 8)))
    assert written == ["[one] image_pull: 7 files", "[one] model: 1 files", "[one] image_pull: 8 files"]
    updates = [json.loads(line) for line in (tmp_path / "updates").read_text().splitlines()]
    assert [(one["step"], one["progress"]["done"]) for one in updates[:2]] == [("image_pull", 7), ("model", 1)]


def test_both_of_two_steps_are_seen_while_one_is_waited_for(play: Play, tmp_path: Path) -> None:
    """The real module: what runs on the host beside the step, until it has ended."""
    other = tmp_path / "other"
    other.mkdir()
    beside = Play(other)
    beside.arguments |= {"step": "beside", "job_dir": str(play.folder / "jobs")}
    assert beside.run(mode="start")[0] == 0
    beside.await_start()
    process = play.start()
    play.await_start()
    assert process.stdout is not None
    lines: list[str] = []
    limit = time.monotonic() + 300
    try:
        while not (any("[one] beside: " in line for line in lines) and any("[one] demo: " in line for line in lines)):
            assert time.monotonic() < limit, "".join(lines)
            lines.append(process.stdout.readline())
            assert lines[-1], "it ended: " + "".join(lines)
    finally:
        beside.go()
        play.go()
    assert process.wait(timeout=300) == 0
    process.communicate()
    assert "others" not in play.result()


def test_the_seconds_of_a_wait_count_from_the_commands_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from plugins.action.long_step import ActionModule

    shown, _ = screen(monkeypatch, tmp_path, "off")
    modes: list[str] = []

    def call(args: dict[str, Any], **_: Any) -> dict[str, Any]:
        modes.append(args["mode"])
        assert len(modes) < 5, modes
        return {"running": True, "elapsed_s": 100.0, "job_id": "x"}

    plugin = ActionModule.__new__(ActionModule)
    plugin._task = SimpleNamespace(check_mode=False)
    plugin._call = call
    view = plugin._follow({"step": "image_pull", "mode": "wait", "timeout": 50}, "wait", shown)
    assert modes == ["wait", "end"]
    assert view["failed"]
    assert "took longer than 50 s" in view["msg"]
