"""``reap fetch``: make a model revision be on this host, whole and verified; list and remove old ones."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from ..errors import ReapError
from ..fetch import downloader, engine, inuse, peers, store
from ..fetch.hub import Settings
from ..fetch.progress import Progress, without
from ..fetch.state import inspect

HELP = "download, verify or import a model revision"

# What says which models are in use: the wanted configuration, those that served before, and the running one.
SERVICE_FILE = Path("/etc/reap/service.json")
GENERATIONS = Path("/var/lib/reap/service/generations")
SERVICE_STATE = Path("/run/reap/service.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; see ``--help``."""
    parser.add_argument("--repo", help="owner/name")
    parser.add_argument("--revision", help="full commit id, 40 characters")
    parser.add_argument("--dest", type=Path, help="final folder of the revision; it appears there only when whole")
    parser.add_argument("--expect", default="{}", metavar="JSON", help="keys of config.json (dotted) and their values")
    parser.add_argument("--verify", choices=("trust", "full"), default="trust", help="full reads every byte again")
    parser.add_argument(
        "--import",
        dest="imports",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="take files from this folder first: a copy, a models folder, or a Hugging Face cache; repeatable",
    )
    parser.add_argument("--offline", action="store_true", help="never ask the hub")
    parser.add_argument("--endpoint", help="address of the hub; default: HF_ENDPOINT, else the public one")
    parser.add_argument(
        "--token-env", default="HF_TOKEN", metavar="NAME", help="environment variable that holds the token"
    )
    parser.add_argument(
        "--downloader", default=sys.executable, metavar="PYTHON", help="Python that has huggingface_hub"
    )
    parser.add_argument("--workers", type=_count, default=4, help="connections to the hub at once (default 4)")
    parser.add_argument(
        "--hash-workers", type=int, default=0, help="files hashed at once (default: number of cores, at most 16)"
    )
    parser.add_argument(
        "--stall-timeout",
        type=float,
        default=60,
        metavar="S",
        help="a connection slower than --min-rate for so long is replaced",
    )
    parser.add_argument(
        "--min-rate", type=int, default=32 * 1024, metavar="B/S", help="bytes a second that one connection must move"
    )
    parser.add_argument(
        "--patience", type=float, default=1800, metavar="S", help="give up after so long without progress"
    )
    parser.add_argument(
        "--lock-wait", type=float, metavar="S", help="wait at most so long for another fetch of it (default: its end)"
    )
    parser.add_argument("--reserve-bytes", type=int, default=0, help="bytes that stay free on the disk")
    parser.add_argument(
        "--models", type=Path, help="folder of all models, for --list, --prune and the names of what could be freed"
    )
    parser.add_argument("--progress", type=Path, metavar="FILE", help="write progress as JSON to this file")
    parser.add_argument("--check", action="store_true", help="say whether it is ready; change nothing; exit 1 if not")
    parser.add_argument("--list", action="store_true", help="list the revisions below --models as JSON")
    parser.add_argument(
        "--prune",
        action="append",
        default=[],
        metavar="OWNER/NAME@COMMIT",
        help="remove this revision below --models ('unused': all that nothing keeps); repeatable",
    )
    parser.add_argument(
        "--keep", action="append", default=[], metavar="DIR", help="with --prune: keep this folder; repeatable"
    )
    parser.add_argument(
        "--service-file",
        type=Path,
        default=SERVICE_FILE,
        metavar="FILE",
        help=f"what is to be served; its model is in use and stays (default: {SERVICE_FILE})",
    )
    parser.add_argument(
        "--generations",
        type=Path,
        default=GENERATIONS,
        metavar="DIR",
        help=f"configurations that the service could go back to; their models stay (default: {GENERATIONS})",
    )
    parser.add_argument(
        "--service-state",
        type=Path,
        default=SERVICE_STATE,
        metavar="FILE",
        help=f"what is running (default: {SERVICE_STATE})",
    )
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="DIR",
        help="take it from other hosts first: peers.json (address and port of each), known_hosts and the private key",
    )
    parser.add_argument(
        "--peer-wait",
        type=float,
        default=0,
        metavar="S",
        help="ask the hub when for so long no peer had the model or was getting it",
    )
    parser.add_argument(
        "--serve-peer",
        action="store_true",
        help="answer SSH_ORIGINAL_COMMAND of a receiver: the forced command of its key",
    )
    parser.add_argument(
        "--install-downloader", type=Path, metavar="DIR", help="make this virtual environment, nothing else"
    )
    parser.add_argument(
        "--requirements", type=Path, metavar="FILE", help="with --install-downloader: pinned, hashed packages"
    )
    parser.add_argument(
        "--pip-arg", action="append", default=[], metavar="ARG", help="with --install-downloader: for pip"
    )
    parser.add_argument("--dry-run", action="store_true", help="with --prune: only say what would go")


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError("wanted 1 to 64")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the command; the last line of standard output is one JSON object.

    Returns:
        0 good, 1 not ready (``--check``), 2 could not be done.
    """
    if args.install_downloader is not None:
        if args.requirements is None:
            raise ReapError("--requirements is missing")
        print(json.dumps({"changed": downloader.install(args.install_downloader, args.requirements, args.pip_arg)}))
        return 0
    if args.serve_peer:
        if args.models is None:
            raise ReapError("--models is missing")
        return peers.answer(args.models, os.environ.get("SSH_ORIGINAL_COMMAND", ""))
    if args.list or args.prune:
        return _manage(args)
    for name in ("repo", "revision", "dest"):
        if getattr(args, name) is None:
            raise ReapError(f"--{name} is missing")
    try:
        expect = json.loads(args.expect)
    except ValueError as error:
        raise ReapError(f"--expect is no JSON ({error})") from error
    if not isinstance(expect, dict):
        raise ReapError(f"--expect is {args.expect!r}; wanted a JSON object of config keys")
    dest = args.dest.absolute()
    if args.check:
        state = inspect(args.repo, args.revision, dest, expect)
        print(json.dumps({"changed": False, "ready": state.ready, "reasons": state.reasons, "begun": state.begun}))
        return 0 if state.ready else 1
    token = os.environ.pop(args.token_env, None)
    request = engine.Request(
        repo=args.repo,
        revision=args.revision,
        dest=dest,
        expect=expect,
        verify=args.verify,
        reserve=args.reserve_bytes,
        models=args.models,
        kept=_kept(args),
        imports=tuple(path.absolute() for path in args.imports),
        offline=args.offline,
        hash_workers=args.hash_workers,
        lock_wait_s=args.lock_wait,
        peers=None
        if args.peers is None
        else peers.Access(args.peers, args.peer_wait, args.stall_timeout, args.min_rate),
        settings=Settings(
            python=args.downloader,
            workers=args.workers,
            stall_s=args.stall_timeout,
            min_rate=args.min_rate,
            patience_s=args.patience,
            endpoint=args.endpoint or os.environ.get("HF_ENDPOINT"),
            token=token,
        ),
    )
    progress = Progress(args.progress, "model_fetch", secret=token)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        outcome = engine.fetch(request, progress)
    except ReapError as error:
        progress.failed(str(error))
        raise ReapError(without(str(error), token)) from None
    except KeyboardInterrupt:
        progress.failed("interrupted; run it again and it goes on where it was")
        print("reap fetch: interrupted; run it again and it goes on where it was", file=sys.stderr)
        return 130
    progress.update(outcome.size, total=outcome.size)
    progress.done(f"{outcome.files} files")
    for warning in outcome.warnings:
        print(f"reap fetch: {without(warning, token)}", file=sys.stderr)
    print(without(engine.result_line(outcome), token))
    return 0


def _kept(args: argparse.Namespace) -> tuple[str, ...] | None:
    """Models in use; None where that is unknown, which is no reason not to fetch."""
    try:
        return tuple(inuse.models([args.service_file], args.generations, args.service_state))
    except ReapError:
        return None


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _manage(args: argparse.Namespace) -> int:
    if args.models is None:
        raise ReapError("--models is missing: the folder that holds <owner>/<name>/<commit>")
    if args.list:
        found = store.revisions(args.models)
        print(json.dumps({"changed": False, "revisions": [{n: getattr(r, n) for n in r.__slots__} for r in found]}))
        return 0
    used = inuse.models([args.service_file], args.generations, args.service_state)
    removed = store.prune(args.models, args.prune, args.keep + used, dry_run=args.dry_run)
    print(
        json.dumps(
            {
                "changed": bool(removed) and not args.dry_run,
                "freed": sum(r.size for r in removed),
                "removed": [r.path for r in removed],
            }
        )
    )
    return 0
