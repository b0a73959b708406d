"""``reap fit``: does a profile fit this host, and may a load begin now."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import ReapError
from ..memory import FitRequest, HostMemory, advised_fit, request_from_profile, start_gate
from ..memory.table import ledger_table
from ..safetensors import read_json
from ..sizes import to_bytes

HELP = "say before loading whether a model fits this host's memory"

_FIELDS = (
    ("--model-dir", "model_dir", "folder of the checkpoint on this host"),
    ("--routed-experts", "routed_experts", "K of a DeepSeek V4 Flash checkpoint that is not here"),
    ("--weights-bytes", "weights_bytes", "size of the weights where neither is known"),
    ("--kv-cache-memory", "kv_cache_memory", "KV cache, by vLLM's rule: 14G is 14 x 2^30 bytes"),
    ("--max-model-len", "max_model_len", "context in tokens"),
    ("--max-num-batched-tokens", "max_num_batched_tokens", "tokens of one step"),
    ("--max-num-seqs", "max_num_seqs", "sequences at once"),
    ("--floor-kb", "watchdog_min_available_kb", "the watchdog's floor, kB of MemAvailable"),
    ("--engine", "engine", "gb10 or cpu"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", metavar="FILE", help='the service\'s configuration; its object "fit" is judged')
    source.add_argument("--profile-json", metavar="FILE", help="one profile as JSON, as in group_vars/all/profiles.yml")
    for option, _, text in _FIELDS:
        parser.add_argument(option, help=text)
    parser.add_argument("--mtp", action="store_true", default=None, help="the drafter layer is loaded too")
    parser.add_argument(
        "--mem-total", metavar="SIZE", help="judge on this MemTotal instead of this host's (bytes, or 120G)"
    )
    parser.add_argument("--mem-available", metavar="SIZE", help="judge on this MemAvailable instead of this host's")
    parser.add_argument(
        "--gate",
        action="store_true",
        help="judge a start by what is available now, instead of whether the profile fits the host",
    )
    parser.add_argument("--no-enforce", action="store_true", help="say no, but exit 0")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Judge and print.

    Returns:
        0 fits or tight, 1 refused.

    Raises:
        ReapError: Wrong use, or something cannot be read.
    """
    values = _values(args)
    total = to_bytes(args.mem_total, "--mem-total") if args.mem_total is not None else None
    available = to_bytes(args.mem_available, "--mem-available") if args.mem_available is not None else None
    if args.gate:
        host = None if total is None and available is None else HostMemory.read(total=total, available=available)
        gate = start_gate(values, host)
        print(
            json.dumps({**gate.fit.to_dict(), "allowed": gate.allowed, "message": gate.message}, indent=2)
            if args.json
            else gate.text,
            end="\n" if args.json else "",
        )
        return 0 if gate.allowed else 1
    request = FitRequest.from_mapping(values)
    fit = advised_fit(
        request, HostMemory.read(remembered_file=Path(request.host_memory_file), total=total, available=available)
    )
    if args.json:
        print(json.dumps(fit.to_dict(), indent=2))
    else:
        print(ledger_table(fit.to_dict()), end="")
    return 0 if fit.fits or not request.enforce else 1


def _values(args: argparse.Namespace) -> dict[str, Any]:
    given = {key: getattr(args, option.lstrip("-").replace("-", "_")) for option, key, _ in _FIELDS}
    given["mtp"] = args.mtp
    given = {key: value for key, value in given.items() if value is not None}
    if args.no_enforce:
        given["enforce"] = False
    if args.config is not None:
        config = read_json(Path(args.config), 5_000_000)
        inner = config.get("fit") if isinstance(config, dict) else None
        if not isinstance(inner, dict):
            raise ReapError(f'{args.config} has no object "fit": it is no configuration of the service')
        return {**inner, **given}
    if args.profile_json is not None:
        profile = read_json(Path(args.profile_json), 5_000_000)
        if not isinstance(profile, dict):
            raise ReapError(f"{args.profile_json} holds no profile: an object is wanted")
        # Read once through the profile's own rule, then as any other request.
        request = request_from_profile(str(profile.get("name") or Path(args.profile_json).stem), profile, **given)
        return {key: getattr(request, key) for key in request.__dataclass_fields__}
    return given
