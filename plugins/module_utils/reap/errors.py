"""The error every part raises for input a person can correct."""

from __future__ import annotations


class ReapError(Exception):
    """What is wrong, in one line: what was found, what was wanted, what to do.

    Printed as it is by the command line (exit 2) and handed to ``fail_json`` by the modules, which add the host.
    """
