"""Sizes by vLLM's rule, and the memory ledger as a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

# On the controller Ansible does not put the configured module_utils on the import path; modules get it by themselves.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))
from reap import sizes
from reap.errors import ReapError
from reap.memory.table import ledger_table as reap_ledger_table

# Each filter is documented in the .yml file of its name beside this one: a file has room for one DOCUMENTATION only.


def _asked(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except ReapError as error:
        raise AnsibleFilterError(str(error)) from error


def to_bytes(value: Any) -> int:
    """See reap.sizes.to_bytes."""
    # Text of a variable is a subclass of str in newer releases of Ansible, with its origin attached; the rule wants the
    # plain text.
    return int(_asked(sizes.to_bytes, str(value) if isinstance(value, str) else value))


def human_bytes(value: Any) -> str:
    """See reap.sizes.human_bytes."""
    plain = int(value) if isinstance(value, int) and not isinstance(value, bool) else value
    return str(_asked(sizes.human_bytes, plain))


def gib(value: Any, digits: int = 2) -> str:
    """A size as GiB for a person; see reap.sizes.gib."""
    return sizes.gib(to_bytes(value), digits)


def ledger_table(fit: Mapping[str, Any], width: int = 100) -> str:
    """The ledger of memory_fit's result as text; see reap.memory.table.ledger_table."""
    return str(_asked(reap_ledger_table, dict(fit), width))


class FilterModule:
    """Names of the filters."""

    def filters(self) -> dict[str, Any]:
        return {"to_bytes": to_bytes, "human_bytes": human_bytes, "gib": gib, "ledger_table": ledger_table}
