"""The whole step: from nothing, a half download, a damaged folder or another copy to a revision that is whole."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import safetensors
from ..errors import ReapError
from . import local, store
from . import manifest as mf
from .hub import Hub, Settings
from .peers import FILLING, Access, Peers
from .plan import CONFIG, INDEX, Want, check_config, check_index, download_order
from .progress import Progress
from .state import inspect


@dataclass(frozen=True, slots=True)
class Request:
    """What is wanted. Sizes in bytes.

    ``verify``: ``trust`` believes the manifest where size, mtime and inode are the verified file's; ``full`` reads all.
    ``reserve``: stays free on the disk. ``imports``: folders to take from before anything else.
    ``offline``: the hub is never asked; hashes then come from the folders or from other hosts.
    ``kept``: folders of models that are in use, not to be named where room is wanted; None: unknown.
    """

    repo: str
    revision: str
    dest: Path
    expect: Mapping[str, Any] = field(default_factory=dict)
    verify: str = "trust"
    reserve: int = 0
    models: Path | None = None
    kept: tuple[str, ...] | None = ()
    imports: tuple[Path, ...] = ()
    offline: bool = False
    hash_workers: int = 0
    lock_wait_s: float | None = None
    settings: Settings = field(default_factory=Settings)
    peers: Access | None = None


@dataclass(slots=True)
class Outcome:
    """What was done. ``read`` counts bytes that were hashed again, ``fetched`` bytes that came from elsewhere."""

    changed: bool = False
    path: str = ""
    size: int = 0
    files: int = 0
    fetched: int = 0
    read: int = 0
    source: str = ""
    repaired: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    elapsed_s: float = 0.0


def fetch(request: Request, progress: Progress) -> Outcome:
    """Make the revision be at ``request.dest``, whole and verified.

    Raises:
        ReapError: what prevents it, in one line. What was fetched so far stays and is continued next time.
    """
    began = time.monotonic()
    outcome = Outcome(path=str(request.dest))
    try:
        # A full verification reads the config too and mends it; until then it may say anything.
        full = request.verify == "full"
        state = inspect(request.repo, request.revision, request.dest, {} if full else request.expect)
        if full or not state.ready:
            with store.exclusive(request.dest, lambda text: progress.update(detail=text), request.lock_wait_s) as lock:
                _Run(request, progress, outcome, lock).run()
    except OSError as error:
        raise store.disk_error(error, request.dest) from error
    record = mf.load(request.dest)
    if record is None:
        raise ReapError(f"{request.dest} has no manifest after the fetch; another program works in this folder")
    outcome.size, outcome.files = record.size, len(record.files)
    outcome.source = outcome.source or record.source
    outcome.elapsed_s = round(time.monotonic() - began, 3)
    return outcome


class _Run:
    """One run under the revision's lock."""

    def __init__(self, request: Request, progress: Progress, outcome: Outcome, lock: int) -> None:
        self.request = request
        self.progress = progress
        self.outcome = outcome
        self.partial = store.Partial(request.dest)
        self.what = f"{request.repo}@{request.revision}"
        self._lock = lock
        self._guard = threading.Lock()
        self._threads = request.hash_workers or min(16, len(os.sched_getaffinity(0)))
        self._hub: Hub | None = None

    def run(self) -> None:
        if self.request.dest.is_symlink():
            raise ReapError(
                f"{self.request.dest} is a link; wanted a folder of plain files. Remove the link or fix it by hand"
            )
        if self.request.dest.exists() and self._check_existing():
            return
        try:
            self._build()
        finally:
            if self._hub is not None:
                self._hub.close()
        self.outcome.changed = True

    # --- a folder that has its final name ---

    def _check_existing(self) -> bool:
        """Verify the folder in place; False when it had to be made an unfinished one again."""
        dest, request = self.request.dest, self.request
        record = mf.load(dest)
        if record is None or (record.repo, record.commit) != (request.repo, request.revision):
            self.outcome.repaired.append("the folder had no manifest of this revision")
            self.partial.take_back()
            return False
        faults = mf.faults(dest, record)
        if extra := [fault.name for fault in faults if fault.kind == "extra"]:
            raise ReapError(
                f"{dest} holds {_some(extra)}, which the revision does not have and a server could load. "
                "Move it away, then run this again."
            )
        names = set(record.files) if request.verify == "full" else {fault.name for fault in faults}
        good, bad = self._rehash(dest, {name: record.files[name].want() for name in names})
        if bad:
            self.outcome.repaired += sorted(bad.values())
            # Before the folder goes back: after a kill, the next run would trust their sizes and times.
            for name in bad:
                (dest / name).unlink(missing_ok=True)
            self.partial.take_back()
            self.partial.journal.add_all(good.values())
            return False
        if request.expect:
            check_config(dest, request.expect, self.what)
        if any(not mf.same_file(dest / name, record.files[name]) for name in names):
            self.outcome.changed = True
        if names:
            files = {**record.files, **good}
            mf.Manifest(record.repo, record.commit, record.source, round(time.time(), 3), files).save(dest)
        return True

    def _rehash(self, folder: Path, wants: Mapping[str, Want]) -> tuple[dict[str, mf.Entry], dict[str, str]]:
        """Read files in parallel, the largest first."""
        good: dict[str, mf.Entry] = {}
        bad: dict[str, str] = {}
        total, done = sum(want.size for want in wants.values()), 0
        self.progress.update(0, total=total, detail="verifying", source="disk")

        def one(want: Want) -> None:
            nonlocal done
            entry, problem = mf.verify(folder / want.name, want)
            with self._guard:
                done += want.size
                self.outcome.read += want.size
                if entry is not None:
                    good[want.name] = entry
                else:
                    bad[want.name] = str(problem)
                self.progress.update(done, detail=f"verified {want.name}")

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(one, sorted(wants.values(), key=lambda w: -w.size)))
        return good, bad

    # --- an unfinished folder ---

    def _build(self) -> None:
        request, partial = self.request, self.partial
        sources = self._sources()
        partial.open()
        record = mf.load(partial.folder)
        if record is not None and (record.repo, record.commit) == (request.repo, request.revision):
            # Killed between the manifest and the rename.
            partial.journal.add_all(record.files.values())
        local.leftover_download(partial)
        have: dict[str, mf.Entry] = {}
        if self._has_peers and not sources:
            assert request.peers is not None
            plan = self._from_peers(request.peers, have)
            if plan is not None:
                partial.clean(plan)
                self._finish(plan, have)
                return
        plan = self._plan(sources)
        partial.save_plan(request.repo, request.revision, plan)
        (partial.work / FILLING).touch()
        self.progress.update(0, total=sum(want.size for want in plan.values()), detail="looking at what is there")
        for entry in local.adopt(partial, plan, request.repo, request.revision, self._read):
            self.progress.update(detail=f"verified {entry.name}")
        partial.salvage(plan)
        partial.clean(plan)
        # Only what this plan wants: a peer may have given other files.
        have = mf.trusted(partial.folder, partial.journal.read(), plan)
        missing = sum(want.size for name, want in plan.items() if name not in have) - partial.begun(plan)
        self._check_space(missing)

        for source in sources:
            self._import(source, plan, have)
        todo = [want for want in download_order(plan) if want.name not in have]
        if todo and request.offline and self._has_peers:
            assert request.peers is not None
            given = self._from_peers(request.peers, have)
            if given is not None:
                partial.clean(given)
                self._finish(given, have)
                return
        if todo and request.offline:
            raise ReapError(
                f"{_some([want.name for want in todo])} of {self.what} cannot be had from {_folders(sources)}, "
                "and the hub is switched off. Give another source with --import."
            )
        if todo:
            self._download(todo, plan, have)
        self._finish(plan, have)

    @property
    def _has_peers(self) -> bool:
        return self.request.peers is not None and bool(self.request.peers.peers())

    def _sources(self) -> list[local.Source]:
        """The folders to import from that have the revision.

        In a fleet the disk is at one host while the setting is everybody's: the others take it from that one.
        """
        found = []
        for path in self.request.imports:
            try:
                found.append(local.find(path, self.request.repo, self.request.revision))
            except ReapError as error:
                if not self._has_peers:
                    raise
                self.outcome.warnings.append(f"{error}; looked for on the other hosts")
        return found

    def _check_space(self, missing: int) -> None:
        request = self.request
        store.check_space(request.dest, max(0, missing), request.reserve, request.models, request.kept)

    def _read(self, count: int) -> None:
        with self._guard:
            self.outcome.read += count

    def _plan(self, sources: list[local.Source]) -> dict[str, Want]:
        plan = self.partial.load_plan(self.request.repo, self.request.revision)
        if plan is not None:
            return plan
        if not self.request.offline:
            # A disk that was tampered with agrees with itself; where the hub can be asked, its word counts.
            return self._open_hub().listing()
        if not sources:
            said = "".join(f" {warning}." for warning in self.outcome.warnings)
            raise ReapError(
                f"no other host gives {self.what}, and the hub is switched off. Give a source with --import, or begin "
                f"with the host that has one.{said}"
            )
        plan = next((source.plan for source in sources if source.plan is not None), None)
        if plan is None:
            raise ReapError(
                f"{_folders(sources)} has neither a manifest nor the hub's hashes, so nothing of {self.what} could be "
                "verified without the hub. Add the file reap-manifest.json of a host that has it."
            )
        return plan

    def _open_hub(self) -> Hub:
        if self._hub is None:
            self.progress.update(source="hub", detail="asking for the listing")
            self._hub = Hub(
                self.request.settings,
                self.request.repo,
                self.request.revision,
                self._lock,
                lambda text: self.progress.update(detail=text),
            )
        return self._hub

    def _early_checks(self, name: str, plan: Mapping[str, Want]) -> None:
        """Refuse the wrong checkpoint before its 94 GB are here."""
        if name == CONFIG and self.request.expect:
            check_config(self.partial.folder, self.request.expect, self.what)
        if name == INDEX:
            check_index(self.partial.folder, plan, self.what)

    def _from_peers(self, access: Access, have: dict[str, mf.Entry]) -> dict[str, Want] | None:
        """Take the revision from other hosts; the plan when all of it is here, None when the hub is next."""
        request, partial = self.request, self.partial
        (partial.work / FILLING).unlink(missing_ok=True)
        known = partial.load_plan(request.repo, request.revision)
        done = shown = 0

        def begin(plan: dict[str, Want], address: str) -> dict[str, Want]:
            nonlocal known, done, shown
            # The hub's hashes, where an earlier run has them, else the giver's. A giver's are not kept for later: they
            # are all sha256, and the hub names small files by their blob id.
            wanted = known = known or plan
            local.adopt(partial, wanted, request.repo, request.revision, self._read)
            have.update(mf.trusted(partial.folder, partial.journal.read(), wanted))
            missing = {name: want for name, want in wanted.items() if name not in have}
            # What the hub began is on the disk already, and a peer goes on with it.
            partial.lend(missing)
            self._check_space(sum(want.size for want in missing.values()) - partial.landed(missing))
            done = shown = sum(entry.size for entry in have.values())
            (partial.work / FILLING).touch()
            total = sum(want.size for want in wanted.values())
            self.progress.update(done, total=total, source=f"peer:{address}", detail="copying")
            self.progress.restart_rate(done)
            return missing

        def verified(entry: mf.Entry) -> None:
            nonlocal done
            with self._guard:
                have[entry.name] = entry
                done += entry.size
                self.outcome.fetched += entry.size
            self.progress.update(detail=entry.name)

        def moved(landed: Mapping[str, int]) -> None:
            nonlocal shown
            with self._guard:
                # A file that is on its way to its name is in neither for a moment: no step back.
                shown = max(shown, done + sum(size for name, size in landed.items() if name not in have))
            self.progress.update(shown)

        peers = Peers(
            access,
            request.repo,
            request.revision,
            request.dest,
            lambda text: self.progress.update(detail=text),
            self.outcome.warnings.append,
        )
        giver = peers.take(partial, known, verified, begin, moved)
        if giver is None or known is None:
            return None
        self.outcome.source = f"peer:{giver}"
        for name in (CONFIG, INDEX):
            self._early_checks(name, known)
        return known

    def _import(self, source: local.Source, plan: Mapping[str, Want], have: dict[str, mf.Entry]) -> None:
        self.progress.update(
            sum(entry.size for entry in have.values()), source="disk", detail=f"copying from {source.folder}"
        )
        self.progress.restart_rate(sum(entry.size for entry in have.values()))
        done = sum(entry.size for entry in have.values())

        def copied(count: int) -> None:
            nonlocal done
            with self._guard:
                done += count
                self.outcome.fetched += count
            self.progress.update(done)

        def one(want: Want) -> None:
            if problem := local.copy(source.folder, want, self.partial, copied):
                with self._guard:
                    self.outcome.warnings.append(f"{source.folder}: {problem}; looked for elsewhere")

        todo = [want for want in download_order(plan) if want.name not in have]
        for want in [w for w in todo if w.name in (CONFIG, INDEX)]:
            one(want)
            if (self.partial.folder / want.name).exists():
                self._early_checks(want.name, plan)
        with ThreadPoolExecutor(min(4, self._threads)) as pool:
            list(pool.map(one, [w for w in todo if w.name not in (CONFIG, INDEX)]))
        have |= mf.trusted(self.partial.folder, self.partial.journal.read(), plan)
        self.outcome.source = f"disk:{source.folder}"

    def _download(self, todo: list[Want], plan: Mapping[str, Want], have: dict[str, mf.Entry]) -> None:
        hub = self._open_hub()
        partial = self.partial
        total = sum(want.size for want in plan.values())
        done = sum(entry.size for entry in have.values())
        begun = partial.begun(plan)
        self.progress.update(done + begun, total=total, source="hub", detail="downloading")
        self.progress.restart_rate(done + begun)

        def verified(entry: mf.Entry) -> None:
            nonlocal done
            with self._guard:
                done += entry.size
                have[entry.name] = entry
            self.progress.update(detail=entry.name)

        over = threading.Event()

        def watch() -> None:
            shown = 0
            while not over.wait(1.0):
                # A file that is on its way to its name is in neither for a moment: no step back.
                shown = max(shown, done + partial.begun(plan))
                self.progress.update(shown)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            small = [want for want in todo if want.name in (CONFIG, INDEX)]
            for want in small:
                hub.download([want], partial, verified)
                self._early_checks(want.name, plan)
            if rest := [want for want in todo if want not in small]:
                hub.download(rest, partial, verified)
        finally:
            over.set()
            watcher.join()
        self.outcome.fetched += max(0, sum(want.size for want in todo) - begun)
        self.outcome.source = f"{self.outcome.source} and hub" if self.outcome.source else "hub"

    def _finish(self, plan: Mapping[str, Want], have: Mapping[str, mf.Entry]) -> None:
        request, partial = self.request, self.partial
        if lost := sorted(set(plan) - set(mf.trusted(partial.folder, have, plan))):
            raise ReapError(
                f"{lost[0]} changed under this program's hands; another one works in {partial.folder}. Run this again"
            )
        if extra := sorted(set(mf.walk(partial.folder)) - set(plan)):
            raise ReapError(
                f"{partial.folder} holds {_some(extra)}, which the revision does not have; another program writes into "
                "that folder. Stop it, then run this again."
            )
        if request.expect:
            check_config(partial.folder, request.expect, self.what)
        self.outcome.warnings += [
            w for w in check_index(partial.folder, plan, self.what) if w not in self.outcome.warnings
        ]
        for name in plan:
            if name.endswith(".safetensors"):
                # Right by its hash and still no checkpoint: then it was uploaded so.
                safetensors.read_header(partial.folder / name)
        record = mf.Manifest(
            request.repo, request.revision, self.outcome.source or "disk", round(time.time(), 3), dict(have)
        )
        partial.finish(record)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"


def _folders(sources: list[local.Source]) -> str:
    return ", ".join(str(source.folder) for source in sources) or "no folder"


def result_line(outcome: Outcome, extra: Mapping[str, Any] | None = None) -> str:
    """The outcome as the one JSON line that the command prints last."""
    return json.dumps({name: getattr(outcome, name) for name in outcome.__slots__} | dict(extra or {}))
