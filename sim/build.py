"""The cached parts: images of hosts and services, the runtime image in the registry, the models on the hub."""

from __future__ import annotations

from sim import images, services
from sim.common import SimError

PARTS = ("hosts", "services")


def build(parts: list[str]) -> None:
    """Makes the named parts (all, where none is named) that are missing or out of date."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise SimError(f"build does not know {', '.join(unknown)}: it knows {', '.join(PARTS)}")
    wanted = parts or list(PARTS)
    with services.lease() as engine:
        if "hosts" in wanted:
            for kind in ("host-preinstalled", "host-absent"):
                images.ensure(engine, kind)
