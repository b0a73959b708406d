"""The API key as nginx reads it: a variable that says whether a request carries it."""

from __future__ import annotations

from pathlib import Path

from .state import write_text


def key_include(key: str) -> str:
    """nginx's ``map`` from the Authorization header to ``$reap_key_good``, 1 or 0.

    A regular expression, because nginx compares texts without regard to case; written in hex, so that no letter of the
    key means anything to nginx or to the expression.
    """
    letters = "".join(f"\\x{ord(letter):02x}" for letter in key)
    return f"""\
# Written by reap serve --proxy-key. Secret: the API key in hex.
map $http_authorization $reap_key_good {{
    default 0;
    "~^(?i:bearer) {letters}\\z" 1;
}}
"""


def write_key(path: Path, key: str) -> bool:
    """Write the include for root alone; returns whether that changed anything."""
    text = key_include(key)
    try:
        if path.read_text(encoding="utf-8") == text and path.stat().st_mode & 0o777 == 0o600:
            return False
    except OSError:
        pass
    write_text(path, text, 0o600)
    return True
