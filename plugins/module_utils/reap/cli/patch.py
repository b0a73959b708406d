"""`reap patch check|apply|selftest`."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from ..errors import ReapError

HELP = "check or apply the vLLM patches in a site-packages folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument(
        "action",
        choices=["check", "apply", "selftest"],
        help="check changes nothing; apply changes all or nothing; selftest runs the patched router of this Python",
    )
    parser.add_argument(
        "--site-packages", metavar="DIR", help="folder that holds vllm, or `auto` for the one this Python would import"
    )
    parser.add_argument("--router", default="torch", help="router replacement: torch (default) or padded")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--report", metavar="FILE", help="write the JSON there as well")


def find_site_packages() -> Path:
    """The folder from which this Python would import vllm, without importing it.

    Raises:
        ReapError: it would import none.
    """
    found = importlib.util.find_spec("vllm")
    places = list(found.submodule_search_locations or []) if found is not None else []
    if not places:
        raise ReapError(
            "this Python has no vllm: use an image that has it, or give --site-packages the folder that does"
        )
    return Path(places[0]).parent


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 all good, 1 something failed and nothing was changed, 2 wrong use."""
    if args.action == "selftest":
        from ..patches import selftest

        outcome = selftest.run()
        _print(args, outcome, selftest.lines(outcome))
        return 0 if outcome["ok"] else 1

    from .. import patches

    if not args.site_packages:
        raise ReapError("--site-packages is missing: give the folder that holds vllm, or auto")
    folder = find_site_packages() if args.site_packages == "auto" else Path(args.site_packages)
    planned = patches.plan(patches.PATCHES, folder, args.router)
    failure = None
    if args.action == "apply" and planned.ok:
        try:
            patches.write(folder, planned.files)
        except ReapError as error:
            failure = str(error)
            for verdict in planned.verdicts:
                if verdict.changed:
                    verdict.state, verdict.reason, verdict.changed = "failed", failure, False
    if not planned.ok:
        for verdict in planned.verdicts:
            verdict.changed = False
    report = patches.report(folder, args.router, planned, planned.ok and bool(planned.files))
    lines = [f"{one['id']:<22} {one['state']:<14} {one['reason']}" for one in report["patches"]]
    if not planned.ok:
        lines.append("nothing was changed")
    _print(args, report, lines)
    return 0 if planned.ok else 1


def _print(args: argparse.Namespace, report: dict[str, Any], lines: list[str]) -> None:
    text = json.dumps(report, indent=2, sort_keys=True)
    if args.report:
        path = Path(args.report)
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(path)
    print(text if args.json else "\n".join(lines))
