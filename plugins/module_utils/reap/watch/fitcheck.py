"""Are the floors right for this profile on this host? Asked when settings are written, never while guarding."""

from __future__ import annotations

from ..memory import FitRequest, HostMemory, advised_fit
from .config import Settings
from .policy import KB_PER_GIB

# A DGX Spark that was falling was last heard of at this much available before it froze (9.9 to 2.4 GiB in 3 s).
SPARK_FROZE_BELOW_KB = int(2.4 * KB_PER_GIB)


def floor_problems(settings: Settings, host: HostMemory | None = None) -> list[str]:
    """One sentence for each floor that is too high for the profile or too low for the host; empty when all are right.

    Without a [fit] table nothing is known of profile or host, and nothing is asked.

    Raises:
        ReapError: The table is wrong, or memory_fit cannot judge.
    """
    if settings.fit is None:
        return []
    limits = settings.limits
    request = FitRequest.from_mapping({**settings.fit, "watchdog_min_available_kb": limits.floor_kb})
    if host is None:
        host = HostMemory.read()
    fit = advised_fit(request, host)
    name = request.profile or "this profile"
    problems = []
    if fit.headroom < 0:
        most_kb = (request.floor_bytes + fit.headroom) // 1024
        least = f"at most {most_kb} kB would leave room for it" if most_kb > 0 else "no floor leaves room for it here"
        problems.append(f"floor_kb is {limits.floor_kb}, more than {name} leaves free on this host; {least}")
    if request.engine == "gb10":
        needed_kb = limits.kill_line_kb
        if limits.hard_floor_kb < SPARK_FROZE_BELOW_KB:
            problems.append(
                f"hard_floor_kb is {limits.hard_floor_kb}, below what a Spark needs: they froze at about"
                f" {SPARK_FROZE_BELOW_KB} kB; wanted that or more"
            )
        # The floor of loading follows from the floor, so where both are too low only the cause is said.
        floors = {"floor_kb": limits.floor_kb, "loading_floor_kb": limits.loading_floor_kb}
        for key, found_kb in floors.items():
            if found_kb < needed_kb:
                problems.append(
                    f"{key} is {found_kb}, below what a kill needs: hard_floor_kb {limits.hard_floor_kb} and"
                    f" {limits.reserve_kb} kB for the fastest known fall while a kill runs; wanted at least {needed_kb}"
                )
                break
    return problems
