"""Is this host the machine the profile is meant for? Pure judgement over facts that were read elsewhere.

Known Sparks (source: docs/hosts.md): ``uname -m`` aarch64, DMI product_name ``NVIDIA_DGX_Spark`` on NVIDIA's own and
other names on other makers' boards, ``/etc/dgx-release`` with DGX_NAME="DGX Spark", ``nvidia-smi`` name "NVIDIA GB10",
MemTotal 119.7 to 121.7 GiB.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

KIB_PER_GIB = 1024 * 1024


def parse_os_release(text: str) -> dict[str, str]:
    """Read ``KEY=value`` lines with optional quotes, as in os-release(5) and /etc/dgx-release."""
    pairs: dict[str, str] = {}
    for line in text.splitlines():
        key, found, value = line.strip().partition("=")
        if found and re.fullmatch(r"[A-Z][A-Z0-9_]*", key):
            pairs[key] = value.strip().strip("\"'")
    return pairs


def parse_meminfo(text: str) -> dict[str, int]:
    """Read /proc/meminfo into kB by name; lines without a number are left out."""
    values: dict[str, int] = {}
    for line in text.splitlines():
        match = re.match(r"(\S+):\s+(\d+)", line)
        if match:
            values[match[1]] = int(match[2])
    return values


def _as_list(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def host_problems(facts: Mapping[str, Any], expect: Mapping[str, Any]) -> list[str]:
    """One sentence per expectation that is not met; an empty or missing expectation is not checked.

    Args:
        facts: as module spark_facts returns them. Used here: architecture, product, dgx_name, gpu_names,
            mem_total_kb, os_id, os_version, root, init, port_taken, disks.
        expect: architecture (str), products (list of str: DMI product or DGX name, any one of them), gpu (str),
            mem_total_min_kb and mem_total_max_kb (int, kB), os (list of "id version"), port (int), and what
            disk_problems reads.

    Returns:
        Sentences that say what was found, what was wanted and what to do.
    """
    problems = []
    architecture = expect.get("architecture")
    if architecture and facts["architecture"] != architecture:
        problems.append(
            f"architecture is {facts['architecture']}, wanted {architecture}: this host is no DGX Spark; "
            "take it out of the inventory"
        )
    products = _as_list(expect.get("products"))
    found_names = [name for name in (facts.get("product"), facts.get("dgx_name")) if name]
    if products and not set(products) & set(found_names):
        problems.append(
            f"product is {' / '.join(found_names) or 'unknown'}, wanted one of {', '.join(products)}: "
            "for another maker's GB10 board add its DMI product name to spark_host_expect_products"
        )
    gpu = expect.get("gpu")
    if gpu and gpu not in facts["gpu_names"]:
        found = ", ".join(facts["gpu_names"]) or f"none ({facts.get('gpu_error') or 'nvidia-smi lists no GPU'})"
        problems.append(f"GPU is {found}, wanted {gpu}: check the driver with nvidia-smi")
    total = facts["mem_total_kb"]
    low, high = expect.get("mem_total_min_kb") or 0, expect.get("mem_total_max_kb") or 0
    if (low and total < low) or (high and total > high):
        problems.append(
            f"MemTotal is {total / KIB_PER_GIB:.1f} GiB, wanted {low / KIB_PER_GIB:.1f} to "
            f"{high / KIB_PER_GIB:.1f} GiB: check the BIOS display reserve, or whether this is the right host"
        )
    systems = _as_list(expect.get("os"))
    system = f"{facts['os_id']} {facts['os_version']}"
    if systems and system not in systems:
        problems.append(f"operating system is {system}, wanted one of {', '.join(systems)}: install DGX OS 7")
    if facts.get("port_taken"):
        problems.append(
            f"port {expect.get('port')} is in use by something else than reap.service: stop that, or choose another "
            "reap_port"
        )
    problems += disk_problems(facts.get("disks") or {}, expect)
    if facts.get("init") != "systemd":
        problems.append(f"process 1 is {facts.get('init')}, wanted systemd: the service and the watchdog are its units")
    if not facts.get("root"):
        problems.append(
            "the tasks do not run as root: give the login user sudo, and add -K if sudo asks for a password"
        )
    return problems


def disk_problems(disks: Mapping[str, Mapping[str, Any]], expect: Mapping[str, Any]) -> list[str]:
    """One sentence per filesystem that has no room for what is still to be downloaded to it.

    The two downloads run side by side, so where they share a filesystem each could find room for itself alone and both
    would end on a full disk.

    Args:
        disks: `model` and `image`: path, device (number of the filesystem), free and present (bytes; of a part too),
            whole (nothing is missing).
        expect: model_bytes and image_bytes (int, what each takes on the disk), reserve_bytes (int, stays free where the
            model goes).
    """
    needs: dict[Any, list[tuple[str, int, str]]] = {}
    for name, what, remedy in (
        ("model", "the model", "reap_models_dir"),
        ("image", "the runtime image, packed and unpacked,", "the engine's data-root"),
    ):
        disk = disks.get(name)
        missing = int(expect.get(f"{name}_bytes") or 0) - int(disk.get("present") or 0) if disk else 0
        if not disk or disk["whole"] or missing <= 0:
            continue
        parts = needs.setdefault(disk["device"], [])
        parts.append((f"{missing / 1e9:.1f} GB for {what} in {disk['path']}", missing, remedy))
        if name == "model" and (reserve := int(expect.get("reserve_bytes") or 0)):
            parts.append((f"{reserve / 1e9:.1f} GB that stay free", reserve, ""))
    problems = []
    for device, parts in needs.items():
        free = next(int(disk["free"]) for disk in disks.values() if disk and disk["device"] == device)
        wanted = sum(count for _, count, _ in parts)
        if free < wanted:
            others = " or ".join(remedy for _, _, remedy in parts if remedy)
            texts = " and ".join(text for text, _, _ in parts)
            problems.append(
                f"{free / 1e9:.1f} GB are free; wanted {wanted / 1e9:.1f} GB: {texts}: free space, or set {others} to "
                "another disk"
            )
    return problems
