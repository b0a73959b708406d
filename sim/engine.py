"""The container engine: the one that the machine already runs, or a private one of the distribution's packages."""

from __future__ import annotations

import contextlib
import getpass
import grp
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sim.common import (
    CACHE,
    GIB,
    LABEL,
    SimError,
    as_root,
    lock,
    need_space,
    prefix,
    program,
    read_json,
    run,
    say,
    stamp,
    step,
    wait_for,
    write_json,
)

ENGINE_DIR = CACHE / "engine"
STATE = CACHE / "engine.json"

# The machine's network settings before the first private engine of any checkout; the last one to stop restores them.
NETWORK_BEFORE = Path("/run/reap-sim-network.json")

# Linux capability names by number (include/uapi/linux/capability.h). Engines before 20.10.17 know those up to 37.
_CAPABILITY_NAMES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ"
)
CAPABILITIES = _CAPABILITY_NAMES.split()


def capabilities(bounding: int) -> list[str]:
    """The names of the capabilities in the mask `bounding` (CapBnd of /proc/self/status) that every engine knows."""
    return [name for number, name in enumerate(CAPABILITIES) if bounding >> number & 1]


def privilege_options(privileged_works: bool, bounding: int) -> list[str]:
    """`docker run` options that let systemd and an engine run inside: --privileged, or all the machine can give."""
    if privileged_works:
        return ["--privileged"]
    options = [f"--cap-add={name}" for name in capabilities(bounding)]
    options += ["--security-opt=seccomp=unconfined", "--security-opt=apparmor=unconfined"]
    return [*options, "--device-cgroup-rule=a *:* rwm"]


def bounding_set(status: str) -> int:
    """The capability bounding set out of the text of /proc/<pid>/status."""
    found = re.search(r"^CapBnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
    if not found:
        raise SimError("no CapBnd line in /proc/self/status: this is not Linux")
    return int(found[1], 16)


def undo_rules(before: str, after: str) -> list[list[str]]:
    """The iptables arguments that take a stopped engine's rules and chains out again.

    `before` and `after` are outputs of iptables-save. Only rules that name a DOCKER chain and DOCKER chains themselves
    that were not there before are touched, so rules that others made meanwhile stay.
    """
    known = set(before.splitlines())
    chains_before = {line.split()[0][1:] for line in known if line.startswith(":")}
    rules: list[list[str]] = []
    chains: list[list[str]] = []
    table = ""
    for line in after.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith("-A ") and "DOCKER" in line and line not in known:
            rules.append(["-t", table, "-D", *line.split()[1:]])
        elif line.startswith(":DOCKER"):
            chain = line.split()[0][1:]
            if chain not in chains_before:
                chains.append(["-t", table, "-X", chain])
    return rules + chains


class Engine:
    """A way to call `docker`: `mode` is "machine" (was there, is left as it was) or "private" (ours)."""

    def __init__(self, mode: str, command: Sequence[str]) -> None:
        self.mode = mode
        self.command = list(command)

    def docker(self, *words: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs `docker WORDS`."""
        return run([*self.command, *words], check=check, **options)

    def output(self, *words: str | Path) -> str:
        """Stdout of `docker WORDS`, stripped."""
        return self.docker(*words).stdout.strip()

    def answers(self) -> bool:
        """Whether it is a Docker engine that can hold our hosts (rootless ones and others' look-alikes cannot)."""
        done = self.docker("info", "--format", "{{.ServerVersion}}|{{.SecurityOptions}}", check=False)
        version, _, security = done.stdout.strip().partition("|")
        return done.returncode == 0 and bool(version) and "rootless" not in security

    def ours(self, kind: str | None = None, what: str = "container") -> list[str]:
        """Names of the objects of type `what` that carry this checkout's label (and the kind), running or not."""
        filters = ["--filter", f"label={LABEL}={CACHE}"]
        if kind:
            filters += ["--filter", f"label=reap.sim.kind={kind}"]
        if what == "container":
            return self.output("ps", "--all", "--format", "{{.Names}}", *filters).split()
        if what == "image":
            return self.output("images", "--quiet", "--no-trunc", *filters).split()
        return self.output(what, "ls", "--format", "{{.Name}}", *filters).split()

    def running(self, name: str) -> bool:
        """Whether the container `name` runs."""
        return self.docker("inspect", "--format", "{{.State.Running}}", name, check=False).stdout.strip() == "true"

    def exists(self, name: str) -> bool:
        """Whether a container `name` exists, running or not."""
        return self.docker("inspect", "--format", "{{.Id}}", name, check=False).returncode == 0

    def has_image(self, reference: str) -> bool:
        """Whether the image is in the engine."""
        return self.docker("image", "inspect", "--format", "{{.Id}}", reference, check=False).returncode == 0

    def privileges(self, image: str) -> list[str]:
        """The options for a host's container, found out once by trying with `image`."""
        state = read_json(STATE, {})
        if "privileged" not in state:
            labels = ["--label", f"{LABEL}={CACHE}", "--label", "reap.sim.kind=probe"]
            tried = self.docker(
                "run", "--rm", "--privileged", "--network=none", *labels, image, "/bin/true", check=False
            )
            state["privileged"] = tried.returncode == 0
            write_json(STATE, state)
        return privilege_options(state["privileged"], bounding_set(Path("/proc/self/status").read_text()))


def run_dir() -> Path:
    """Sockets and other things of a running private engine: a short path, and gone after a restart of the machine."""
    return Path("/run") / prefix()


def private_engine() -> Engine:
    """The private engine, whether it runs or not."""
    return Engine("private", ["docker", "-H", f"unix://{run_dir()}/client/docker.sock"])


def machine_engine() -> Engine | None:
    """The engine that the machine itself runs, through sudo where its socket is closed to this user."""
    if not shutil.which("docker") or not os.environ.get("DOCKER_HOST", "unix://").startswith("unix://"):
        return None
    candidates = [["docker"]]
    if os.geteuid() and shutil.which("sudo") and Path("/run/docker.sock").exists():
        candidates.append(["sudo", "docker"])
    for command in candidates:
        engine = Engine("machine", command)
        if engine.answers():
            return engine
    return None


def current() -> Engine | None:
    """The engine in use by this checkout, or None where none answers. Starts nothing."""
    private = private_engine()
    if (run_dir() / "client" / "docker.sock").exists() and shutil.which("docker") and private.answers():
        return private
    return machine_engine()


def require() -> Engine:
    """The engine in use; a SimError where none runs."""
    engine = current()
    if engine is None:
        raise SimError("no simulated host runs here: start one with `python3 -m sim up NAME`")
    return engine


def ensure() -> Engine:
    """The machine's engine, or the private one, started now if need be."""
    engine = current()
    if engine is None:
        with lock("engine"):
            engine = current() or _start()
    state = read_json(STATE, {})
    identity = engine.output("info", "--format", "{{.ID}}")
    if state.get("id") != identity:
        write_json(STATE, {"mode": engine.mode, "id": identity})
    return engine


# apt checks signatures as a user of its own, which on some machines may not write to /tmp.
APT_GET = ("env", "DEBIAN_FRONTEND=noninteractive", "TMPDIR=/var/tmp", "apt-get")


def install_packages(packages: Sequence[str], why: str) -> None:
    """Installs distribution packages that are missing; their services do not start, neither now nor at a boot."""
    query = run(["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *packages], check=False)
    there = {line.split()[0] for line in query.stdout.splitlines() if line.endswith(" installed")}
    missing = [name for name in packages if name not in there]
    if not missing:
        return
    if not program("apt-get"):
        raise SimError(f"{why} needs {' '.join(missing)}; this machine has no apt-get: use Debian 12+ or Ubuntu 24.04+")
    units = [f"{name}.{kind}" for name in ("docker", "containerd") for kind in ("service", "socket")]
    policy = Path("/usr/sbin/policy-rc.d")
    with lock("packages"), step(f"installing {' '.join(missing)} ({why})"):
        has_systemd = Path("/run/systemd/system").is_dir()
        known = set() if not has_systemd else {unit for unit in units if _unit_exists(unit)}
        guard = not policy.exists()
        if guard:
            run(as_root(["install", "-m", "0755", "/dev/stdin", policy]), input_text="#!/bin/sh\nexit 101\n")
        try:
            quiet = [*APT_GET, "-qq", "-o", "DPkg::Lock::Timeout=300"]
            install = [*quiet, "install", "--yes", "--no-install-recommends", *missing]
            if run(as_root(install), check=False).returncode:
                run(as_root([*quiet, "update"]))
                run(as_root(install))
        finally:
            if guard:
                run(as_root(["rm", "-f", policy]))
        new = [unit for unit in units if has_systemd and unit not in known and _unit_exists(unit)]
        if new:
            run(as_root(["systemctl", "disable", "--quiet", *new]))
            say(f"sim: {' '.join(new)} came with the packages and will not start by itself")


def _unit_exists(unit: str) -> bool:
    return run(["systemctl", "cat", unit], check=False).returncode == 0


def docker_packages() -> list[str]:
    """The distribution's Docker engine with its client, which newer distributions put in a package of its own."""
    names = ["docker.io", "iptables"]
    if run(["apt-cache", "show", "docker-cli"], check=False).returncode == 0:
        names.append("docker-cli")
    return names


def _network_before() -> dict[str, Any]:
    """What an engine changes in this machine's network settings, as it is now."""
    saved = {}
    for tool in ("iptables", "ip6tables"):
        if program(f"{tool}-save"):
            saved[tool] = run(as_root([program(f"{tool}-save") or "", "-t", "filter"]), check=False).stdout
            saved[tool] += run(as_root([program(f"{tool}-save") or "", "-t", "nat"]), check=False).stdout
    forward = Path("/proc/sys/net/ipv4/ip_forward").read_text().strip()
    cgroups = [str(path) for path in sorted(Path("/sys/fs/cgroup").glob("*/docker")) if path.is_dir()]
    return {"rules": saved, "ip_forward": forward, "cgroups": cgroups}


def _network_restore(before: dict[str, Any]) -> None:
    """Takes out what the private engine left in this machine's network settings and cgroup folders."""
    now = _network_before()
    for tool, rules in before.get("rules", {}).items():
        path = program(tool) or tool
        for words in undo_rules(rules, now["rules"].get(tool, "")):
            if words[2] == "-X":
                run(as_root([path, *words[:2], "-F", words[3]]), check=False)
            run(as_root([path, *words]), check=False)
        policy = re.search(r"^:FORWARD (\w+)", rules, re.MULTILINE)
        if policy:
            run(as_root([path, "-P", "FORWARD", policy[1]]), check=False)
    if before.get("ip_forward", now["ip_forward"]) != now["ip_forward"]:
        run(as_root(["sh", "-c", f"echo {before['ip_forward']} > /proc/sys/net/ipv4/ip_forward"]), check=False)
    new = [path for path in now["cgroups"] if path not in before.get("cgroups", [])]
    if new:
        run(as_root(["rmdir", *new]), check=False)


def _start() -> Engine:
    """Starts the private engine. The caller holds the engine lock."""
    need_space(ENGINE_DIR, 10, "the simulated Spark (engine, host images, runtime image)")
    if not program("dockerd") or not shutil.which("docker") or not program("iptables"):
        install_packages(docker_packages(), "no container engine runs here; a private one will")
    daemon = program("dockerd")
    if not daemon:
        raise SimError("dockerd is not on this machine although docker.io is installed: reinstall docker.io")
    home = run_dir()
    log = ENGINE_DIR / "dockerd.log"
    settings = {
        "data-root": str(ENGINE_DIR / "data"),
        "exec-root": str(home / "exec"),
        "pidfile": str(home / "dockerd.pid"),
        "hosts": [f"unix://{home}/client/docker.sock"],
        # Who may use the socket; the folder round it (mode 0700, this user's) keeps others of the group out.
        "group": grp.getgrgid(os.getgid()).gr_name,
        "bridge": "none",
        "log-level": "warn",
    }
    with step("starting a private container engine"):
        config = ENGINE_DIR / "daemon.json"
        write_json(config, settings)
        if not NETWORK_BEFORE.exists():
            text = json.dumps(_network_before())
            run(as_root(["install", "-m", "0644", "/dev/stdin", NETWORK_BEFORE]), input_text=text)
        _kill_leftovers(home)
        run(as_root(["rm", "-rf", home]))
        run(as_root(["install", "-d", "-m", "0755", home]))
        owner = ["-o", getpass.getuser(), "-g", str(os.getgid())] if os.geteuid() else []
        run(as_root(["install", "-d", "-m", "0700", *owner, home / "client"]))
        log.touch()
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/bin", "/bin"])
        with log.open("w") as stream:
            subprocess.Popen(
                as_root(["env", f"PATH={path}", daemon, "--config-file", str(config)]),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                cwd="/",
            )
        engine = private_engine()
        try:
            wait_for(engine.answers, 120, "the private container engine")
        except SimError as error:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
            raise SimError(f"{error}; the end of {log}:\n{tail}") from None
        driver = engine.output("info", "--format", "{{.Driver}}")
        if driver == "vfs":
            stop_private()
            raise SimError(
                f"the file system under {ENGINE_DIR} gives the engine no overlay: put the repository on ext4 or xfs"
            )
    return engine


def stop_private() -> None:
    """Stops the private engine, if it runs, and takes out all that it left on the machine but its data folder."""
    home = run_dir()
    pid_file = home / "dockerd.pid"
    if not home.exists():
        return
    with step("stopping the private container engine"):
        pid = _pid(pid_file)
        if pid:
            run(as_root(["kill", "-TERM", str(pid)]), check=False)
            end = time.monotonic() + 40
            while _runs(pid) and time.monotonic() < end:
                time.sleep(0.1)
            if _runs(pid):
                run(as_root(["kill", "-KILL", str(pid)]), check=False)
        _kill_leftovers(home)
        for mount in reversed(_mounts_below([home, ENGINE_DIR])):
            run(as_root(["umount", "-l", mount]), check=False)
        run(as_root(["rm", "-rf", home]))
        if NETWORK_BEFORE.exists() and not _pids(lambda words: Path(words[0]).name == "dockerd"):
            _network_restore(read_json(NETWORK_BEFORE, {}))
            run(as_root(["rm", "-f", NETWORK_BEFORE]))


def _pid(pid_file: Path) -> int | None:
    """The pid of our dockerd, or None; a pid that was given to another program meanwhile does not count."""
    try:
        pid = int(run(as_root(["cat", pid_file]), check=False).stdout or 0)
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if str(ENGINE_DIR / "daemon.json").encode() in words else None


def _runs(pid: int) -> bool:
    """Whether the process still runs. One that ended but was started by this process stays in /proc as a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def _pids(wanted: Callable[[list[str]], bool]) -> list[int]:
    """The processes whose command line `wanted` accepts."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if words[0] and wanted(words):
                found.append(int(path.parent.name))
    return found


def _kill_leftovers(home: Path) -> None:
    """Ends what a killed engine of ours left: its containers' keepers and the first process in each container."""
    keepers = _pids(lambda words: "containerd" in words[0] and any(word.startswith(f"{home}/") for word in words[1:]))
    for keeper in keepers:
        inside = run(["pgrep", "--parent", str(keeper)], check=False).stdout.split()
        run(as_root(["kill", "-KILL", *inside, str(keeper)]), check=False)


def _mounts_below(folders: Sequence[Path]) -> list[str]:
    """Mount points at or below `folders`, in the order in which they were mounted."""
    points = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        point = line.split()[1].replace("\\040", " ")
        if any(point == str(folder) or point.startswith(f"{folder}/") for folder in folders):
            points.append(point)
    return points


def disk_use(path: Path) -> float:
    """GiB that the files below `path` take on disk."""
    done = run(as_root(["du", "-sk", path]), check=False)
    return int(done.stdout.split()[0]) * 1024 / GIB if done.stdout else 0.0


def machine_stamp() -> str:
    """Changes with the machine's distribution: images made from its packages do too."""
    return stamp([Path("/etc/os-release")])
