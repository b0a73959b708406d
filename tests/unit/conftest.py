"""What holds for all unit tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# An example that takes long says that the machine is busy, and nothing about the code.
settings.register_profile("reap", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("reap")
