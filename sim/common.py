"""What every part of the simulation shares: where things lie, names, running commands, locks, progress lines."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache" / "sim"
FACTS = CACHE / "facts.json"
LABEL = "reap.sim.cache"
KIND = "reap.sim.kind"

GIB = 1024**3


class SimError(Exception):
    """A failure that a person can act on: its text says what was found, what was wanted and what to do."""


def prefix(cache: Path = CACHE) -> str:
    """The start of every name we give an engine object: different for two checkouts on one machine."""
    return "reap-sim-" + hashlib.sha256(str(cache).encode()).hexdigest()[:6]


def object_name(kind: str, name: str = "", cache: Path = CACHE) -> str:
    """The engine name of a host (`kind` "host"), a service ("registry", "hub"), the network ("network") or a volume."""
    return ".".join(part for part in (prefix(cache), kind, name) if part)


def stamp(inputs: Iterable[Path | str | bytes]) -> str:
    """A hex digest of `inputs`; files count with their content and name, so it changes when an input does."""
    digest = hashlib.sha256()
    for item in inputs:
        if isinstance(item, Path):
            part = item.name.encode() + b"\0" + item.read_bytes()
        else:
            part = item.encode() if isinstance(item, str) else item
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def say(text: str) -> None:
    """One line for the person who waits, on stderr so that --json output stays clean."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Says `text` now, and how many seconds it took when it is over."""
    say(f"sim: {text} ...")
    start = time.monotonic()
    try:
        yield
    except BaseException:
        say(f"sim: {text}: failed after {time.monotonic() - start:.0f} s")
        raise
    say(f"sim: {text}: {time.monotonic() - start:.0f} s")


def run(
    command: Sequence[str | Path],
    *,
    check: bool = True,
    input_text: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a command quietly. With `check`, a failure is a SimError with the command and the end of its output."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            input=input_text,
            stdin=subprocess.DEVNULL if input_text is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **env} if env else None,
            cwd=cwd,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        raise SimError(f"the program {words[0]!r} is not on this machine") from None
    except subprocess.TimeoutExpired:
        raise SimError(f"{shlex.join(words)} did not end within {timeout:.0f} s") from None
    if check and done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise SimError(f"{shlex.join(words)} ended with {done.returncode}:\n{tail}")
    return done


def as_root(command: Sequence[str | Path]) -> list[str]:
    """The same command, through sudo where this process is not root."""
    words = [str(word) for word in command]
    if os.geteuid() == 0:
        return words
    if not shutil.which("sudo"):
        raise SimError(f"{shlex.join(words)} needs root: run as root, or install sudo and allow this user to use it")
    return ["sudo", *words]


def program(name: str) -> str | None:
    """The path of a program, also where an ordinary user's PATH leaves out the administration folders."""
    path = os.environ.get("PATH", os.defpath) + os.pathsep + os.pathsep.join(["/usr/sbin", "/sbin", "/usr/local/sbin"])
    return shutil.which(name, path=path)


def write_atomic(path: Path, text: str, mode: int = 0o644) -> None:
    """Writes beside, then renames: a reader sees the old content or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        os.chmod(beside, mode)  # noqa: PTH101
        os.rename(beside, path)  # noqa: PTH104
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def read_json(path: Path, default: Any = None) -> Any:
    """The JSON in `path`, or `default` where the file is missing or damaged (it is a cache: it is made again)."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return default


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as readable JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Holds the lock `name` of this checkout; waits for another `sim` command that holds it, and says so."""
    path = CACHE / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"sim: waiting for another sim command ({name})")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def update_facts(change: Callable[[dict[str, Any]], None]) -> None:
    """Changes facts.json under its lock, so that two builds do not lose each other's entries."""
    with lock("facts"):
        facts = read_json(FACTS, {})
        change(facts)
        write_json(FACTS, facts)


def free_port(taken: Iterable[int] = ()) -> int:
    """A TCP port on 127.0.0.1 that nobody listens on now and that is not in `taken`."""
    unwanted = set(taken)
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in unwanted:
            return port
    raise SimError("no free TCP port on 127.0.0.1: end some of the programs that listen there")


def need_space(path: Path, gib: float, what: str) -> None:
    """Refuses early where the disk that holds `path` is too small for `what`."""
    path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path).free
    if free < gib * GIB:
        raise SimError(
            f"{what} needs {gib:.1f} GiB free under {path}, found {free / GIB:.1f} GiB: "
            "free some space, or run `python3 -m sim clean` to drop the caches"
        )


def wait_for(ready: Callable[[], bool], seconds: float, what: str, every: float = 0.2) -> None:
    """Waits until `ready()` is true; a SimError after `seconds`."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise SimError(f"{what}: not ready after {seconds:.0f} s")
        time.sleep(every)


def http_answers(url: str) -> bool:
    """Whether anything that speaks HTTP answers at `url` (an error status is an answer). No proxy is used."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
