"""The runtime image of the simulation: the distribution's Python and the real vLLM for CPUs, in the lab's registry.

Made without `docker build`: a root file system of distribution packages is the first layer, a folder that pip filled
the second. Both are written as archives with fixed times and owners, and sent to the registry over its HTTP API.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from sim import images
from sim.common import (
    CACHE,
    FACTS,
    KIND,
    LABEL,
    REPOSITORY,
    SimError,
    lock,
    need_space,
    prefix,
    program,
    read_json,
    run,
    stamp,
    step,
    update_facts,
)
from sim.engine import Engine, install_packages, machine_stamp
from sim.runtime_image import registry

HERE = Path(__file__).resolve().parent
REPOSITORY_NAME = "reap-runtime-sim"
VLLM = "0.32.0"

PACKAGES = ["python3", "ca-certificates", "libnuma1"]
# Free space for pip's downloads, the unpacked folder and the compressed layers, in GiB.
NEEDS_GIB = 7.0

# Times of files in the image. Fixed, so that the same inputs give the same image; what a later layer changes is newer,
# so that Python sees that its compiled file is out of date.
EPOCH = 1_700_000_000

# Where the CPU build of torch is looked for when pip's configured sources do not have it.
TORCH_INDEX = os.environ.get("SIM_TORCH_INDEX", "https://download.pytorch.org/whl/cpu")

# glibc versions that wheels are built against; the oldest supported distribution (Debian 12) has 2.36.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (5, 12, 17, 24, 26, 27, 28, 31, 34, 35, 36)]
PLATFORMS += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]

# Not imported by serving: what only compiles, tests or documents.
_TRIM_PATTERNS = (
    "torch/test torch/include torch/share torch/bin/protoc* torch/bin/test_* torch/lib/*_test.so torch/lib/*.a "
    "torch/lib/libaoti_custom_ops.so torch/lib/libbackend_with_compiler.so caffe2 share opt bin "
    "**/tests **/*.pyi **/*.a"
)
TRIM = _TRIM_PATTERNS.split()
# `tests` folders that are imported all the same.
KEEP = ("torch/testing", "numpy/testing")

# Serving reads the version of a distribution called vllm, and takes the CPU platform when `cpu` is in it.
METADATA = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n"

# Worker processes are spawned and import this file again: hence the guard.
CONSOLE_SCRIPT = """\
#!/usr/bin/python3
import sys

from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
"""


# Run in the image before it is sent: fails where a library is missing that serving loads.
SELF_CHECK = """\
import torch
from vllm.platforms import current_platform

current_platform.import_kernels()
if not current_platform.is_cpu() or not hasattr(torch.ops._C, "init_cpu_memory_env"):
    raise SystemExit("vLLM's kernels for this CPU did not load")
import vllm.entrypoints.openai.api_server
"""


def inputs() -> list[Path | str]:
    """What the image is made from: when any of it changes, the image is made again."""
    files = [path for path in sorted(HERE.iterdir()) if path.suffix in (".py", ".txt")]
    return [*files, machine_stamp()]


def requirements_for(lock_text: str, python: tuple[int, int]) -> str:
    """The lock with its Python version conditions decided for `python`.

    pip judges conditions by the Python that runs it, which need not be the image's. A condition that mixes the Python
    version with something else is a SimError: the lock has none, and guessing would install the wrong file.
    """
    kept: list[str] = []
    keep = True
    for line in lock_text.splitlines():
        if line and not line.startswith((" ", "#")):
            keep = True
            if "python_full_version" in line or "python_version" in line:
                found = re.fullmatch(r"(\S+) ; python_full_version (<|>=) '(\d+)\.(\d+)' \\", line)
                if not found:
                    raise SimError(f"requirements.txt: a condition that this program cannot decide: {line}")
                below = python < (int(found[3]), int(found[4]))
                keep = below == (found[2] == "<")
                line = f"{found[1]} \\"
        if keep:
            kept.append(line)
    return "\n".join(kept) + "\n"


def find_pip() -> list[str]:
    """A command that runs pip: this Python's, the repository's, or one made for the purpose."""
    made = CACHE / "pip/bin/python"
    for python in (Path(sys.executable), REPOSITORY / ".venv/bin/python", made):
        if python.exists() and run([python, "-m", "pip", "--version"], check=False).returncode == 0:
            return [str(python), "-m", "pip"]
    if run([sys.executable, "-m", "venv", "--clear", CACHE / "pip"], check=False).returncode:
        raise SimError(f"no pip found, and `{sys.executable} -m venv` failed: install the package python3-venv")
    return [str(made), "-m", "pip"]


def ensure(engine: Engine, registry_url: str) -> None:
    """The image is in the registry at `registry_url`, and facts.json names it."""
    content = stamp(inputs())

    def current() -> bool:
        known = read_json(FACTS, {}).get("runtime_image", {})
        return known.get("stamp") == content and registry.has_manifest(registry_url, REPOSITORY_NAME, known["digest"])

    with lock("runtime-image"):
        if current():
            return
        need_space(CACHE, NEEDS_GIB, "the runtime image")
        install_packages(["mmdebstrap", "binutils"], "the runtime image is made from packages")
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="runtime-") as name, step("making the runtime image"):
            _make(engine, Path(name), registry_url, content)


def _make(engine: Engine, work: Path, registry_url: str, content: str) -> None:
    base = work / "base.tar"
    with step("runtime image: distribution packages"):
        _base(base)
    image = f"{prefix()}/runtime-base:{content[:12]}"
    labels = ["--change", f'LABEL {LABEL}="{CACHE}"', "--change", f"LABEL {KIND}=runtime-base"]
    engine.docker("import", *labels, base, image)
    try:
        # As this user, so that what it writes can be removed by this user.
        inside = ["run", "--rm", "--network=none", f"--user={os.getuid()}:{os.getgid()}"]
        inside += [f"--label={LABEL}={CACHE}", f"--label={KIND}=build"]
        version = engine.output(*inside, image, "python3", "-c", "import sys; print(*sys.version_info[:2])").split()
        python = (int(version[0]), int(version[1]))
        packages = work / "layer" / f"usr/local/lib/python{python[0]}.{python[1]}/dist-packages"
        packages.mkdir(parents=True)
        with step("runtime image: vLLM and what it needs, from pip"):
            _install(packages, python, work)
        with step("runtime image: leaving out what serving does not import"):
            trim(packages)
            _strip(packages)
        script = work / "layer/usr/local/bin/vllm"
        script.parent.mkdir(parents=True)
        script.write_text(CONSOLE_SCRIPT)
        script.chmod(0o755)
        _set_times(work / "layer")
        with step("runtime image: compiling Python files"):
            mount = f"--mount=type=bind,src={work / 'layer'},dst=/layer"
            target = f"/layer/usr/local/lib/python{python[0]}.{python[1]}/dist-packages"
            # -s and -p: the compiled files name the path that the sources will have in the image.
            compile_all = ["python3", "-m", "compileall", "-q", "-j", "2", "-s", "/layer", "-p", "/", target]
            engine.docker(*inside, mount, image, *compile_all, check=False)
        with step("runtime image: checking that vLLM loads"):
            local = f"--mount=type=bind,src={work / 'layer/usr/local'},dst=/usr/local,readonly"
            engine.docker(*inside, local, image, "python3", "-c", SELF_CHECK)
    finally:
        engine.docker("rmi", "--force", image, check=False)
    with step("runtime image: compressing and sending to the registry"):
        layers = [registry.Layer.from_tar(base, work / "base.tar.gz")]
        base.unlink()
        layers.append(registry.Layer.from_folder(work / "layer", work / "layer.tar.gz", EPOCH))
        labels_in_image = {
            "org.opencontainers.image.title": "reap simulated runtime",
            "org.opencontainers.image.description": f"vLLM {VLLM} for CPUs, for tests on machines without a Spark",
            "org.opencontainers.image.version": f"{VLLM}+cpu",
            "reap.runtime": "simulated",
        }
        pushed = registry.push(registry_url, REPOSITORY_NAME, layers, labels_in_image, EPOCH)
    update_facts(
        lambda facts: facts.update(
            runtime_image={
                "reference": f"127.0.0.1:5000/{REPOSITORY_NAME}",
                "digest": pushed.digest,
                "id": pushed.config_digest,
                "bytes": sum(layer.size for layer in layers),
                "unpacked_bytes": sum(layer.unpacked for layer in layers),
                "vllm": VLLM,
                "stamp": content,
            }
        )
    )


def _base(target: Path) -> None:
    """Writes the first layer's archive."""
    command, sources = images.bootstrap(PACKAGES)
    at = command.index("mmdebstrap")
    excludes = [f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in ("doc", "man", "locale", "info")]
    command[at:at] = [f"SOURCE_DATE_EPOCH={EPOCH}"]
    command[at + 2 : at + 2] = excludes
    with target.open("wb") as stream:
        done = subprocess.run(command, input=sources.encode(), stdout=stream, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.decode(errors="replace").strip().splitlines()[-15:])
        raise SimError(f"mmdebstrap failed (package mirror unreachable, or disk full?):\n{tail}")


def _install(packages: Path, python: tuple[int, int], work: Path) -> None:
    """Fills `packages` as pip would for the image's Python, without running that Python."""
    locked = work / "requirements.txt"
    locked.write_text(requirements_for((HERE / "requirements.txt").read_text(), python))
    tag = f"cp{python[0]}{python[1]}"
    command = [*find_pip(), "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--only-binary=:all:", f"--python-version={python[0]}.{python[1]}", "--implementation=cp"]
    command += [f"--abi={abi}" for abi in (tag, "abi3", "none")] + [f"--platform={name}" for name in PLATFORMS]
    command += ["--root-user-action=ignore", "--upgrade", f"--target={packages}"]
    run([*command, "--require-hashes", f"--requirement={locked}"])
    torch = [*command, f"--requirement={HERE / 'torch.txt'}"]
    if run(torch, check=False).returncode:
        run([*torch, f"--index-url={TORCH_INDEX}"])
    metadata = packages / f"vllm-{VLLM}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(METADATA)


def trim(packages: Path, patterns: Iterable[str] = TRIM) -> None:
    """Removes from `packages` what serving does not import."""
    kept = [packages / name for name in KEEP]
    for pattern in patterns:
        for path in sorted(packages.glob(pattern)):
            if any(path == keep or keep in path.parents for keep in kept):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _strip(packages: Path) -> None:
    """Takes debug information out of shared libraries; a library that strip does not understand stays as it is."""
    strip = program("strip")
    if strip is None:
        raise SimError("the program strip is not on this machine although binutils is installed: reinstall binutils")
    for path in sorted(packages.rglob("*.so*")):
        # Libraries that wheels carry along were rewritten by their tools; stripping those again can break them.
        if path.is_file() and not path.is_symlink() and not path.parent.name.endswith(".libs"):
            run([strip, "--strip-unneeded", path], check=False)


def _set_times(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
