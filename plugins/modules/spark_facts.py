#!/usr/bin/python
"""Read in one step everything the preflight judges."""

from __future__ import annotations

DOCUMENTATION = r"""
module: spark_facts
short_description: Read what the preflight judges about a host, in one step
description:
  - Reads architecture, firmware, GPU, memory, operating system, free space, engine and listeners. Changes nothing.
  - One module instead of a dozen tasks, because every task on a host costs a connection's round trip.
version_added: 0.1.0
author: The recipe's authors
attributes:
  check_mode:
    support: full
    description: It never changes anything.
  diff_mode:
    support: none
    description: There is nothing to show.
  platform:
    support: full
    platforms: Linux
    description: It reads /proc and /sys.
options:
  paths:
    description: Folders of which the missing ones are wanted.
    type: list
    elements: path
    default: []
  packages:
    description: Distribution packages of which the missing ones are wanted.
    type: list
    elements: str
    default: []
  port:
    description: The TCP port on which the model is to listen; whether something else listens there is wanted.
    type: int
  run_dir:
    description: Where reap.service writes what it serves, to tell its own port from another's.
    type: path
    default: /run/reap
  model_dir:
    description:
      - The model's folder; the free space of its filesystem is wanted, and how much of the model is there.
      - A folder that does not exist yet is measured at its nearest parent.
    type: path
  image:
    description:
      - The runtime image, as C(reap image --base) takes it. The free space where the engine keeps its images is wanted,
        and whether this image is one of them.
    type: dict
"""

EXAMPLES = r"""
- name: Facts of the host are known
  spark_facts:
    paths: [/var/lib/reap]
    port: 8000
    model_dir: /var/lib/reap/models/0xSero/DeepSeek-V4-Flash-162B/d663e8fb16809f6619000648b187b257249ed824
  register: __spark_facts
"""

RETURN = r"""
facts:
  description: What was read. Sizes of memory in kB, of disks in bytes.
  returned: always
  type: dict
  sample:
    architecture: aarch64
    product: NVIDIA_DGX_Spark
    dgx_name: DGX Spark
    gpu_names: [NVIDIA GB10]
    gpu_error: null
    mem_total_kb: 126000000
    mem_available_kb: 118000000
    swap_total_kb: 16777212
    os_id: ubuntu
    os_version: "24.04"
    kernel: 6.14.0-1015-nvidia
    init: systemd
    root: true
    hostname: spark-2822
    docker: 29.1.3
    docker_error: null
    docker_installed: true
    docker_enabled: true
    docker_runtimes: [nvidia, runc]
    missing_packages: []
    missing_paths: []
    port_taken: false
    disks:
      model: {path: /var/lib/reap/models, device: 66306, free: 1200000000000, present: 0, whole: false}
      image: {path: /var/lib/docker, device: 66306, free: 1200000000000, present: 0, whole: true}
"""

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.reap.errors import ReapError
from ansible.module_utils.reap.identity import parse_meminfo, parse_os_release
from ansible.module_utils.reap.images import base as bases
from ansible.module_utils.reap.images.engine import Engine
from ansible.module_utils.reap.serve.state import alive, read_json

# 127.0.0.1, the same inside IPv6, and ::1, as /proc/net shows them on a little-endian machine.
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")


def read_text(path: str) -> str:
    """The file's text without trailing newline or NUL, or an empty string where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\n\0 ")
    except OSError:
        return ""


def gpu_names() -> tuple[list[str], str | None]:
    """Names that nvidia-smi lists, and why there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], "nvidia-smi is not installed"
    try:
        done = subprocess.run(
            [program, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi did not answer: {error}"
    names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode != 0:
        return [], (done.stderr or done.stdout).strip()[-200:] or f"nvidia-smi ended with {done.returncode}"
    return names, None


def answer(*command: str) -> str:
    """Standard output of a short command, or an empty string where it is missing, hangs or fails."""
    program = shutil.which(command[0])
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def docker_facts() -> dict[str, Any]:
    """What is known of the engine. One that is stopped or slow is installed all the same, and its runtimes are unknown.

    Returns:
        docker (the server's version, empty where none answers), docker_error (why it is empty, else None),
        docker_installed, docker_runtimes (empty where none answers), docker_enabled (starts at boot).
    """
    program = shutil.which("docker")
    unit = answer("systemctl", "show", "--value", "--property=LoadState", "docker.service")
    info: dict[str, Any] = {}
    error = None
    if program is None:
        error = "there is no program docker"
    else:
        try:
            done = subprocess.run(
                [program, "info", "--format", "{{json .}}"], capture_output=True, text=True, timeout=30, check=False
            )
            info = json.loads(done.stdout) if done.returncode == 0 else {}
            error = done.stderr.strip()[-200:] or f"docker info ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            error = "docker info did not answer in 30 s"
        except (OSError, ValueError) as problem:
            error = f"docker info cannot be read: {problem}"
    version = str(info.get("ServerVersion") or "")
    return {
        "docker": version,
        "docker_error": None if version else error,
        # A masked unit is somebody's decision about an engine that is there.
        "docker_installed": program is not None or unit in ("loaded", "masked", "bad-setting", "error"),
        "docker_runtimes": sorted(info.get("Runtimes") or {}) if version else [],
        "docker_enabled": answer("systemctl", "is-enabled", "docker.service") == "enabled",
    }


def missing_packages(names: list[str]) -> list[str]:
    """The names that dpkg does not list as installed, in their order."""
    if not names:
        return []
    program = shutil.which("dpkg-query")
    if program is None:
        return list(names)
    done = subprocess.run(
        [program, "--show", "--showformat", "${Package} ${db:Status-Status}\n", *names],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    installed = {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" installed")}
    return [name for name in names if name not in installed]


def disk(path: str, present: int, whole: bool) -> dict[str, Any]:
    """Filesystem of the path or of its nearest existing parent: its number, and bytes that a writer may still use."""
    place = Path(path)
    while not place.exists():
        place = place.parent
    numbers = os.statvfs(place)
    return {
        "path": path,
        "device": place.stat().st_dev,
        "free": numbers.f_bavail * numbers.f_frsize,
        "present": present,
        "whole": whole,
    }


def model_disk(folder: str) -> dict[str, Any]:
    """Where the model goes, and how many bytes of it are there; what exactly is missing the download knows."""
    part = Path(f"{folder}.partial")
    present = sum(file.stat().st_size for file in part.rglob("*") if file.is_file()) if part.is_dir() else 0
    return disk(folder, present, Path(folder).is_dir())


def image_disk(image: dict[str, Any]) -> dict[str, Any]:
    """Where the engine keeps its images; a host whose engine does not answer has none yet."""
    root, there = "/var/lib/docker", False
    try:
        engine = Engine()
        root = bases.store_root(engine.call("GET", "/info"))
        there = bases.locate(engine, bases.Spec.of(image)) is not None
    except ReapError:
        pass
    return disk(root, 0, there)


def port_taken(port: int, run_dir: str) -> bool:
    """Whether something else than reap.service listens on the port, on any or on this machine's own address."""
    state = read_json(Path(run_dir) / "service.json") or {}
    # The file outlives the service: after a stop another program may have the port. Where the supervisor died, its
    # container listens until the clean-up.
    lives = alive(state) or alive({**state, "pid": state.get("container_pid")})
    if lives and state.get("phase") != "absent" and str(state.get("endpoint")).endswith(f":{port}"):
        return False
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in read_text(table).splitlines()[1:]:
            # proc(5): local address and port in hex, the address in words of the host's byte order; state 0A is LISTEN.
            fields = line.split()
            if len(fields) > 3 and fields[3] == "0A":
                address, _, number = fields[1].rpartition(":")
                if int(number, 16) == port and (set(address) == {"0"} or address in LOOPBACK):
                    return True
    return False


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "paths": {"type": "list", "elements": "path", "default": []},
            "packages": {"type": "list", "elements": "str", "default": []},
            "port": {"type": "int"},
            "run_dir": {"type": "path", "default": "/run/reap"},
            "model_dir": {"type": "path"},
            "image": {"type": "dict"},
        },
        supports_check_mode=True,
    )
    memory = parse_meminfo(read_text("/proc/meminfo"))
    release = parse_os_release(read_text("/etc/os-release"))
    names, gpu_error = gpu_names()
    port, model, image = (module.params[name] for name in ("port", "model_dir", "image"))
    disks = {}
    if model:
        disks["model"] = model_disk(model)
    if image:
        disks["image"] = image_disk(image)
    facts = {
        "architecture": platform.machine(),
        "product": read_text("/sys/class/dmi/id/product_name"),
        "vendor": read_text("/sys/class/dmi/id/sys_vendor"),
        "dgx_name": parse_os_release(read_text("/etc/dgx-release")).get("DGX_NAME", ""),
        "gpu_names": names,
        "gpu_error": gpu_error,
        "mem_total_kb": memory.get("MemTotal", 0),
        "mem_available_kb": memory.get("MemAvailable", 0),
        "swap_total_kb": memory.get("SwapTotal", 0),
        "os_id": release.get("ID", "unknown"),
        "os_version": release.get("VERSION_ID", "unknown"),
        "kernel": platform.release(),
        "init": read_text("/proc/1/comm"),
        "root": os.geteuid() == 0,
        "hostname": platform.node(),
        **docker_facts(),
        "missing_packages": missing_packages(module.params["packages"]),
        "missing_paths": [path for path in module.params["paths"] if not Path(path).is_dir()],
        "port_taken": port_taken(port, module.params["run_dir"]) if port else False,
        "disks": disks,
    }
    module.exit_json(changed=False, facts=facts)


if __name__ == "__main__":
    main()
