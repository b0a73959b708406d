"""`reap image base|patched|remove`: the container images of a host. One JSON object on standard output."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ReapError
from ..fetch.progress import Progress
from ..images import base as bases
from ..images import derived
from ..images.engine import SOCKET, Engine

HELP = "bring the pinned runtime image to the host, make the patched one of it, or remove both"
LOCK = Path("/run/lock/reap-image.lock")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("action", choices=["base", "patched", "remove"], help="have one of the two, or remove both")
    parser.add_argument("--base", required=True, metavar="JSON", help="identity and sources of the base image")
    parser.add_argument("--build", metavar="JSON", help="what to build on it (action patched)")
    parser.add_argument("--check", action="store_true", help="say what would happen and change nothing")
    parser.add_argument("--progress", metavar="FILE", help="write how far it is to this file")
    parser.add_argument("--program", metavar="FILE", help="the reap program to put into the image; default: this one")
    parser.add_argument("--socket", default=SOCKET, help=argparse.SUPPRESS)


def _parse(text: str | None, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "")
    except ValueError as error:
        raise ReapError(f"--{name} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ReapError(f"--{name} is no JSON object")
    return value


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One image step at a time on a host; the lock goes with the process."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 the image is there, 1 it could not be had (the reason is in the JSON), 2 wrong use."""
    engine = Engine(args.socket)
    spec = bases.Spec.of(_parse(args.base, "base"))
    build = derived.Build.of(_parse(args.build, "build")) if args.action == "patched" else None
    step = "image_pull" if build is None else "patch_build"
    progress = Progress(
        Path(args.progress) if args.progress else None, step, unit="bytes" if build is None else "steps"
    )
    outcome: dict[str, Any]
    try:
        if args.action == "remove":
            with _locked():
                outcome = _remove(engine, spec)
        elif args.check:
            outcome = _check(engine, spec, build)
        else:
            with _locked():
                outcome = _ensure(engine, spec, build, progress, Path(args.program or sys.argv[0]))
        progress.done()
    except ReapError as error:
        progress.failed(str(error))
        outcome = {"changed": False, "failed": True, "msg": str(error)}
    print(json.dumps(outcome, sort_keys=True))
    return 1 if outcome.get("failed") else 0


def _check(engine: Engine, spec: bases.Spec, build: derived.Build | None) -> dict[str, Any]:
    found = bases.locate(engine, spec)
    if build is None:
        return {"changed": found is None, "base": found.record() if found else None}
    image = derived.current(engine, build, found) if found else None
    if found and image is None:
        derived.refuse_changed_base(engine, build, found)
    return {"changed": image is None, "base": found.record() if found else None, "image": build.name, "id": image}


def _remove(engine: Engine, spec: bases.Spec) -> dict[str, Any]:
    """Take away what the recipe made or brought and no container uses."""
    gone = [*derived.sweep(engine), *derived.prune(engine), *bases.prune(engine, spec, derived.bases_in_use(engine))]
    return {"changed": bool(gone), "removed": gone}


def _ensure(
    engine: Engine, spec: bases.Spec, build: derived.Build | None, progress: Progress, program: Path
) -> dict[str, Any]:
    if build is None:
        found, changed = bases.ensure(engine, spec, progress, os.environ)
        return {"changed": changed, "base": found.record()}
    located = bases.locate(engine, spec)
    if located is None:
        raise ReapError(
            f"the base image {spec.override or spec.pinned} is not on the host: run role runtime_image first"
        )
    outcome, changed = derived.ensure(engine, build, located, program, progress)
    if changed:
        outcome["pruned"] += bases.prune(engine, spec, derived.bases_in_use(engine) | {located.id})
    return {"changed": changed, "base": located.record(), **outcome}
