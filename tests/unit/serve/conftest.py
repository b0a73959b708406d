"""A supervisor as its own process, with doubles of the engine and of systemctl first on its path."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from reap.serve.config import service_settings
from reap.serve.state import boot_id, write_text

ROOT = Path(__file__).resolve().parents[3]
DOUBLES = Path(__file__).parent / "doubles"
MAIN = (
    "import sys; from pathlib import Path; from reap.serve import host; from reap.serve.supervisor import Supervisor; "
    "host.DROP_CACHES = Path(sys.argv[2]); sys.exit(Supervisor(Path(sys.argv[1]), tick_s=0.05).run())"
)


def until(condition: Callable[[], Any], what: str | Callable[[], str], seconds: float = 180.0) -> Any:
    """Wait for a condition; fail with ``what`` as it is then when it does not come."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what() if callable(what) else what}")


def free_port() -> int:
    """A TCP port that nobody listens on now, outside the range that connections take theirs from."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", random.randrange(20000, 32000)))
            return int(probe.getsockname()[1])


class Bench:
    """Folders, images and settings of one simulated host, and the supervisors started on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = folder / "engine"
        self.run_dir = folder / "run"
        self.state_dir = folder / "state"
        self.config_path = folder / "service.json"
        self.key_file = folder / "api-key"
        self.port = free_port()
        self.processes: list[subprocess.Popen[str]] = []
        self.messages: list[str] = []
        for path in (self.engine, self.run_dir, folder / "model"):
            path.mkdir()
        (folder / "model" / "config.json").write_text("{}")
        self.images: dict[str, dict[str, Any]] = {}
        self.image("good")
        self.configure()
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.bind(str(folder / "notify"))
        threading.Thread(target=self._listen, daemon=True).start()

    def image(self, name: str, **behaviour: Any) -> None:
        self.images[name] = behaviour
        self.tell("engine/images.json", json.dumps(self.images))

    def tell(self, name: str, text: str) -> None:
        """Replace a file in one step: a process of the test may be reading it."""
        write_text(self.folder / name, text, 0o644)

    def watchdog(self, **state: Any) -> int:
        """What a memory watchdog last wrote, and a process that could be it; returns that one's number."""
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "watch"], text=True)
        self.processes.append(process)
        self.tell("run/watchdog.json", json.dumps({"boot_id": boot_id(), "pid": process.pid, **state}))
        return process.pid

    def settings(self, **changes: Any) -> dict[str, Any]:
        profiles = yaml.safe_load((ROOT / "group_vars/all/profiles.yml").read_text())["reap_profiles"]
        timings = {"backoff_s": 0, "drain_s": 5, "grace_s": 1, "start_timeout_s": 60, "memory_wait_s": 0}
        return {
            "profile": "sim-needle-32k",
            "profile_data": profiles["sim-needle-32k"],
            "image": "good",
            "model_dir": str(self.folder / "model"),
            "cache_dir": str(self.folder / "cache"),
            "host": "127.0.0.1",
            "port": self.port,
            "entrypoint": "vllm",
            "gpus": None,
            "ipc": "host",
            "ulimits": {},
            "shm_size": None,
            "api_key_file": str(self.key_file),
            "api_key_required": False,
            "drop_page_cache": False,
            "state_dir": str(self.state_dir),
            "run_dir": str(self.run_dir),
            "evidence_dir": str(self.folder / "evidence"),
            "watchdog_required": False,
            "watchdog_settings": str(self.folder / "watchdog.toml"),
            "timings": timings | changes.pop("timings", {}),
            **changes,
        }

    def configure(self, **changes: Any) -> str:
        """Write the service's file, without a memory gate; returns the generation's name."""
        from reap.serve.config import ServiceConfig

        content = service_settings(self.settings(**changes)) | {"fit": None}
        self.tell(self.config_path.name, json.dumps(content))
        return ServiceConfig.read(self.config_path).generation

    def environment(self) -> dict[str, str]:
        """Of everything that is started here: doubles before the real programs."""
        return os.environ | {
            "PATH": f"{DOUBLES}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "plugins/module_utils"),
            "DOUBLE_DOCKER_DIR": str(self.engine),
            "NOTIFY_SOCKET": str(self.folder / "notify"),
        }

    def start(self) -> subprocess.Popen[str]:
        """The service's main process."""
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, str(self.config_path), str(self.folder / "drop_caches")],
            env=self.environment(),
            stdout=(self.folder / "out").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        return process

    def clean_up(self, result: str, code: str = "", status: str = "") -> None:
        """What systemd runs after the end of the main process, with what it tells of that end."""
        ending = {"SERVICE_RESULT": result, "EXIT_CODE": code, "EXIT_STATUS": status}
        command = [sys.executable, "-m", "reap", "serve", "--config", str(self.config_path), "--clean-up"]
        subprocess.run(command, env=self.environment() | ending, check=True, timeout=120)

    def heard(self) -> list[str]:
        """Every line that was said to systemd so far."""
        return list(self.messages)

    def _listen(self) -> None:
        while data := self.channel.recv(65536):
            self.messages += data.decode().splitlines()

    def state(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.run_dir / "service.json").read_text()))
        except OSError:
            return {"phase": None}

    def await_phase(self, phase: str) -> dict[str, Any]:
        until(
            lambda: self.state()["phase"] == phase,
            lambda: f"phase {phase}; state {self.state()}, log:\n{self.log()}",
        )
        return self.state()

    def restarted_by_systemd(self, times: int) -> None:
        self.tell("engine/restarts", str(times))

    def log(self) -> str:
        path = self.folder / "out"
        return path.read_text() if path.exists() else ""

    def container_pid(self) -> int:
        return int(json.loads((self.engine / "container.json").read_text())["State"]["Pid"])

    def started(self) -> list[int]:
        """The process of each container that was started."""
        return [int(line) for line in (self.engine / "started").read_text().splitlines()]

    def answered(self) -> int:
        """How many requests for tokens the double answered."""
        path = self.engine / "answered"
        return len(path.read_text()) if path.exists() else 0

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        # The engine's double may be removing it at this moment.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(self.container_pid(), signal.SIGKILL)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ending:
            ending.sendto(b"", str(self.folder / "notify"))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()
