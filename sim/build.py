"""The cached parts: images of hosts and services, the runtime image in the registry, the models on the hub."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sim import images, runtime_image, services
from sim.common import CACHE, FACTS, REPOSITORY, SimError, lock, read_json, run, stamp, step, update_facts
from sim.hub import sample
from sim.hub.repository import Repositories

PARTS = ("hosts", "runtime-image", "checkpoints")

# model on the hub: arguments of sim.checkpoint.build
CHECKPOINTS = {"sim/needle": ["--variant", "needle"], "sim/no-needle": ["--variant", "no-needle"]}


def build(parts: list[str]) -> None:
    """Makes the named parts (all, where none is named) that are missing or out of date."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise SimError(f"build does not know {', '.join(unknown)}: it knows {', '.join(PARTS)}")
    wanted = parts or list(PARTS)
    flags = processor_flags(Path("/proc/cpuinfo").read_text())
    update_facts(lambda facts: facts.update({"machine": {"kv_cache_dtype": kv_cache_dtype(flags)}}))
    with services.lease() as engine:
        if "hosts" in wanted:
            images.ensure(engine, "host-preinstalled")
        if "checkpoints" in wanted:
            checkpoints()
        if "runtime-image" in wanted:
            runtime_image.ensure(engine, services.url("registry"))


def processor_flags(cpuinfo: str) -> set[str]:
    """The features of the first processor in the text of /proc/cpuinfo."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return set(next((value for name, _, value in lines if name.strip() in ("flags", "Features")), "").split())


def kv_cache_dtype(flags: set[str]) -> str:
    """What the CPU build of vLLM can keep its KV cache in: fp8 wants AVX-512 or AMX, else it is the model's own type.

    The features are those that torch.cpu._is_avx512_supported and _is_amx_tile_supported look for.
    """
    return "fp8" if "amx_tile" in flags or flags >= {"avx512f", "avx512bw", "avx512dq", "avx512vl"} else "auto"


def checkpoints() -> None:
    """The models lie on the hub, and facts.json has their revisions."""
    content = stamp(sorted((REPOSITORY / "sim" / "checkpoint").glob("*.py")))
    with lock("checkpoints"):
        for model, arguments in CHECKPOINTS.items():
            folder = services.HUB_ROOT / model
            known = read_json(FACTS, {}).get("checkpoints", {}).get(model, {})
            if known.get("stamp") == content and folder.is_dir():
                continue
            with step(f"making the model {model}"):
                _publish(folder, arguments)
                with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                    f"{services.url('hub')}/api/models/{model}", timeout=30
                ) as answer:
                    revision = json.load(answer)["sha"]
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                _remember(model, {"revision": revision, "bytes": size, "stamp": content})


def _remember(model: str, fact: dict[str, Any]) -> None:
    update_facts(lambda facts: facts.setdefault("checkpoints", {}).update({model: fact}))


def publish(model: str, files: int, megabytes: int) -> str:
    """A model of random weights lies on the hub, another one at each call; returns its revision (facts.json has it)."""

    def write(made: Path) -> None:
        sample.write(made, shards=files, shard_bytes=megabytes << 20, seed=random.SystemRandom().getrandbits(64))

    folder = services.HUB_ROOT / model
    with lock("checkpoints"), step(f"making the model {model}"):
        _replace(folder, write)
        revision = Repositories(services.HUB_ROOT).revision(model, "main")
        assert revision is not None
        size = sum(file.size for file in revision.files.values())
        _remember(model, {"revision": revision.commit, "bytes": size})
    return revision.commit


def _publish(folder: Path, arguments: list[str]) -> None:
    _replace(
        folder,
        lambda made: run([sys.executable, "-m", "sim.checkpoint.build", "--out", made, *arguments], cwd=REPOSITORY),
    )


def _replace(folder: Path, make: Callable[[Path], object]) -> None:
    """Makes the model beside, then puts it in the place of the old one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="model-") as work:
        made = Path(work) / "made"
        make(made)
        if folder.exists():
            folder.rename(Path(work) / "old")
        made.rename(folder)
