"""The container engine's command line: what is started, asked and removed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ReapError
from .config import CONTAINER_NAME, ServiceConfig
from .gate import FOLDER, MIDDLEWARE, python_path

LABEL = "reap.generation"


class DockerDown(ReapError):
    """The engine does not answer."""


@dataclass(frozen=True)
class Container:
    """What the engine knows of a container. ``pid`` is 0 when it does not run; ``generation`` None when not ours."""

    id: str
    pid: int
    generation: str | None


def run_command(
    config: ServiceConfig,
    environment_file: Path | None,
    gate: Path,
    image_environment: Sequence[str] = (),
    binary: str = "docker",
) -> list[str]:
    """The command line that runs the model in the foreground.

    Args:
        config: what to run.
        environment_file: file with the secret variables, for ``--env-file``; its content is on no command line.
        gate: folder with the middleware that refuses new requests during a stop (:mod:`reap.serve.gate`).
        image_environment: the image's own ``NAME=value`` pairs.
        binary: the engine's client.

    Returns:
        The arguments. No restart policy: systemd restarts. ``--pull never``: an image comes only from a provision.
    """
    command = [
        *(binary, "run", "--rm", "--name", CONTAINER_NAME, "--pull", "never"),
        *("--label", f"{LABEL}={config.generation}", "--label", f"reap.profile={config.profile}"),
        # The kernel's own killer, should it ever come to that, takes the model and not sshd.
        *("--network", "host", "--ipc", config.ipc, "--oom-score-adj", "500"),
        # The journal has the log; what `docker logs` shows is bounded.
        *("--log-driver", "local", "--log-opt", "max-size=10m", "--log-opt", "max-file=2"),
    ]
    if config.gpus:
        command += ["--gpus", config.gpus]
    if config.shm_size:
        command += ["--shm-size", config.shm_size]
    for name, value in sorted(config.ulimits.items()):
        command += ["--ulimit", f"{name}={value}"]
    # Not part of the configuration: a generation of an earlier program gets the door too.
    environment = config.environment | {
        "PYTHONPATH": python_path(image_environment, config.environment.get("PYTHONPATH"))
    }
    for name, value in sorted(environment.items()):
        command += ["--env", f"{name}={value}"]
    if environment_file:
        command += ["--env-file", str(environment_file)]
    command += ["--mount", f"type=bind,source={config.model_dir},target={config.model_dir},readonly"]
    command += ["--mount", f"type=bind,source={config.cache_dir},target={config.cache_dir}"]
    command += ["--mount", f"type=bind,source={gate},target={FOLDER},readonly"]
    return [*command, "--entrypoint", config.entrypoint, config.image, *config.arguments, "--middleware", MIDDLEWARE]


class Docker:
    """Short questions to the engine; each ends within its time limit."""

    def __init__(self, binary: str = "docker") -> None:
        self.binary = binary

    def fault(self) -> str | None:
        """Why the engine cannot be used now, or nothing."""
        try:
            code, _, error = self._ask(["version", "--format", "{{.Server.Version}}"], 20)
        except DockerDown as down:
            return str(down)
        return None if code == 0 else error

    def image_id(self, reference: str) -> str | None:
        """Identity of an image on this host, or nothing when it is not there."""
        code, out, error = self._ask(["image", "inspect", "--format", "{{.Id}}", reference], 20)
        if code and "no such" not in error.lower():
            raise DockerDown(f"docker image inspect {reference}: {error}")
        return out or None

    def image_environment(self, reference: str) -> list[str]:
        """``NAME=value`` pairs that an image on this host sets."""
        code, out, error = self._ask(["image", "inspect", "--format", "{{json .Config.Env}}", reference], 20)
        if code:
            raise DockerDown(f"docker image inspect {reference}: {error}")
        return list(json.loads(out) or [])

    def state(self, name: str) -> dict[str, Any] | None:
        """What the engine says of a container's state, or nothing where it knows none or does not answer."""
        try:
            code, out, _ = self._ask(["container", "inspect", "--format", "{{json .State}}", name], 20)
            return dict(json.loads(out)) if code == 0 else None
        except (DockerDown, ValueError):
            return None

    def find(self, name: str) -> Container | None:
        """The container of that name, running or not."""
        code, out, error = self._ask(["container", "inspect", name], 20)
        if code:
            if "no such" in error.lower():
                return None
            raise DockerDown(f"docker container inspect {name}: {error}")
        data = json.loads(out)[0]
        labels = data["Config"].get("Labels") or {}
        return Container(data["Id"], int(data["State"].get("Pid") or 0), labels.get(LABEL))

    def stop(self, name: str, grace_s: int) -> None:
        """SIGTERM, and the engine's own kill after the grace."""
        self._ask(["stop", "--time", str(grace_s), name], grace_s + 15)

    def remove(self, name: str) -> None:
        """Remove a container, killing it where it still runs."""
        self._ask(["rm", "--force", name], 30)

    def _ask(self, arguments: Sequence[str], timeout_s: float) -> tuple[int, str, str]:
        try:
            done = subprocess.run(
                [self.binary, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except FileNotFoundError as error:
            raise DockerDown(f"{self.binary} is not installed; provision this host") from error
        except subprocess.TimeoutExpired as error:
            raise DockerDown(f"docker {arguments[0]} did not answer within {timeout_s:.0f} s") from error
        return done.returncode, done.stdout.strip(), done.stderr.strip()
