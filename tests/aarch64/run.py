"""`make test-aarch64`: the recipe on emulated aarch64 machines that look like a Spark (docs/aarch64.md).

Each stage prints its wall time; a failed one ends the run. What was found goes to artifacts/aarch64/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sim.aarch64 import bed, machine
from sim.common import SimError, run, say, stamp, step, write_atomic, write_json
from tests.aarch64 import report
from tests.aarch64.stages import STAGES
from tests.aarch64.want import Failed, want

HERE = Path(__file__).resolve().parent
ARTIFACTS = ROOT / "artifacts" / "aarch64"
# A whole run on two cores. What is built once and kept, some 10 minutes more, does not count.
LIMIT_S = 40 * 60
STRATEGIES = ("linear", "mitogen")
Recap = dict[str, dict[str, int]]


class Run:
    """The stages with their wall times and what each found."""

    def __init__(self, strategy: str, sockets: Path) -> None:
        self.strategy = strategy
        self.stages: list[dict[str, Any]] = []
        self.key = ""
        self.began = time.monotonic()
        self.started = now()
        self._sockets = sockets

    def stage(self, key: str, name: str, work: Callable[[Run], dict[str, Any] | None]) -> None:
        """Does one stage and notes what it found; a failure is noted and raised."""
        say(f"=== {name}")
        began = time.monotonic()
        self.key = key
        entry: dict[str, Any] = {"stage": name, "key": key, "started": now(), "passed": False}
        self.stages.append(entry)
        try:
            entry["found"] = work(self) or {}
            entry["passed"] = True
        except (Failed, SimError) as error:
            entry["error"] = str(error)
            raise
        except Exception:
            # Whatever it is, the machines have to end; a person reads where it came from.
            entry["error"] = traceback.format_exc()
            raise Failed(entry["error"]) from None
        except KeyboardInterrupt:
            entry["error"] = "interrupted"
            raise
        finally:
            entry["seconds"] = round(time.monotonic() - began, 1)
            entry["load"] = round(os.getloadavg()[0], 1)
            say(f"=== {name}: {'passed' if entry['passed'] else 'FAILED'} after {entry['seconds']:.0f} s")

    def play(
        self, playbook: str, hosts: Sequence[str], *options: str, fails: dict[str, str] | None = None
    ) -> tuple[Recap, str]:
        """Runs a playbook against the machines; returns the recap by host, and the log.

        `fails` names the hosts that have to fail, each with a text of its error. Every other one has to do well.
        """
        fails = fails or {}
        log = ARTIFACTS / f"{self.key}-{Path(playbook).stem}.log"
        program = str(Path(sys.executable).parent / "ansible-playbook")
        command = [program, "-i", "inventories/aarch64", playbook, "-l", ",".join(hosts), *options]
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment(), stdout=stream, stderr=stream, start_new_session=True
            )
            try:
                process.wait()
            except BaseException:
                end_group(process)
                raise
        text = log.read_text(errors="replace")
        found = recap_of(text)
        try:
            want(found.keys() == set(hosts), f"the recap has {sorted(found)}, wanted {sorted(hosts)}")
            for host, counts in found.items():
                wanted = 1 if host in fails else 0
                want(
                    counts["failed"] == wanted and counts["unreachable"] == 0,
                    f"{host}: failed={counts['failed']} unreachable={counts['unreachable']}, wanted failed={wanted}",
                )
            for host, words in fails.items():
                said = [line for line in text.splitlines() if host in line and words in line]
                want(bool(said), f"{host} failed, but no line of it says {words!r}")
            want((process.returncode != 0) == bool(fails), f"its exit status is {process.returncode}")
        except Failed as error:
            tail = "\n".join(text.splitlines()[-40:])
            raise Failed(f"{playbook}: {error}; {log}:\n{tail}") from None
        return found, text

    def _environment(self) -> dict[str, str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
        environment |= {
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_TIMEOUT": "60",
            # Connections of this run only, so that all of them can be closed at its end.
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self._sockets),
            "REAP_PROGRESS": "log",
        }
        if self.strategy == "mitogen":
            environment |= {
                "PYTHONPATH": str(mitogen()),
                "ANSIBLE_STRATEGY": "reap_mitogen",
                "ANSIBLE_STRATEGY_PLUGINS": str(HERE / "strategy"),
            }
        return environment

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def result(self) -> dict[str, Any]:
        """Everything that is kept of the run."""
        return {
            "started": self.started,
            "strategy": self.strategy,
            "seconds": round(self.seconds(), 1),
            "limit_s": LIMIT_S,
            "passed": bool(self.stages) and all(stage["passed"] for stage in self.stages),
            "stages": self.stages,
            "versions": versions(),
        }


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def recap_of(text: str) -> Recap:
    """What Ansible counted for each host."""
    pattern = r"^(\S+)\s+: ok=\d+\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)"
    return {
        match[1]: {"changed": int(match[2]), "unreachable": int(match[3]), "failed": int(match[4])}
        for match in re.finditer(pattern, text, re.MULTILINE)
    }


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a program and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def mitogen() -> Path:
    """The folder of the pinned mitogen, which is no part of the controller's requirements."""
    lock = HERE / "mitogen.txt"
    folder = bed.CACHE / f"mitogen.{stamp([lock])[:12]}"
    if not folder.exists():
        beside = folder.with_suffix(".new")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--require-hashes", "--no-deps", "--target", beside]
        with step("installing mitogen"):
            shutil.rmtree(beside, ignore_errors=True)
            run([*pip, "-r", lock])
            beside.rename(folder)
    return folder


def first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return (done.stdout.splitlines() or [""])[0]


def versions() -> dict[str, Any]:
    """What emulated and what was emulated."""
    facts = json.loads(bed.FACTS.read_text()) if bed.FACTS.exists() else {}
    dirty = run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, check=False).stdout
    return {
        "emulator": first_line(["qemu-system-aarch64", "--version"]),
        "ansible": first_line([str(Path(sys.executable).parent / "ansible"), "--version"]),
        "python": platform.python_version(),
        "machine_os": facts.get("disk", {}).get("os", ""),
        "machine_kernel": facts.get("boot", {}).get("kernel", ""),
        "commit": first_line(["git", "rev-parse", "HEAD"]),
        "changed_since_commit": [line[3:] for line in dirty.splitlines()],
        "cores": os.cpu_count(),
    }


def end_all(sockets: Path) -> None:
    """Ends machines, services and connections; raises Failed where something of them is left."""
    for socket in sockets.iterdir():
        run(["ssh", "-o", f"ControlPath={socket}", "-O", "exit", "closed"], check=False)
    machine.down(machine.all_names())
    left = bed.left_over()
    want(not left, "left after the end: " + "; ".join(left))


def work(run_: Run, keys: Sequence[str], whole: bool, sockets: Path) -> bool:
    """Does the stages and ends everything after a whole run; returns whether all went well."""
    good = True
    try:
        for key in keys:
            title, stage = STAGES[key]
            run_.stage(key, title, stage)
    except (Failed, SimError) as error:
        say(f"FAILED: {error}")
        good = False
    except KeyboardInterrupt:
        say("interrupted")
        good = False
    # Single stages go on from what is there, and leave it.
    if whole:
        try:
            run_.stage("end", "everything has ended", lambda _: end_all(sockets))
        except (Failed, SimError) as error:
            say(f"FAILED: {error}")
            good = False
        took = run_.seconds() - sum(stage["seconds"] for stage in run_.stages if stage["key"] == "build")
        if took > LIMIT_S:
            say(f"FAILED: the run took {took:.0f} s after the build, wanted at most {LIMIT_S} s")
            good = False
    return good


def interrupt(*_: object) -> None:
    # The end of the machines is not to be interrupted once more.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Returns 0 when every stage passed, and a whole run within its limit."""
    parser = argparse.ArgumentParser(prog="make test-aarch64", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--strategy", choices=STRATEGIES, default="linear", help="how Ansible runs its tasks")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    whole = not options.stages
    # Short, whatever the checkout's path is: a socket's name may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="reap-ssh-") as name:
        sockets = Path(name)
        current = Run(options.strategy, sockets)
        if whole:
            machine.down(machine.all_names())
        good = work(current, options.stages or list(STAGES), whole, sockets)
        if not whole:
            for socket in sockets.iterdir():
                run(["ssh", "-o", f"ControlPath={socket}", "-O", "exit", "closed"], check=False)
    result = current.result()
    name = "result" if whole else "stages"
    write_json(ARTIFACTS / f"{name}.json", result)
    write_atomic(ARTIFACTS / f"{'README' if whole else 'stages'}.md", report.page(result))
    print("\n".join(report.table(result)))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
