"""``reap serve``: the main process of reap.service, and what a provision does to the unit."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from ..errors import ReapError
from ..serve.aftermath import Ending, settle
from ..serve.apply import apply, rollback
from ..serve.config import ServiceConfig, Timings
from ..serve.docker import Docker
from ..serve.failure import Failure
from ..serve.host import read_key
from ..serve.notify import Notifier
from ..serve.proxy import write_key
from ..serve.supervisor import Supervisor

HELP = "run the model container in the foreground for systemd"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--config", type=Path, default=Path("/etc/reap/service.json"), metavar="FILE")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--apply", action="store_true", help="make the unit serve what FILE asks for, and wait for it")
    action.add_argument("--rollback", action="store_true", help="go back to the generation that served before")
    action.add_argument("--clean-up", action="store_true", help="remove what a killed service left (ExecStopPost=)")
    action.add_argument(
        "--proxy-key",
        type=Path,
        metavar="OUT",
        help="write the API key as the proxy reads it; say if that is new",
    )
    parser.add_argument(
        "--forget", action="store_true", help="with --rollback: never go back to the generation that is left"
    )
    parser.add_argument("--check", action="store_true", help="with --apply: only say what would be done")


def run(args: argparse.Namespace) -> int:
    """Run it; the exit statuses of the service itself are in :mod:`reap.serve.supervisor`."""
    if args.apply or args.rollback:
        outcome = rollback(args.config, forget=args.forget) if args.rollback else apply(args.config, check=args.check)
        print(json.dumps(outcome.to_mapping()))
        return 1 if outcome.error else 0
    if args.clean_up:
        return _clean_up(args.config)
    if args.proxy_key:
        config = ServiceConfig.read(args.config)
        try:
            key = read_key(Path(config.api_key_file), required=True)
        except Failure as failure:
            raise ReapError(str(failure)) from failure
        assert key is not None
        print(json.dumps({"changed": write_key(args.proxy_key, key)}))
        return 0
    notifier = Notifier()
    try:
        return Supervisor(args.config, notifier=notifier).run()
    except ReapError as error:
        notifier.status(f"cannot start: {error}")
        raise


def _clean_up(config_path: Path) -> int:
    """After the end of the main process, however it ended."""
    try:
        config = ServiceConfig.read(config_path)
        run_dir, timings = Path(config.run_dir), config.timings
    except ReapError as error:
        # The file may be gone with a teardown; systemd's folder is then the only place to look.
        print(f"reap serve: {error}", file=sys.stderr)
        run_dir, timings = Path("/run/reap"), Timings()
    settle(Docker(), run_dir, timings, Ending.from_environment(os.environ))
    return 0
