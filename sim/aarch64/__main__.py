"""`python3 -m sim.aarch64`: emulated aarch64 machines that look like a Spark (docs/aarch64.md)."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys

from sim.aarch64 import bed, machine
from sim.common import SimError, say


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit status is 0 done, 1 failed, 2 wrong use."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    parser = argparse.ArgumentParser(prog="python3 -m sim.aarch64", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make what is missing: disk, kernel, image double, checkpoint")
    start = commands.add_parser("up", help="start a machine")
    start.add_argument("name")
    start.add_argument("--memory-mib", type=int, default=machine.MEMORY_MIB, help="of a cold boot")
    start.add_argument("--snapshot", help="continue from this snapshot instead of a cold boot")
    keep = commands.add_parser("snapshot", help="turn a machine that was booted cold into a snapshot")
    keep.add_argument("name")
    keep.add_argument("label")
    end = commands.add_parser("down", help="end machines and remove what they wrote")
    end.add_argument("names", nargs="*")
    end.add_argument("--all", action="store_true")
    again = commands.add_parser("reboot", help="restart a machine from inside")
    again.add_argument("name")
    login = commands.add_parser("ssh", help="log in, or run a command")
    login.add_argument("name")
    login.add_argument("words", nargs=argparse.REMAINDER)
    commands.add_parser("clean", help="end all machines and remove the cache")
    options = parser.parse_args(arguments)
    try:
        if options.command == "build":
            bed.build()
        elif options.command == "up":
            print(json.dumps(machine.up(options.name, options.memory_mib, options.snapshot), indent=2))
        elif options.command == "snapshot":
            machine.snapshot(options.name, options.label)
        elif options.command == "reboot":
            machine.reboot(options.name)
        elif options.command == "ssh":
            os.execvp("ssh", ["ssh", "-F", str(machine.SSH_CONFIG), options.name, *options.words])
        else:
            machine.down(options.names if options.command == "down" and not options.all else machine.all_names())
            if options.command == "clean":
                bed.clean()
    except SimError as error:
        say(f"sim: error: {error}")
        return 1
    except KeyboardInterrupt:
        say("sim: interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
