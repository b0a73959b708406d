"""Entry point of ``python3 -m reap``; the zipapp on the host has the same two lines of its own."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
