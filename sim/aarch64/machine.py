"""Emulated machines: cold boots, snapshots, machines out of a snapshot, and their end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from sim.aarch64 import bed
from sim.common import SimError, free_port, read_json, run, say, step, wait_for, write_atomic, write_json

MACHINES = bed.CACHE / "machines"
SNAPSHOTS = bed.CACHE / "snapshots"
SSH_CONFIG = bed.CACHE / "ssh_config"
KNOWN_HOSTS = bed.CACHE / "known_hosts"
FIRMWARE = Path("/usr/share/qemu-efi-aarch64/QEMU_EFI.fd")

# MiB that the machine gets. Its kernel keeps about 1.6 % of them for its page table: see docs/aarch64.md.
MEMORY_MIB = 124928
BOOT_TIMEOUT_S = 600

# The firmware tables of a Founders Edition (docs/hosts.md).
SMBIOS = (
    "type=1,manufacturer=NVIDIA,product=NVIDIA_DGX_Spark,version=A.7,serial=EMULATED,family=DGX Spark",
    "type=2,manufacturer=NVIDIA,product=P4242,version=A.7",
)
KERNEL_ARGUMENTS = "root=/dev/vda rw console=ttyAMA0 loglevel=4 init_on_alloc=0"


def _folder(name: str) -> Path:
    if not name or not name.replace("-", "").isalnum():
        raise SimError(f"machine name {name!r}: wanted letters, digits and '-'")
    return MACHINES / name


def running(name: str) -> int | None:
    """The process of the machine, None where none runs."""
    pid = int(read_json(_folder(name) / "machine.json", {}).get("pid", 0))
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return pid if f"{name},process={bed.mark(name)}".encode() in words else None


def all_names() -> list[str]:
    """Machines of this checkout, running or not."""
    return sorted(path.parent.name for path in MACHINES.glob("*/machine.json"))


def up(name: str, memory_mib: int = MEMORY_MIB, snapshot: str | None = None) -> dict[str, Any]:
    """A machine that answers over SSH: booted cold, or continued from a snapshot. Returns its entry."""
    if running(name):
        raise SimError(f"machine {name} runs already: `python3 -m sim.aarch64 down {name}` first")
    source = SNAPSHOTS / snapshot if snapshot else None
    if source and not (source / "snapshot.json").exists():
        raise SimError(f"there is no snapshot {snapshot!r}: make it with `python3 -m sim.aarch64 snapshot`")
    bed.services()
    folder = _folder(name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if source:
        memory_mib = read_json(source / "snapshot.json")["memory_mib"]
        backing, layout = source / "disk.qcow2", "qcow2"
    else:
        backing, layout = bed.CACHE / "disk.img", "raw"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", backing, "-F", layout, folder / "disk.qcow2"])
    taken = [int(read_json(MACHINES / other / "machine.json", {}).get("port", 0)) for other in all_names()]
    entry: dict[str, Any] = {"name": name, "memory_mib": memory_mib, "port": free_port(taken), "snapshot": snapshot}
    began = time.monotonic()
    with step(f"{name}: " + (f"continuing from snapshot {snapshot}" if source else "booting")):
        try:
            entry["pid"] = _start(folder, entry, source)
            write_json(folder / "machine.json", entry)
            _write_ssh_files()
            if source:
                _monitor(folder, [("cont", {})])
            _await_ssh(name)
            if source:
                ssh(name, f"sudo date -s @{time.time():.0f} >/dev/null")
            else:
                _await_boot(name)
        except BaseException:
            down([name])
            raise
    entry["up_s"] = round(time.monotonic() - began, 1)
    write_json(folder / "machine.json", entry)
    return entry


def _start(folder: Path, entry: dict[str, Any], source: Path | None) -> int:
    """Starts the emulator; where it comes from a snapshot, its state is loaded and it stands still."""
    # A snapshot's memory is mapped private: what the machine writes is its own. Untouched pages cost nothing.
    memory = (source or folder) / "memory"
    shared = "off,reserve=off" if source else "on"
    size = entry["memory_mib"]
    name = entry["name"]
    command = [
        *("qemu-system-aarch64", "-name", f"{name},process={bed.mark(name)}"),
        *("-M", "virt,memory-backend=ram0", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "cortex-a76"),
        *("-smp", "2", "-m", f"{size}M", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-object", f"memory-backend-file,id=ram0,size={size}M,mem-path={memory},share={shared}"),
        *("-bios", str(FIRMWARE), "-kernel", str(bed.CACHE / "vmlinuz"), "-initrd", str(bed.CACHE / "initrd")),
        *("-append", KERNEL_ARGUMENTS),
        *(word for table in SMBIOS for word in ("-smbios", table)),
        *("-drive", "file=disk.qcow2,if=virtio,cache=unsafe,discard=unmap"),
        *("-netdev", f"user,id=net0,hostfwd=tcp:127.0.0.1:{entry['port']}-:22"),
        *("-device", "virtio-net-pci,netdev=net0,romfile=", "-device", "virtio-rng-pci"),
        *("-serial", "file:console.log", "-qmp", "unix:qmp.sock,server=on,wait=off"),
        *(("-incoming", "defer") if source else ()),
    ]
    with (folder / "emulator.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def listens() -> bool:
        if process.poll() is not None:
            raise SimError(f"the emulator ended: {(folder / 'emulator.log').read_text().strip()[-800:]}")
        return (folder / "qmp.sock").exists()

    try:
        wait_for(listens, 30, f"the emulator of {name}")
        if source:
            state = source / "state"
            _monitor(folder, [_IGNORE_SHARED, ("migrate-incoming", {"uri": f"exec:cat {state}"})])
            wait_for(lambda: _migrated(folder), 120, f"the state of {name}")
    except BaseException:
        # Nobody has noted it yet, so nobody else would end it.
        process.kill()
        process.wait()
        raise
    return process.pid


_IGNORE_SHARED: tuple[str, dict[str, Any]] = (
    "migrate-set-capabilities",
    {"capabilities": [{"capability": "x-ignore-shared", "state": True}]},
)


def _migrated(folder: Path) -> bool:
    status = _monitor(folder, [("query-migrate", {})])[-1].get("status")
    if status == "failed":
        raise SimError(f"the state could not be moved: {(folder / 'emulator.log').read_text().strip()[-800:]}")
    return bool(status == "completed")


def _monitor(folder: Path, commands: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Answers of the emulator's monitor (QEMU Machine Protocol) to commands, in order."""
    # The way through the open folder keeps the socket's name short: it may have 107 bytes.
    descriptor = os.open(folder, os.O_PATH)
    answers = []
    try:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(60)
            channel.connect(f"/proc/self/fd/{descriptor}/qmp.sock")
            stream = channel.makefile("rw")
            json.loads(stream.readline())
            for command, arguments in [("qmp_capabilities", {}), *commands]:
                stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
                stream.flush()
                while "event" in (answer := json.loads(stream.readline())):
                    pass
                if "error" in answer:
                    raise SimError(f"the emulator refuses {command}: {answer['error'].get('desc')}")
                answers.append(answer["return"])
    finally:
        os.close(descriptor)
    return answers


def snapshot(name: str, label: str) -> None:
    """Turns a machine that was booted cold into a snapshot; the machine ends."""
    folder, target = _folder(name), SNAPSHOTS / label
    entry = read_json(folder / "machine.json", {})
    if not running(name) or entry.get("snapshot"):
        raise SimError(f"a snapshot is made of a running machine that was booted cold; {name} is none")
    with step(f"{name}: snapshot {label}"):
        # Only the small rest goes through the pipe: the memory is a file already.
        ssh(name, "sync")
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        moved = [_IGNORE_SHARED, ("stop", {}), ("migrate", {"uri": f"exec:cat > {target / 'state'}"})]
        _monitor(folder, moved)
        wait_for(lambda: _migrated(folder), 120, f"the state of {name}")
        down([name], keep=True)
        for part in ("memory", "disk.qcow2"):
            (folder / part).rename(target / part)
        shutil.rmtree(folder)
        _write_ssh_files()
        write_json(target / "snapshot.json", {"memory_mib": entry["memory_mib"], "made": time.time()})


def down(names: list[str], keep: bool = False) -> None:
    """Ends machines and, unless `keep`, removes their files. The last one takes the registry and the hub with it."""
    for name in names:
        pid = running(name)
        if pid:
            os.kill(pid, signal.SIGTERM)
            wait_for(lambda name=name: running(name) is None, 30, f"the end of {name}")  # type: ignore[misc]
        if not keep:
            shutil.rmtree(_folder(name), ignore_errors=True)
    _write_ssh_files()
    if not any(running(name) for name in all_names()):
        bed.stop_services()


def _write_ssh_files() -> None:
    blocks, keys = [], []
    host_key = bed.HOST_KEY.with_suffix(".pub").read_text().split()[:2] if bed.HOST_KEY.exists() else []
    for name in all_names():
        port = read_json(MACHINES / name / "machine.json", {}).get("port")
        blocks.append(
            f"Host {name}\n  HostName 127.0.0.1\n  Port {port}\n  User {bed.USER}\n"
            f'  IdentityFile "{bed.KEY}"\n  IdentitiesOnly yes\n  UserKnownHostsFile "{KNOWN_HOSTS}"\n'
            "  GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n  HostKeyAlgorithms ssh-ed25519\n"
        )
        keys.append(f"[127.0.0.1]:{port} {' '.join(host_key)}\n")
    write_atomic(SSH_CONFIG, "# Written by `python3 -m sim.aarch64`; changes are lost.\n" + "\n".join(blocks))
    write_atomic(KNOWN_HOSTS, "".join(keys))


def ssh(name: str, command: str, *, check: bool = True, timeout: float | None = 600) -> str:
    """Runs a shell command on the machine as its user; returns its output."""
    words = ["ssh", "-F", str(SSH_CONFIG), "-o", "ConnectTimeout=20", "-o", "BatchMode=yes", name, command]
    return run(words, check=check, timeout=timeout).stdout


def _await_ssh(name: str) -> None:
    def answers() -> bool:
        if running(name) is None:
            raise SimError(f"{name} ended; its console: {_folder(name) / 'console.log'}")
        words = ["ssh", "-F", str(SSH_CONFIG), "-o", "ConnectTimeout=10", "-o", "BatchMode=yes", name, "true"]
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0

    wait_for(answers, BOOT_TIMEOUT_S, f"SSH on {name} (console: {_folder(name) / 'console.log'})", every=1.0)


def _await_boot(name: str) -> None:
    state = ssh(name, "systemctl is-system-running --wait", check=False).strip()
    if state != "running":
        failed = ssh(name, "systemctl --failed --no-legend --plain", check=False).strip()
        say(f"sim: note: {name} is {state}; failed units: {failed or 'none'}")


def boot_id(name: str) -> str:
    """The kernel's name of this boot."""
    return ssh(name, "cat /proc/sys/kernel/random/boot_id", check=False, timeout=60).strip()


def reboot(name: str) -> None:
    """An orderly restart from inside; returns when systemd has started everything."""
    before = boot_id(name)
    with step(f"{name}: rebooting"):
        ssh(name, "sudo systemctl reboot", check=False)
        wait_for(lambda: boot_id(name) not in ("", before), BOOT_TIMEOUT_S, f"{name} after its reboot", every=2.0)
        _await_boot(name)
