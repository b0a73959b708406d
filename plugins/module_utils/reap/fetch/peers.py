"""From another host that has the revision: rsync over SSH, with a key that can do nothing else and soon nothing.

Giving side: the forced command of such a key, ``reap fetch --serve-peer``. It answers what the host has, or runs one
reading rsync of one whole revision, for one receiver at a time. So receivers spread by themselves as a tree: whoever
has the revision serves one, who then serves another, and the number of givers doubles with every copy.

Taking side: asks the other hosts in turn; one that fails is passed over; when nobody has it or will have it, the hub is
next. Every file is verified before it gets its name, as if it came from the hub.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import ReapError
from . import manifest as mf
from . import store
from .plan import COMMIT, REPO, Want, plan_from_listing
from .state import inspect

# Marks an unfinished folder that is being filled, so that receivers wait for it.
FILLING = "filling"
_ADDRESS = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_:.\[\]%-]+")
# What our own rsync client makes of -rtL --inplace --partial --timeout, with any protocol letters it adds after e.
_RSYNC_WORD = re.compile(r"-[A-Za-z]+(?:\.[A-Za-z]*)?(?:e[0-9]*\.[A-Za-z]*)?|--inplace|--partial|--timeout=[0-9]+")


KEY, KNOWN_HOSTS, PEERS = "key", "known_hosts", "peers.json"


@dataclass(frozen=True, slots=True)
class Peer:
    """Another host: user@host, and the port of its SSH."""

    address: str
    port: int = 22


@dataclass(frozen=True, slots=True)
class Access:
    """How this host reaches its peers.

    ``folder`` holds the key, the peers' host keys and peers.json, ``[{"address", "port"}]``. It is read at each look: a
    play that was interrupted and runs again may come with other peers and another key, and this fetch goes on.
    ``wait_s``: how long after the last sign of a peer that has or will have the model the hub is asked. A copy that
    moves less than ``min_rate`` bytes a second for ``stall_s`` is ended.
    """

    folder: Path | None = None
    wait_s: float = 0.0
    stall_s: float = 60.0
    min_rate: int = 32 * 1024
    fixed: tuple[Peer, ...] = ()

    def peers(self) -> tuple[Peer, ...]:
        """The other hosts as they are known now.

        Raises:
            ReapError: the file of peers is none, or names something else than hosts.
        """
        found = self.fixed
        if self.folder is not None:
            path = self.folder / PEERS
            try:
                listed = json.loads(path.read_text(encoding="utf-8"))
                found += tuple(Peer(str(item["address"]), int(item["port"])) for item in listed)
            except FileNotFoundError:
                # The run that made it is over and has taken its keys away.
                return found
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ReapError(
                    f"{path} cannot be read ({error}); wanted a list of address and port, as role model_fetch writes it"
                ) from error
        for peer in found:
            if not _ADDRESS.fullmatch(peer.address) or peer.address.startswith("-") or not 0 < peer.port < 65536:
                raise ReapError(f"the peer is {peer.address!r}, port {peer.port}; wanted user@host and 1 to 65535")
        return found


# --- the giving side ---


def answer(models: Path, command: str) -> int:
    """Run one request of a receiver; ``command`` is what it asked SSH for.

    Returns:
        Exit status: 0 done, 2 refused, 3 busy, else rsync's.
    """
    words = shlex.split(command)
    if words[:1] == ["have"] and len(words) == 3 and REPO.fullmatch(words[1]) and COMMIT.fullmatch(words[2]):
        print(json.dumps(_have(models, words[1], words[2])))
        return 0
    dest = _rsync_source(models, words)
    record = mf.load(dest) if dest is not None else None
    if dest is None or record is None or not inspect(record.repo, record.commit, dest, {}).ready:
        print("reap: this key reads one verified model revision and nothing else", file=sys.stderr)
        return 2
    slot = os.open(dest / "reap-manifest.json", os.O_RDONLY)
    try:
        fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # rsync inherits the lock, so it lives as long as rsync does.
        return subprocess.run(words, check=False, pass_fds=(slot,)).returncode
    except BlockingIOError:
        print("reap: busy", file=sys.stderr)
        return 3
    finally:
        os.close(slot)


def _have(models: Path, repo: str, revision: str) -> dict[str, object]:
    """``state``: ready (with the manifest's plan), busy, filling (will have it), or absent."""
    dest = models / repo / revision
    try:
        if inspect(repo, revision, dest, {}).ready:
            record = mf.load(dest)
            assert record is not None
            files = [{"name": e.name, "size": e.size, "sha256": e.sha256} for e in record.files.values()]
            return {"state": "busy" if _held(dest / "reap-manifest.json") else "ready", "files": files}
    except (ReapError, OSError):
        return {"state": "absent"}
    partial = store.partial_of(dest)
    filling = (partial / ".reap" / FILLING).exists() and _held(store.lock_of(dest))
    return {"state": "filling" if filling else "absent"}


def _held(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _rsync_source(models: Path, words: Sequence[str]) -> Path | None:
    """The revision's folder that a reading rsync asks for; None for anything else."""
    if len(words) < 5 or words[:3] != ["rsync", "--server", "--sender"] or words[-2] != ".":
        return None
    if not all(_RSYNC_WORD.fullmatch(word) for word in words[3:-2]):
        return None
    dest, root = Path(words[-1]), models.resolve()
    parts = Path(os.path.normpath(dest)).parts
    repo, revision = "/".join(parts[-3:-1]), parts[-1]
    if not (REPO.fullmatch(repo) and COMMIT.fullmatch(revision)):
        return None
    # Only the name itself: no link and no .. leads elsewhere.
    return dest if os.path.realpath(dest) == str(root / repo / revision) else None


# --- the taking side ---


class Peers:
    """The other hosts, as one receiver sees them."""

    def __init__(
        self,
        access: Access,
        repo: str,
        revision: str,
        dest: Path,
        note: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.access = access
        self.repo = repo
        self.revision = revision
        self.dest = dest
        self._note = note
        self._warn = warn
        self._bad: dict[str, int] = {}

    def _ssh(self, peer: Peer) -> list[str]:
        folder = self.access.folder
        options = ["ssh", "-p", str(peer.port), "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
        options += ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"]
        # The content is public or protected by the network; what counts is the sha256 afterwards.
        options += ["-o", "Compression=no", "-o", "ForwardAgent=no", "-o", "ClearAllForwardings=yes"]
        if folder is not None:
            options += ["-i", str(folder / KEY), "-o", "IdentitiesOnly=yes"]
            options += ["-o", f"UserKnownHostsFile={folder / KNOWN_HOSTS}", "-o", "StrictHostKeyChecking=yes"]
        return options

    def _ask(self, peer: Peer) -> dict[str, object]:
        try:
            done = subprocess.run(
                [*self._ssh(peer), peer.address, f"have {self.repo} {self.revision}"],
                capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=30, check=False,
            )  # fmt: skip
            reply = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else {}
        except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
            reply = {}
        return reply if isinstance(reply, dict) else {}

    def take(
        self,
        partial: store.Partial,
        plan: Mapping[str, Want] | None,
        have: Callable[[mf.Entry], None],
        begin: Callable[[dict[str, Want], str], dict[str, Want]],
        moved: Callable[[Mapping[str, int]], None],
    ) -> str | None:
        """Take what is missing from whoever has it.

        Args:
            begin: gets the giver's plan and address when a copy begins, answers what is still missing.
            moved: told the bytes of each file that lies in the receiving folder, now and then.

        Returns:
            The last giver's address, or None when nobody has the revision or will have it.
        """
        began = hoped = time.monotonic()
        last_look = False
        while True:
            states: dict[str, str] = {}
            order = list(self.access.peers())
            random.shuffle(order)
            for peer in order:
                address = peer.address
                if self._bad.get(address, 0) >= 2:
                    continue
                reply = self._ask(peer)
                state = states[address] = str(reply.get("state", "unreachable"))
                if state != "ready":
                    continue
                theirs = _plan(reply.get("files"))
                if theirs is None or (plan is not None and set(theirs) != set(plan)):
                    self._bad[address] = 2
                    self._warn(f"{address}: has other files than the hub lists")
                    continue
                missing = begin(theirs, address)
                problem = self._copy(peer, partial, missing, have, moved)
                if problem is None:
                    return address
                # From here this host waits itself, and nobody may wait for it.
                (partial.work / FILLING).unlink(missing_ok=True)
                if problem != "busy":
                    self._bad[address] = self._bad.get(address, 0) + 1
                    self._warn(f"{address}: {problem}")
            now = time.monotonic()
            if any(state in ("ready", "busy", "filling") for state in states.values()):
                # From here, not from the begin: after hours of waiting one look at a network that was away for a
                # moment must not send a whole fleet to the hub.
                hoped, last_look = now, False
            elif not states or not self.access.wait_s:
                # Where every peer has failed for good there is nobody to wait for.
                return None
            elif now - hoped >= self.access.wait_s:
                # Once more before it leaves for good: the one before it in the order may have begun just now.
                if last_look:
                    return None
                last_look = True
            self._note(f"waiting for a peer: {', '.join(f'{a} {s}' for a, s in sorted(states.items()))}")
            # Each look is a login on every other host: seldom where it has taken minutes already.
            time.sleep(random.uniform(0.5, 1.5) * min(10.0, 1 + (now - began) / 60))

    def _copy(
        self,
        peer: Peer,
        partial: store.Partial,
        missing: Mapping[str, Want],
        have: Callable[[mf.Entry], None],
        moved: Callable[[Mapping[str, int]], None],
    ) -> str | None:
        """One rsync of the whole revision; files are verified while the next ones still come."""
        landing = partial.landing
        landing.mkdir(exist_ok=True)
        command = [
            "rsync",
            "-rtL",
            "--inplace",
            "--partial",
            f"--timeout={max(1, int(self.access.stall_s))}",
            "--out-format=%b %n",
        ]
        # What is here already is neither sent nor read by the giver.
        command += ["--exclude=/reap-manifest.json"]
        for name in mf.walk(partial.folder):
            if name not in missing:
                command.append(f"--exclude=/{_pattern(name)}")
        command += ["-e", shlex.join(self._ssh(peer)), f"{peer.address}:{self.dest}/", f"{landing}/"]
        errors: list[str] = []

        def verify(name: str) -> None:
            want = missing[name]
            entry, problem = mf.verify(landing / name, want)
            if entry is None:
                (landing / name).unlink(missing_ok=True)
                errors.append(f"gives wrong content: {problem}")
                return
            (landing / name).replace(partial.part(want))
            partial.accept(want, entry)
            have(entry)

        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise ReapError(f"rsync cannot be started ({error.strerror}); install the package rsync") from error
        over = threading.Event()
        access = self.access
        stalled: list[str] = []

        def watch() -> None:
            # rsync's own timeout sees a connection that is silent, and not one that trickles. The most that each file
            # ever had: one that was verified, or was wrong, is not there any more.
            most: dict[str, int] = {}
            mark, marked = -1, time.monotonic()
            while not over.wait(min(1.0, access.stall_s / 4)):
                sizes = {name: found.st_size for name, found in mf.walk(landing).items()}
                moved(sizes)
                for name, size in sizes.items():
                    most[name] = max(size, most.get(name, 0))
                total, now = sum(most.values()), time.monotonic()
                if mark < 0 or total - mark >= access.min_rate * access.stall_s:
                    mark, marked = total, now
                elif now - marked >= access.stall_s and process.poll() is None and not stalled:
                    stalled.append(f"the copy stalled ({total - mark} bytes in {now - marked:.0f} s)")
                    process.terminate()
                elif stalled and now - marked >= 2 * access.stall_s:
                    process.kill()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            with ThreadPoolExecutor(4) as pool:
                jobs: list[Future[None]] = []
                last = ""
                for line in process.stdout:
                    # rsync names a file before it sets its time: it is through with it when it names the next.
                    if last in missing:
                        jobs.append(pool.submit(verify, last))
                    last = line.rstrip("\n").partition(" ")[2]
                said = process.stderr.read().strip().splitlines()
                status = process.wait()
                for job in jobs:
                    job.result()
        finally:
            over.set()
            watcher.join()
            if process.poll() is None:
                process.kill()
                process.wait()
        if errors:
            return errors[0]
        if stalled:
            return stalled[0]
        if status != 0:
            if any("reap: busy" in line for line in said):
                return "busy"
            return next((line for line in reversed(said) if line.strip()), f"rsync ended with {status}")[:300]
        # rsync says nothing of files that were whole from an earlier try.
        for name, want in missing.items():
            if (landing / name).exists():
                verify(name)
            elif not (partial.folder / want.name).exists():
                return f"did not send {name}"
        return errors[0] if errors else None


def _pattern(name: str) -> str:
    return re.sub(r"([\\*?\[\]])", r"\\\1", name)


def _plan(files: object) -> dict[str, Want] | None:
    if not isinstance(files, list):
        return None
    with contextlib.suppress(ReapError, AttributeError):
        return plan_from_listing(files)
    return None
