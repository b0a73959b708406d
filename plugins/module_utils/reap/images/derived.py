"""The patched image: the base plus the patched files, proven before it gets its name.

It is made with three containers. One applies the patches and is thrown away; one is never started, gets the changed
files and is committed, so that the image's configuration is exactly the base's; one runs the self-test on the result.
Only then is the result named. The same calls work with every engine's builder and image store.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ReapError
from ..fetch.progress import Progress
from .base import Found
from .engine import Engine
from .labels import (
    LABEL_BASE,
    LABEL_BASE_ID,
    LABEL_CANDIDATE,
    LABEL_MATCHED,
    LABEL_PATCHES,
    LABEL_ROUTER,
    LABEL_TESTED,
    LABEL_VALIDATED,
    WORK,
    WORK_STEPS,
    labels_of,
    tags_of,
)

REPOSITORY = "reap-runtime"
PROGRAM_IN_IMAGE = "/opt/reap/bin/reap"
REPORT_IN_IMAGE = "/opt/reap/patch-report.json"
APPLY_TIMEOUT_S = 600.0
SELFTEST_TIMEOUT_S = 900.0
# What the self-test takes while a model may be served: torch and vllm in memory (0.5 GiB measured on the CPU build),
# and with a GPU its context and vLLM's kernel libraries on top (estimated; on a Spark that is the same memory).
SELFTEST_KB = 1024 * 1024
SELFTEST_GPU_KB = 2 * 1024 * 1024
WATCHDOG_STATE = Path("/run/reap/watchdog.json")
SERVICE_FILE = Path("/etc/reap/service.json")
SERVICE_STATE = Path("/run/reap/service.json")


@dataclass(frozen=True)
class Build:
    """What to build.

    Attributes:
        name: of the result, repository and tag, as `reap.images.naming` makes it.
        patch_set: identity of the patches, 64 hex digits; the program that applies them must have the same.
        identity: of the base as the settings name it: its digest, or what stands for it. The result's name is made
            of it; what the result really is made of stands in its labels.
        router: router variant.
        python: interpreter inside the image, a name or a path.
        site_packages: folder inside the image, or `auto`.
        gpus: give the self-test all GPUs of the host.
        keep: how many older patched images stay, for a rollback.
        base_may_change: build again where another image stands behind the same reference than last time.
    """

    name: str
    patch_set: str
    identity: str
    router: str = "torch"
    python: str = "python3"
    site_packages: str = "auto"
    gpus: bool = False
    keep: int = 1
    base_may_change: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Build:
        """From a configuration's JSON.

        Raises:
            ReapError: an unknown value.
        """
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ReapError(f"unknown patch settings {sorted(unknown)}")
        missing = {"name", "patch_set", "identity"} - set(values)
        if missing:
            raise ReapError(f"patch settings {sorted(missing)} are missing")
        return cls(**values)

    def labels(self, base: Found) -> dict[str, str]:
        """Labels of a finished image."""
        return {
            LABEL_BASE: base.reference,
            LABEL_BASE_ID: base.id,
            LABEL_MATCHED: base.matched,
            LABEL_VALIDATED: "true" if base.validated else "false",
            LABEL_PATCHES: self.patch_set,
            LABEL_ROUTER: self.router,
            LABEL_TESTED: "passed",
        }


def current(engine: Engine, build: Build, base: Found) -> str | None:
    """ID of the finished image of this base and patch set, None where it is missing or made of another base."""
    image = engine.image(build.name)
    if image is None:
        return None
    labels, wanted = labels_of(image), build.labels(base)
    # By which of its names or identities the same image was found may differ from run to run.
    same = all(labels.get(key) == wanted[key] for key in wanted if key not in (LABEL_BASE, LABEL_MATCHED))
    return str(image["Id"]) if same else None


def refuse_changed_base(engine: Engine, build: Build, base: Found) -> None:
    """Stop where a name that can move now stands for another image than the one that was patched last.

    Raises:
        ReapError: with both IDs; nothing was changed.
    """
    if base.validated or build.base_may_change:
        return
    made = [entry for entry in _patched(engine) if labels_of(entry).get(LABEL_BASE) == base.reference]
    if not made:
        return
    before = labels_of(max(made, key=lambda one: int(one.get("Created") or 0))).get(LABEL_BASE_ID, "")
    if before != base.id:
        raise ReapError(
            f"the base image {base.reference} changed under the same name: it was {before} when it was patched and is "
            f"{base.id} now. The patched image that is there stays as it is. Name the image that is meant by its "
            "digest, or set vllm_patches_base_may_change to patch the new one"
        )


def _patched(engine: Engine, label: str = LABEL_PATCHES) -> list[dict[str, Any]]:
    return engine.call("GET", "/images/json", query={"filters": json.dumps({"label": [label]})}) or []


def ensure(engine: Engine, build: Build, base: Found, program: Path, progress: Progress) -> tuple[dict[str, Any], bool]:
    """Make the patched image unless it is there.

    Args:
        program: the reap program (a zipapp); it goes into the image as well.

    Returns:
        {image, id, report}, and whether anything was built or pruned. `report` is None where nothing was built.

    Raises:
        ReapError: a patch or the self-test failed; no name was moved, so what was served stays.
    """
    found = current(engine, build, base)
    if found:
        return {"image": build.name, "id": found, "report": None, "pruned": []}, False
    refuse_changed_base(engine, build, base)
    if LABEL_PATCHES in labels_of(engine.image(base.id) or {}):
        raise ReapError(
            f"the base image {base.reference} is a patched image already: set runtime_image_ref to the image that it "
            f"was made of, {labels_of(engine.image(base.id) or {}).get(LABEL_BASE)}"
        )
    check_memory(build, _read(Path("/proc/meminfo")), _read(WATCHDOG_STATE))
    sweep(engine)
    work: list[str] = []
    candidate = ""
    try:
        progress.update(0, total=3, detail="applying the patches")
        report, files = _apply(engine, build, base, program.read_bytes(), work)

        progress.update(1, detail="putting the image together")
        still = engine.create(base.id, name=f"{WORK}-image")
        work.append(still)
        engine.put(still, files)
        candidate = _commit(engine, still, {LABEL_CANDIDATE: build.name})

        progress.update(2, detail="running the router's self-test in the image")
        report["selftest"] = _selftest(engine, build, base, candidate, work)
        report["base"] = base.record()
        engine.put(still, _tar({REPORT_IN_IMAGE: (_json(report), 0o644)}))
        image = _commit(engine, still, build.labels(base))
        repository, _, tag = build.name.partition(":")
        engine.tag(image, repository, tag)
        progress.update(3)
    finally:
        for container in work:
            engine.remove_container(container)
        if candidate:
            engine.remove_image(candidate)
    pruned = prune(engine, build.name, build.keep, served_images())
    return {"image": build.name, "id": image, "report": report, "pruned": pruned}, True


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _tar(files: Mapping[str, tuple[bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, (data, mode) in files.items():
            member = tarfile.TarInfo(path.lstrip("/"))
            member.size, member.mode = len(data), mode
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _worker(engine: Engine, build: Build, image: str, command: list[str], work: list[str], gpus: bool) -> str:
    host: dict[str, Any] = {"NetworkMode": "none"}
    if gpus:
        host["DeviceRequests"] = [{"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}]
    container = engine.create(
        image,
        {
            "Entrypoint": [build.python],
            "Cmd": [PROGRAM_IN_IMAGE, "patch", *command],
            "User": "0",
            "WorkingDir": "/",
            # Bytecode of patched modules would be new files of no use.
            "Env": ["PYTHONDONTWRITEBYTECODE=1"],
            "HostConfig": host,
        },
        name=f"{WORK}-{command[0]}",
    )
    work.append(container)
    return container


def _run(engine: Engine, container: str, timeout: float, what: str) -> tuple[int, dict[str, Any], str]:
    try:
        status, output = engine.run(container, timeout)
    except TimeoutError as error:
        raise ReapError(f"{what} did not end within {timeout:.0f} s") from error
    # The image's own libraries may print before and after; the report is the one JSON object that starts a line.
    match = re.search(r"^\{\n.*?^\}$", output, re.MULTILINE | re.DOTALL)
    try:
        return status, json.loads(match[0]) if match else {}, output
    except ValueError:
        return status, {}, output


def _apply(engine: Engine, build: Build, base: Found, program: bytes, work: list[str]) -> tuple[dict[str, Any], bytes]:
    """Apply the patches in a container of the base; return the report and the changed files as an archive."""
    command = ["apply", "--json", "--router", build.router, "--site-packages", build.site_packages]
    container = _worker(engine, build, base.id, command, work, gpus=False)
    files: dict[str, tuple[bytes, int]] = {PROGRAM_IN_IMAGE: (program, 0o755)}
    engine.put(container, _tar(files))
    try:
        status, report, output = _run(engine, container, APPLY_TIMEOUT_S, "applying the patches")
    except ReapError as error:
        if "executable file not found" in str(error) or "no such file" in str(error):
            raise ReapError(
                f"the base image {base.reference} has no {build.python}: set vllm_patches_python to its Python"
            ) from error
        raise
    if report and report["patch_set"] != build.patch_set:
        raise ReapError(
            f"the program on the host has patch set {report['patch_set'][:12]}, wanted {build.patch_set[:12]}: "
            "run the role vllm_patches from its first step"
        )
    if status != 0 or not report:
        failed = [one for one in report.get("patches", []) if one["state"] == "failed"]
        said = "; ".join(f"{one['id']}: {one['reason']}" for one in failed) or output.strip()[-400:]
        raise ReapError(f"the patches do not fit the base image {base.reference}: {said}")
    members: list[tuple[tarfile.TarInfo, bytes]] = []
    for change in engine.call("GET", f"/containers/{container}/changes") or []:
        path = str(change["Path"])
        # Kind 2 is a deletion, of stale bytecode only; Python itself ignores what does not match its source.
        if change["Kind"] == 2 or not path.startswith(str(report["site_packages"]) + "/") or not path.endswith(".py"):
            continue
        member, data = engine.get(container, path)
        member.name = path.lstrip("/")
        members.append((member, data))
    if not members and report["changed"]:
        raise ReapError("the engine lists no changed file, though patches were applied")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data))
        for path, (data, mode) in files.items():
            member = tarfile.TarInfo(path.lstrip("/"))
            member.size, member.mode = len(data), mode
            archive.addfile(member, io.BytesIO(data))
    return report, buffer.getvalue()


def check_memory(build: Build, meminfo: str, watchdog: str) -> None:
    """Refuse a self-test that would push a host below its watchdog's floor and so stop the model that is served.

    Args:
        meminfo: /proc/meminfo.
        watchdog: the watchdog's state as JSON, empty where none runs.

    Raises:
        ReapError: too little is available above the floor.
    """
    try:
        floor = int(json.loads(watchdog).get("floor_kb") or 0)
    except (ValueError, AttributeError, TypeError):
        floor = 0
    match = re.search(r"^MemAvailable:\s+(\d+)", meminfo, re.MULTILINE)
    if not floor or not match:
        return
    needed = SELFTEST_KB + (SELFTEST_GPU_KB if build.gpus else 0)
    available = int(match[1])
    if available - needed < floor:
        raise ReapError(
            f"{available} kB are available and the self-test of a new image takes about {needed} kB, which would cross "
            f"the watchdog's floor of {floor} kB: stop the service for the build (playbooks/stop.yml), then run again"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _selftest(engine: Engine, build: Build, base: Found, candidate: str, work: list[str]) -> dict[str, Any]:
    container = _worker(engine, build, candidate, ["selftest", "--json"], work, gpus=build.gpus)
    status, outcome, output = _run(engine, container, SELFTEST_TIMEOUT_S, "the router's self-test")
    if status != 0 or not outcome.get("ok"):
        said = outcome.get("problem") or output.strip()[-400:]
        raise ReapError(f"the patched router failed its self-test in {base.reference}: {said}")
    if build.gpus and outcome.get("device") == "cpu":
        raise ReapError(
            f"the self-test in {base.reference} found no GPU, wanted one: its kernels were not tried. Look at "
            "nvidia-smi and at the container toolkit, or set vllm_patches_gpus to false where there is no GPU"
        )
    return outcome


def _commit(engine: Engine, container: str, labels: Mapping[str, str]) -> str:
    changes = "\n".join(f"LABEL {key}={json.dumps(value)}" for key, value in labels.items())
    query = {"container": container, "changes": changes or None, "comment": "patched by reap"}
    return str(engine.call("POST", "/commit", query=query, body={}, timeout=1800)["Id"])


def sweep(engine: Engine) -> list[str]:
    """Remove what a build that was killed left: containers by their names, images by their label.

    Returns:
        IDs of the images that are gone. Only for the one that holds the lock: a build that runs would lose its own.
    """
    for step in WORK_STEPS:
        engine.remove_container(f"{WORK}-{step}")
    return [entry["Id"] for entry in _patched(engine, LABEL_CANDIDATE) if engine.remove_image(entry["Id"])]


def served_images(service_file: Path = SERVICE_FILE, running: Path = SERVICE_STATE) -> set[str] | None:
    """Images that the service is to run, runs, or could go back to, by name; None where that cannot be known.

    A stopped service has no container that would hold its image.
    """
    files = [path for path in (service_file, running) if path.exists()]
    found: set[str] = set()
    try:
        if service_file.exists():
            state = json.loads(service_file.read_text(encoding="utf-8"))["state_dir"]
            files += sorted((Path(state) / "generations").glob("*.json"))
        for path in files:
            image = json.loads(path.read_text(encoding="utf-8")).get("image")
            found |= {image} if isinstance(image, str) else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found


def prune(engine: Engine, current: str = "", keep: int = 0, served: Collection[str] | None = ()) -> list[str]:
    """Remove patched images beyond the current one and `keep` older ones; what a container uses stays.

    Those in `served` stay as well and are not counted; None removes nothing.

    An image whose name went to its successor has none: no generation can go back to it, so it is not one that is kept,
    and it goes by its ID. Names that somebody else gave stay.

    Returns:
        Names and IDs that are gone. Without arguments every patched image goes that no container uses.
    """
    if served is None:
        return []
    older, nameless = [], []
    for entry in _patched(engine):
        tags = tags_of(entry)
        if {*tags, str(entry["Id"])} & set(served):
            continue
        own = [name for name in tags if name.startswith(f"{REPOSITORY}:") and name != current]
        older += [(int(entry["Created"]), name) for name in own]
        nameless += [] if tags else [str(entry["Id"])]
    gone = []
    for name in [*nameless, *(name for _, name in sorted(older, reverse=True)[keep:])]:
        if not _in_use(engine, name) and engine.remove_image(name):
            gone.append(name)
    return gone


def bases_in_use(engine: Engine) -> set[str]:
    """IDs of the bases of all patched images on the host."""
    return {labels_of(entry).get(LABEL_BASE_ID, "") for entry in _patched(engine)}


def _in_use(engine: Engine, name: str) -> bool:
    image = engine.image(name)
    filters = json.dumps({"ancestor": [name]})
    return image is None or bool(engine.call("GET", "/containers/json", query={"all": 1, "filters": filters}))
