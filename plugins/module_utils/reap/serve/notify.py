"""What sd_notify(3) says to systemd; nothing where no systemd listens."""

from __future__ import annotations

import os
import socket
import time

_SEND_TIMEOUT_S = 5.0


class Notifier:
    """Sends lines such as READY=1 to the socket that systemd named."""

    def __init__(self, address: str | None = None) -> None:
        # Taken out of the environment: the container's client must not speak for this process.
        self._address = address if address is not None else os.environ.pop("NOTIFY_SOCKET", None)
        self._status = ""
        self._extended_to = 0.0

    @property
    def listens(self) -> bool:
        """Whether systemd started this process and wants to hear of it."""
        return bool(self._address)

    def send(self, *lines: str) -> None:
        """Send lines in one datagram; a socket that is gone is no reason to fail."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                # A service manager that is itself stuck must not take this process with it.
                channel.settimeout(_SEND_TIMEOUT_S)
                channel.sendto("\n".join(lines).encode(), address)
        except OSError:
            return

    def status(self, text: str) -> None:
        """The line that ``systemctl status`` shows."""
        if text != self._status:
            self._status = text
            self.send("STATUS=" + text.replace("\n", " "))

    def extend(self, seconds: int) -> None:
        """Ask for that much more time for the start or stop under way, again only after a sixth of it has gone."""
        now = time.monotonic()
        if now + seconds < self._extended_to + seconds / 6:
            return
        self._extended_to = now + seconds
        self.send(f"EXTEND_TIMEOUT_USEC={seconds * 1_000_000}")
