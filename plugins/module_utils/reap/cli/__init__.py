"""The command line: one module per subcommand, imported only when it is asked for.

A subcommand module defines ``HELP`` (one line), ``add_arguments(parser)`` and ``run(args) -> int``.
Exit codes: 0 good, 1 the answer is no, 2 wrong use or could not run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import ReapError

# name -> one line of help. The module is reap.cli.<name>.
SUBCOMMANDS = {
    "fit": "say before loading whether a model fits this host's memory",
    "patch": "check or apply the vLLM patches in a site-packages folder",
    "image": "bring the runtime image to this host, make the patched one of it, or remove both",
    "fetch": "download, verify or import a model revision",
    "serve": "run the model container in the foreground for systemd",
    "watch": "guard the host's memory and stop the model before the host freezes",
    "verify": "prove that an endpoint does what its profile says",
    "status": "say in one line or in JSON what this host serves",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The process exit status: 0 good, 1 the answer is no, 2 wrong use or could not run.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="reap", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"reap {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    run = None
    for name, text in SUBCOMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name == chosen:
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(sub)
            run = module.run
    args = parser.parse_args(argv)
    assert run is not None  # argparse accepted the command, so it was the chosen one
    try:
        return int(run(args))
    except ReapError as error:
        print(f"reap {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
