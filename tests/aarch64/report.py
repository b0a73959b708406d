"""The result of `make test-aarch64` as a page."""

from __future__ import annotations

from typing import Any

KB_PER_GIB = 1024 * 1024


def table(result: dict[str, Any]) -> list[str]:
    """Stages, wall times and the load average at their ends."""
    lines = ["| stage | | s | load |", "|---|---|---:|---:|"]
    for stage in result["stages"]:
        word = "passed" if stage["passed"] else "FAILED"
        lines.append(f"| {stage['stage']} | {word} | {stage['seconds']:.0f} | {stage['load']:.1f} |")
    limit = f"the limit of a whole run after its build is {result['limit_s']} s"
    return [*lines, f"| in all; {limit} | {'passed' if result['passed'] else 'FAILED'} | {result['seconds']:.0f} | |"]


def page(result: dict[str, Any]) -> str:
    """Everything that was found, for a person."""
    versions = result["versions"]
    changed = versions["changed_since_commit"]
    lines = [
        "# An emulated aarch64 Spark",
        "",
        f"Written by `make test-aarch64`, begun {result['started']}; what is a double there: docs/aarch64.md. "
        "`result.json` has what each stage found.",
        "",
        f"- emulated on {versions['cores']} cores without KVM: {versions['emulator']}",
        f"- machines: {versions['machine_os']}, Linux {versions['machine_kernel']}",
        f"- controller: {versions['ansible']}, Python {versions['python']}, strategy {result['strategy']}",
        f"- commit {versions['commit']}" + (f", and changed since: {', '.join(changed)}" if changed else ", clean"),
        "",
        *table(result),
    ]
    found = {stage["key"]: stage.get("found", {}) for stage in result["stages"]}
    for key, write in (
        ("memory", _memory),
        ("site", _site),
        ("watchdog", _watchdog),
        ("stop", _stop),
        ("reboot", _reboot),
    ):
        if found.get(key):
            lines += ["", *write(found[key])]
    errors = [stage["error"] for stage in result["stages"] if stage.get("error")]
    for error in errors:
        lines += ["", "```", error, "```"]
    return "\n".join(lines) + "\n"


def gib(kb: int) -> str:
    return f"{kb / KB_PER_GIB:.2f}"


def _memory(found: dict[str, Any]) -> list[str]:
    lines = ["## memory_fit", "", "| host | known of Sparks | verdict |", "|---|---|---|"]
    for name, cases in found.items():
        if name != "recap":
            lines += [f"| {name} | {case['known']} | {case['message']} |" for case in cases]
    return lines


def _site(found: dict[str, Any]) -> list[str]:
    changed = ", ".join(f"{name} {counts['changed']}" for name, counts in found["recap"].items())
    return [
        "## site.yml for two hosts",
        "",
        f"Changed: {changed}. "
        f"The first was verified ({found['verdict']}, {len(found['tasks_passed'])} tasks, "
        f"{found['prompt_tokens']} tokens of prompt). The other was refused, and nothing was written there:",
        "",
        f"> {found['refused']}",
    ]


def _events(events: list[dict[str, Any]]) -> list[str]:
    # By the wall clock: the other one begins anew at a boot.
    first = events[0]["unix"]
    rows = [
        f"| {one['unix'] - first:.1f} | {one['event']} | {gib(one['mem_available_kb'])} | {one['reason']} |"
        for one in events
    ]
    return ["| s | event | MemAvailable, GiB | reason |", "|---:|---|---:|---|", *rows]


def _watchdog(found: dict[str, Any]) -> list[str]:
    return [
        "## The watchdog with the real floor",
        "",
        f"The double took memory in steps of GiB from {gib(found['mem_available_before_kb'])} GiB of MemAvailable: "
        f"{gib(found['fell_kb'])} GiB within {found['fell_within_s']:.0f} s before the kill, down to "
        f"{gib(found['mem_available_least_kb'])} GiB (readings of the watchdog, `watchdog.svg`).",
        "",
        *_events(found["events"]),
    ]


def _stop(found: dict[str, Any]) -> list[str]:
    return [
        "## A planned stop that goes below the floor",
        "",
        f"While it stopped, the double took memory down to {gib(found['mem_available_least_kb'])} GiB and was below "
        f"the floor for {found['below_floor_s']:.1f} s. It was no kill, and start.yml served again.",
        "",
        *_events(found["events"]),
    ]


def _reboot(found: dict[str, Any]) -> list[str]:
    return [
        "## A reboot",
        "",
        f"The machine answered {found['up_s']:.0f} s after the order to restart, and served {found['serving_s']:.0f} s "
        "after it. Both units were active, and the endpoint answered.",
        "",
        *_events(found["events"]),
    ]
