"""What the emulated machines are made of: disk, kernel, registry with the image's double, hub with the checkpoint."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sim import images
from sim.common import (
    REPOSITORY,
    SimError,
    as_root,
    free_port,
    http_answers,
    need_space,
    read_json,
    run,
    say,
    stamp,
    step,
    wait_for,
    write_json,
)
from sim.engine import install_packages
from sim.runtime_image import registry

sys.path[:0] = [str(REPOSITORY / "plugins/module_utils"), str(REPOSITORY)]

from tests.published import fetch as published_files  # noqa: E402
from tests.published.releases import files_of  # noqa: E402
from tests.support.sparse_checkpoint import write_sparse_checkpoint  # noqa: E402

HERE = Path(__file__).resolve().parent
CACHE = REPOSITORY / ".cache" / "aarch64"
FACTS = CACHE / "facts.json"
PORTS = CACHE / "services.json"
KEY = CACHE / "id_ed25519"
HOST_KEY = CACHE / "host_ed25519"
HUB = CACHE / "hub"
USER = "spark"

HOST_TOOLS = [
    "qemu-system-arm", "qemu-efi-aarch64", "qemu-utils", "qemu-user-static", "binfmt-support", "arch-test",
    "mmdebstrap", "busybox-static", "cpio", "kmod", "e2fsprogs", "openssh-client",
]  # fmt: skip
# What a Spark comes with, as far as this distribution has it. Nothing of the recipe.
MACHINE_PACKAGES = [
    "systemd", "systemd-sysv", "udev", "dbus", "python3", "python3-apt", "python3-venv", "sudo", "iproute2",
    "iputils-ping", "ca-certificates", "openssh-server", "procps", "kmod", "curl", "less", "rsync", "docker.io",
    "iptables", "apparmor",
]  # fmt: skip
IMAGE_PACKAGES = ["bash", "python3", "python3-minimal"]
# What of the image's packages no Python program needs.
IMAGE_TRIM = ("usr/share", "usr/include", "var/lib/apt", "var/cache", "etc/apt", "usr/lib/apt", "usr/lib/systemd")
BOOT_PACKAGES = ["linux-image-cloud-arm64", "busybox-static"]
# In the order of their needs; a file system on a virtio disk needs no others.
BOOT_MODULES = [
    "virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk",
]  # fmt: skip
DISK_GIB = 256
# What of the profile the checkpoint is made of.
PUBLISHED = ("model_repo", "model_revision", "model_expect")
IMAGE = "sim/runtime-double"
VLLM = "0.22.0"
FLASHINFER = "0.6.11.post2"
EPOCH = 1700000000


def mark(name: str) -> str:
    """A word on the command line of a machine of this checkout."""
    return f"reap-{hashlib.sha256(str(CACHE).encode()).hexdigest()[:6]}-{name}"


def build() -> None:
    """Makes what is missing or out of date. Minutes at the first time: see docs/aarch64.md."""
    install_packages(HOST_TOOLS, "the emulated machine")
    CACHE.mkdir(parents=True, exist_ok=True)
    for path in (KEY, HOST_KEY):
        if not path.exists():
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "reap-aarch64", "-f", path])
    ports()
    writer = REPOSITORY / "tests/support/sparse_checkpoint.py"
    model = _once("checkpoint", [writer, *(str(profile()[key]) for key in PUBLISHED)], _checkpoint)
    _archives()
    _once("boot", [_state("boot.tar"), *BOOT_MODULES, HERE / "init"], _boot)
    guest = sorted((HERE / "guest").iterdir())
    settings = json.dumps([ports(), model])
    lab: list[Path | str] = [_state("root.tar"), _state("boot.tar"), KEY.with_suffix(".pub"), settings]
    _once("disk", [*lab, *guest, HERE / "customize.sh"], _disk)
    doubles = [*sorted((HERE / "image").iterdir()), REPOSITORY / "tests/support/lying_servers.py"]
    made_of: list[Path | str] = [_state("runtime.tar"), VLLM, FLASHINFER]
    _once("image", [*made_of, *doubles], _image)


def _state(name: str) -> str:
    found = (CACHE / name).stat()
    return f"{name} {found.st_size} {found.st_mtime_ns}"


def _once(part: str, inputs: Sequence[Path | str], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs `make` unless its facts were written with the same inputs; returns the facts."""
    content = stamp(inputs)
    facts: dict[str, Any] = read_json(FACTS, {})
    if facts.get(part, {}).get("stamp") != content:
        with step(f"aarch64: making the {part}"):
            made = make()
        facts = {**read_json(FACTS, {}), part: {**made, "stamp": content}}
        write_json(FACTS, facts)
    found: dict[str, Any] = facts[part]
    return found


def _archives() -> None:
    """Root file systems of arm64 packages: the machine's (set up emulated), the kernel's, the image's."""
    unpacked = ["--variant=extract"]  # never set up, so nothing has to be emulated
    for name, packages, options in (
        ("root.tar", MACHINE_PACKAGES, ["--variant=minbase", "--skip=cleanup/apt/lists"]),
        ("boot.tar", BOOT_PACKAGES, unpacked),
        ("runtime.tar", IMAGE_PACKAGES, unpacked),
    ):
        _once(name, [*packages, *options], functools.partial(_archive, name, packages, options))


def _archive(name: str, packages: list[str], options: list[str]) -> dict[str, Any]:
    target = CACHE / name
    need_space(CACHE, 6, f"the archive {name}")
    codename, sources = images.machine_sources()
    beside = target.with_suffix(".new")
    command = [
        "mmdebstrap",
        "--quiet",
        "--format=tar",
        "--architectures=arm64",
        f"--include={','.join(packages)}",
        *options,
    ]
    with _foreign_programs():
        run(as_root([*command, codename, beside, "-"]), input_text=sources)
        run(as_root(["chown", str(os.getuid()), beside]))
        beside.rename(target)
    return {}


@contextlib.contextmanager
def _foreign_programs() -> Iterator[None]:
    """The kernel runs arm64 programs through the emulator meanwhile; afterwards it does what it did before."""
    place = Path("/proc/sys/fs/binfmt_misc")
    mounted = not (place / "register").exists()
    if mounted:
        run(as_root(["mount", "-t", "binfmt_misc", "binfmt_misc", place]))
    try:
        known = (place / "qemu-aarch64").exists()
        run(as_root(["update-binfmts", "--enable", "qemu-aarch64"]))
        try:
            yield
        finally:
            if not known:
                run(as_root(["update-binfmts", "--disable", "qemu-aarch64"]))
    finally:
        if mounted:
            run(as_root(["umount", place]))


def _boot() -> dict[str, Any]:
    """Kernel and initrd: a shell and the few modules that the disk needs boot faster than a full initrd."""
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="boot-") as name:
        root = Path(name)
        run(["tar", "-C", root, "-xf", CACHE / "boot.tar", "./boot", "./bin/busybox", "./lib/modules"])
        kernel = next((root / "boot").glob("vmlinuz-*"))
        shutil.copyfile(kernel, CACHE / "vmlinuz")
        early = root / "early"
        for folder in ("bin", "proc", "dev", "root", "modules"):
            (early / folder).mkdir(parents=True)
        shutil.copy2(root / "bin/busybox", early / "bin/busybox")
        for number, module in enumerate(BOOT_MODULES):
            found = next((root / "lib/modules").rglob(f"{module}.ko"))
            shutil.copyfile(found, early / "modules" / f"{number}-{module}.ko")
        shutil.copyfile(HERE / "init", early / "init")
        (early / "init").chmod(0o755)
        names = "\0".join(str(path.relative_to(early)) for path in sorted(early.rglob("*")))
        archive = subprocess.run(
            ["cpio", "--quiet", "--null", "--create", "--format=newc", "--owner=0:0"],
            cwd=early,
            input=names.encode(),
            capture_output=True,
            check=True,
        )
        (CACHE / "initrd").write_bytes(archive.stdout)
        return {"kernel": kernel.name.removeprefix("vmlinuz-")}


def profile() -> dict[str, Any]:
    """The production profile that the machine is set up with."""
    import yaml  # of the virtual environment; ending machines does without

    data = yaml.safe_load((REPOSITORY / "group_vars/all/profiles.yml").read_text())
    chosen: dict[str, Any] = data["reap_profiles"]["k144-nospec-200k"]
    return chosen


def _checkpoint() -> dict[str, Any]:
    """The K144 checkpoint as sparse files, on the hub under its published name and commit.

    The hub's manifest gives each shard a stand-in for a hash: 94 GB of zeros are never read, neither here nor there.
    """
    wanted = profile()
    folder = HUB / wanted["model_repo"]
    shutil.rmtree(folder, ignore_errors=True)
    made = write_sparse_checkpoint(folder, wanted["model_expect"]["n_routed_experts"])
    sizes = {name: (folder / name).stat().st_size for name in made.files}
    files = {
        name: {"size": size, "sha256": hashlib.sha256(f"stand-in for {name}".encode()).hexdigest()}
        for name, size in sizes.items()
    }
    manifest = {"commit": wanted["model_revision"], "files": files}
    write_json(folder / ".hub-manifest.json", manifest)
    return {"bytes": made.apparent_bytes, "disk_bytes": made.disk_bytes, "files": len(made.files)}


def _disk() -> dict[str, Any]:
    """The machine's disk: packages, kernel modules, the lab's settings, the doubles, the shards of the checkpoint."""
    wanted = profile()
    partial = f"var/lib/reap/models/{wanted['model_repo']}/{wanted['model_revision']}.partial"
    settings = {
        "ROOT_TAR": CACHE / "root.tar",
        "BOOT_TAR": CACHE / "boot.tar",
        "DISK": CACHE / "disk.img",
        "DISK_GIB": DISK_GIB,
        "GUEST": HERE / "guest",
        "SHARDS": HUB / wanted["model_repo"],
        "PARTIAL": partial,
        "LOGIN": USER,
        "LOGIN_KEY": KEY.with_suffix(".pub"),
        "HOST_KEY": HOST_KEY,
        "REGISTRY_PORT": ports()["registry"],
        "HUB_PORT": ports()["hub"],
    }
    need_space(CACHE, 4, "the machine's disk")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="lab-") as lab:
        Path(lab).chmod(0o755)
        images.lab_settings(Path(lab))
        pairs = [f"{key}={value}" for key, value in {**settings, "LAB": lab}.items()]
        run(as_root(["env", *pairs, "sh", HERE / "customize.sh"]))
    run(as_root(["chown", str(os.getuid()), CACHE / "disk.img"]))
    # Snapshots are of a disk that is no more.
    shutil.rmtree(CACHE / "snapshots", ignore_errors=True)
    release = run(["tar", "-xOf", CACHE / "root.tar", "./usr/lib/os-release"]).stdout
    values = dict(line.split("=", 1) for line in release.splitlines() if "=" in line)
    return {"os": f"{values['ID']} {values['VERSION_ID']}".replace('"', "")}


def _image() -> dict[str, Any]:
    """The runtime image's double: Python, the server of the doubles, and those files of vLLM that are patched."""
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="image-") as name:
        root = Path(name) / "root"
        root.mkdir()
        excludes = [f"--exclude=./{path}/*" for path in IMAGE_TRIM]
        run(["tar", "-C", root, "-xf", CACHE / "runtime.tar", *excludes, "--exclude=./dev/*", "--no-same-owner"])
        packages = next((root / "usr/lib/python3").glob("dist-packages"))
        for project, version in (("vllm", VLLM), ("flashinfer-python", FLASHINFER)):
            found = published_files(project, version, files_of(project))
            shutil.copytree(found, packages, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".absent"))
        for package in ("vllm", "flashinfer"):
            (packages / package / "__init__.py").touch()
        shutil.copyfile(REPOSITORY / "tests/support/lying_servers.py", packages / "lying_servers.py")
        local = root / "usr/local/bin"
        local.mkdir(parents=True, exist_ok=True)
        for program in sorted((HERE / "image").iterdir()):
            shutil.copyfile(program, local / program.name)
            (local / program.name).chmod(0o755)
        layer = registry.Layer.from_folder(root, Path(name) / "layer.tar.gz", EPOCH)
        was_there = _service_pid("registry")
        services()
        try:
            url = f"http://127.0.0.1:{ports()['registry']}"
            labels = {"io.reap.double": "a server of the OpenAI protocol in vLLM's place; no model"}
            pushed = registry.push(url, IMAGE, [layer], labels, EPOCH, architecture="arm64")
        finally:
            if not was_there:
                stop_services()
    return {
        "reference": f"127.0.0.1:5000/{IMAGE}",
        "digest": pushed.digest,
        "id": pushed.config_digest,
        "bytes": layer.size,
        "unpacked_bytes": layer.unpacked,
    }


# Services on this machine's loopback, which the emulated machines reach through the emulator's network.


def ports() -> dict[str, int]:
    """The ports of registry and hub here, chosen once: the machine's disk has them."""
    chosen: dict[str, int] = read_json(PORTS, {})
    if set(chosen) != {"registry", "hub"}:
        registry_port = free_port()
        chosen = {"registry": registry_port, "hub": free_port([registry_port])}
        write_json(PORTS, chosen)
    return chosen


def _pid_file(name: str) -> Path:
    return CACHE / f"{name}.pid"


def _service_pid(name: str) -> int | None:
    try:
        pid = int(_pid_file(name).read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if str(CACHE).encode() in words else None


def services() -> None:
    """Registry and hub run and answer."""
    for name, command in (("registry", _registry_command), ("hub", _hub_command)):
        if _service_pid(name):
            continue
        url = f"http://127.0.0.1:{ports()[name]}"
        if http_answers(url):
            raise SimError(
                f"another program has port {ports()[name]}, which the {name} needs: end it, or remove {CACHE}"
            )
        with (CACHE / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command(), cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        _pid_file(name).write_text(f"{process.pid}\n")
        wait_for(lambda url=url: http_answers(url), 60, f"the {name}")  # type: ignore[misc]


def _registry_command() -> list[str]:
    """Debian's docker-registry, unpacked into the cache: it is not installed on this machine."""
    program = CACHE / "registry-program/usr/bin/docker-registry"
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            run(["apt-get", "-qq", "download", "docker-registry"], cwd=Path(name))
            run(["dpkg", "-x", next(Path(name).glob("*.deb")), CACHE / "registry-program"])
    data = CACHE / "registry"
    data.mkdir(exist_ok=True)
    settings = CACHE / "registry.json"
    content = {
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(data)}},
        "http": {"addr": f"127.0.0.1:{ports()['registry']}"},
    }
    write_json(settings, content)
    return [str(program), "serve", str(settings)]


def _hub_command() -> list[str]:
    log = CACHE / "hub-requests.jsonl"
    log.unlink(missing_ok=True)
    return [sys.executable, "-m", "sim.hub", f"--root={HUB}", f"--port={ports()['hub']}", f"--log={log}"]


def stop_services() -> None:
    """Ends what `services` started."""
    for name in ("registry", "hub"):
        pid = _service_pid(name)
        if pid:
            os.kill(pid, signal.SIGTERM)
            wait_for(lambda pid=pid: not _alive(pid), 30, f"the end of the {name}")  # type: ignore[misc]
        _pid_file(name).unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def left_over() -> list[str]:
    """What runs or lies here of the machines and their services; after their end it has to be nothing."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if (mark("") in words or str(CACHE) in words) and int(path.parent.name) != os.getpid():
            found.append(f"process {path.parent.name}: {words[:160]}")
    files = [*CACHE.glob("*.pid"), *CACHE.glob("machines/*"), *CACHE.glob("*-*/"), *CACHE.glob("*.new")]
    return found + [str(path) for path in files if path.name != "registry-program"]


def clean() -> None:
    """Removes the caches. The machines have ended before."""
    if CACHE.exists():
        say(f"sim: removing {CACHE}")
        shutil.rmtree(CACHE)
