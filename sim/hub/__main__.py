"""`python3 -m sim.hub --root DIR [--host H] [--port P] [--faults FILE] [--log FILE]`: serve until SIGTERM or SIGINT.

Prints its address on one line when it is ready. SIM_HUB_CONTROL_TOKEN in the environment protects /_control and opens
it to other machines. Exit 0 stopped, 1 cannot serve, 2 wrong use.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from .server import Hub


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server; return the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m sim.hub", description="A local Hugging Face hub.")
    parser.add_argument("--root", type=Path, required=True, help="folder with <org>/<name>/ or <org>/<name>@<tag>/")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=5080, help="port to listen on, 0 for a free one (default: 5080)")
    parser.add_argument("--faults", type=Path, help="JSON file of faults to play, read again when it changes")
    parser.add_argument("--log", type=Path, help="file to which the request log is appended as JSON lines")
    options = parser.parse_args(arguments)
    if not options.root.is_dir():
        print(f"--root {options.root}: no such folder; make it and put <org>/<name>/ into it", file=sys.stderr)
        return 1
    try:
        hub = Hub(
            options.root,
            options.host,
            options.port,
            options.faults,
            options.log,
            os.environ.get("SIM_HUB_CONTROL_TOKEN"),
        )
    except (OSError, OverflowError) as error:
        print(
            f"cannot listen on {options.host} port {options.port}: {error}; give another --host or --port",
            file=sys.stderr,
        )
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=hub.shutdown, daemon=True).start())
    print(hub.url, flush=True)
    with hub:
        hub.serve_forever(poll_interval=0.2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
