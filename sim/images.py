"""Images made from the machine's own package sources: the hosts (with and without Docker) and the lab's services."""

from __future__ import annotations

import configparser
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from sim.common import CACHE, KIND, LABEL, REPOSITORY, SimError, as_root, lock, need_space, prefix, run, stamp, step
from sim.engine import APT_GET, Engine, docker_packages, install_packages, machine_stamp

HERE = REPOSITORY / "sim"

# A host before anybody set it up: what a server installation has, nothing of the recipe.
_HOST_PACKAGE_NAMES = (
    "systemd systemd-sysv dbus python3 python3-apt sudo iproute2 iputils-ping ca-certificates openssh-server "
    "procps kmod curl less"
)
HOST_PACKAGES = _HOST_PACKAGE_NAMES.split()
# A Spark comes with Docker. With AppArmor in the kernel, the engine inside needs its tools.
EXTRA_DOCKER_PACKAGES = ["apparmor"]
SERVICE_PACKAGES = ["docker-registry", "python3", "ca-certificates"]

# Free space that building each one takes, in GiB (measured: `python3 -m sim status` prints the sizes).
NEEDS = {"host-absent": 1.5, "host-preinstalled": 2.0, "services": 1.0}

_DISTRIBUTIONS = {"Debian", "Ubuntu"}


def distribution_sources(targets: str) -> str:
    """One-line apt sources of the distribution itself, out of `apt-get indextargets`.

    `targets` has one line for each index: REPO_URI|RELEASE|COMPONENT|ORIGIN. Other vendors' sources are left out.
    """
    lines: dict[tuple[str, str], list[str]] = {}
    for line in targets.splitlines():
        uri, release, component, origin = line.split("|")
        if origin in _DISTRIBUTIONS:
            components = lines.setdefault((uri, release), [])
            if component not in components:
                components.append(component)
    return "".join(f"deb {uri} {release} {' '.join(components)}\n" for (uri, release), components in lines.items())


def machine_sources() -> tuple[str, str]:
    """(codename, apt sources) of this machine."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if line.count("=") == 1
    )
    codename = release.get("VERSION_CODENAME", "").strip('"')
    fields = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)"
    query = ["apt-get", "indextargets", "--format", fields, "Created-By: Packages"]
    sources = distribution_sources(run(query, check=False).stdout)
    if not sources:
        run(as_root([*APT_GET, "-qq", "update"]))
        sources = distribution_sources(run(query).stdout)
    if not codename or not sources:
        raise SimError("`apt-get indextargets` names no Debian or Ubuntu sources: use Debian 12+ or Ubuntu 24.04+")
    return codename, sources


def lab_settings(folder: Path) -> None:
    """Writes into `folder` what a machine in this network needs: extra certificates, proxies, the package index."""
    certificates = sorted(Path("/usr/local/share/ca-certificates").rglob("*.crt"))
    if certificates:
        (folder / "certificates").mkdir()
        for number, path in enumerate(certificates):
            (folder / "certificates" / f"lab-{number}.crt").write_bytes(path.read_bytes())
    pip = pip_settings([Path("/etc/pip.conf"), Path.home() / ".pip/pip.conf", Path.home() / ".config/pip/pip.conf"])
    if certificates:
        pip["cert"] = "/etc/ssl/certs/ca-certificates.crt"
    if pip:
        lines = "".join(f"{key} = {value}\n" for key, value in sorted(pip.items()))
        (folder / "pip.conf").write_text(f"[global]\n{lines}")
    proxies = {name: os.environ[name] for name in ("http_proxy", "https_proxy", "no_proxy") if os.environ.get(name)}
    if proxies:
        lines = "".join(f"{name}={shlex.quote(value)}\n" for name, value in proxies.items())
        (folder / "environment").write_text(lines)
        apt = [f'Acquire::{name[:-6]}::Proxy "{value}";\n' for name, value in proxies.items() if name != "no_proxy"]
        (folder / "apt.conf").write_text("".join(apt))


def pip_settings(files: list[Path]) -> dict[str, str]:
    """The settings of `files` (and PIP_INDEX_URL) that mean something on another host: indexes by URL and trust."""
    found: dict[str, str] = {}
    for path in files:
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path)
        except configparser.Error as error:
            raise SimError(f"{path} cannot be read: {error}") from None
        for key in ("index-url", "extra-index-url", "trusted-host", "proxy"):
            value = parser.get("global", key, fallback="")
            words = [word for word in value.split() if key in ("trusted-host", "proxy") or word.startswith("http")]
            if words:
                found[key] = " ".join(words)
    if os.environ.get("PIP_INDEX_URL", "").startswith("http"):
        found["index-url"] = os.environ["PIP_INDEX_URL"]
    return found


def reference(kind: str, content: str) -> str:
    """The name of an image: kind and a stamp of its inputs."""
    return f"{prefix()}/{kind}:{content[:12]}"


def bootstrap(
    packages: list[str], *, customize: Path | None = None, keep_lists: bool = False, lab: Path | None = None
) -> tuple[list[str], str]:
    """(command, apt sources for its stdin) that writes a root file system as a tar archive to stdout."""
    codename, sources = machine_sources()
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}"]
    if keep_lists:
        command.append("--skip=cleanup/apt/lists")
    if customize:
        command.append(f"--customize-hook={customize}")
    command += [codename, "-", "-"]
    return as_root(["env", f"SIM_LAB={lab or '/nonexistent'}", *command]), sources


def ensure(engine: Engine, kind: str) -> str:
    """The reference of the image `kind` (host-absent, host-preinstalled, services), built now if it is missing."""
    if kind == "services":
        packages, customize = SERVICE_PACKAGES, None
    else:
        docker = [*docker_packages(), *EXTRA_DOCKER_PACKAGES] if kind == "host-preinstalled" else []
        packages = HOST_PACKAGES + docker
        customize = HERE / "host" / "customize.sh"
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="lab-") as name:
        lab = Path(name)
        lab_settings(lab)
        lab_files = [path for path in sorted(lab.rglob("*")) if path.is_file()]
        files = sorted((HERE / "host").iterdir()) if customize else []
        content = stamp([*packages, *files, *(lab_files if customize else []), machine_stamp()])
        image = reference(kind, content)
        if engine.has_image(image):
            return image
        with lock(f"image-{kind}"):
            if engine.has_image(image):
                return image
            need_space(CACHE, NEEDS[kind], f"the image {kind}")
            install_packages(["mmdebstrap"], "images are made from the distribution's packages")
            lab.chmod(0o755)
            with step(f"making the image {kind} from this machine's package sources"):
                command, sources = bootstrap(packages, customize=customize, keep_lists=customize is not None, lab=lab)
                _import(engine, command, sources, kind, image)
            _drop_old(engine, kind, image)
    return image


def _import(engine: Engine, command: list[str], sources: str, kind: str, image: str) -> None:
    """Pipes the archive that `command` writes into `docker import`. Nothing is imported when it fails."""
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as text:
        text.write(sources)
        text.seek(0)
        source = subprocess.Popen(command, stdin=text, stdout=subprocess.PIPE, stderr=errors)
        labels = ["--change", f'LABEL {LABEL}="{CACHE}"', "--change", f"LABEL {KIND}={kind}"]
        # Tagged only after the source has ended well: a broken archive must not pass for the image.
        done = subprocess.run(
            [*engine.command, "import", *labels, "-"], stdin=source.stdout, capture_output=True, text=True, check=False
        )
        if source.stdout:
            source.stdout.close()
        code = source.wait()
        if code or done.returncode:
            errors.seek(0)
            tail = "\n".join((errors.read() + done.stderr).strip().splitlines()[-15:])
            if done.returncode == 0:
                engine.docker("rmi", done.stdout.strip(), check=False)
            raise SimError(f"the image {kind} could not be made (package mirror unreachable, or disk full?):\n{tail}")
        engine.docker("tag", done.stdout.strip(), image)


def _drop_old(engine: Engine, kind: str, keep: str) -> None:
    """Removes earlier images of this kind; one that a host still uses stays until that host is gone."""
    wanted = engine.output("image", "inspect", "--format", "{{.Id}}", keep)
    filters = ["--filter", f"label={LABEL}={CACHE}", "--filter", f"label={KIND}={kind}"]
    for image in engine.output("images", "--quiet", "--no-trunc", *filters).split():
        if image != wanted:
            engine.docker("rmi", image, check=False)
