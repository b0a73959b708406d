"""The start gate: may this load begin now. Runs on the host at every start, with no controller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ReapError
from ..sizes import gib
from .advice import advised_fit
from .host import HostMemory, remember
from .table import ledger_table
from .types import Fit, FitRequest


@dataclass(frozen=True, slots=True)
class Gate:
    """The gate's answer.

    Attributes:
        allowed: Whether the load may begin.
        message: Why, in one line.
        text: The ledger and the message, for the journal.
        fit: The judgement behind it.
    """

    allowed: bool
    message: str
    text: str
    fit: Fit


def start_gate(
    config: Mapping[str, Any], host: HostMemory | None = None, *, hold_until_available_kb: int | None = None
) -> Gate:
    """Judge a start by what is available now.

    Drop the page cache before calling it: MemAvailable counts it as free, CUDA on GB10 does not get it back by itself.
    A start that may go ahead leaves behind what the host uses without a model (see reap.memory.host.remember), so that
    a preflight while the model is loaded can judge on it.

    Args:
        config: The object "fit" of the service's configuration; keys of FitRequest.
        host: What the host has; read from it when None.
        hold_until_available_kb: What the watchdog wants to see available after a kill before anything starts again, kB;
            None: no hold.

    Raises:
        ReapError: Bad configuration, a damaged checkpoint, or a host whose memory cannot be read.
    """
    request = FitRequest.from_mapping(config)
    given = host is not None
    if host is None:
        host = HostMemory.read()
    fit = advised_fit(request, host, "start")
    allowed, message = fit.fits, fit.message
    available = host.available or 0
    if allowed and hold_until_available_kb is not None and available < hold_until_available_kb * 1024:
        allowed = False
        message = (
            f"refuse: the watchdog stopped the model and holds every start until {gib(hold_until_available_kb * 1024)}"
            " are available again;"
            f" MemAvailable is {gib(available)}"
        )
    if not allowed and not request.enforce:
        allowed, message = True, f"not enforced, so the start goes ahead: {message}"
    if allowed and fit.fits and not given:
        try:
            remember(Path(request.host_memory_file), host)
        except ReapError:
            # Only a later preflight's estimate suffers; that is no reason not to serve.
            message += f" (could not write {request.host_memory_file})"
    table = ledger_table(fit.to_dict(), advice=not allowed or fit.verdict != "fits")
    text = table if message == fit.message else f"{table}{message}\n"
    return Gate(allowed, message, text, fit)
