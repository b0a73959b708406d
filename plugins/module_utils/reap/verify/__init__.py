"""Proof that an endpoint does what its profile says, kept as evidence.

`verify(settings)` asks, measures and judges; `reap verify` is the command round it.
"""

from __future__ import annotations

from .client import Client, CouldNotRun, Deadlines, Reply
from .runner import verify
from .settings import Settings

__all__ = ["Client", "CouldNotRun", "Deadlines", "Reply", "Settings", "verify"]
