"""The pinned base image: is it on the host, and if not, bring it from the first source that has it.

Identity is the repo digest or the image ID. An engine with the overlay2 store shows the config's digest as ID, one with
the containerd store the manifest's, so either of the two pinned values may be either of the two found ones.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ReapError
from ..fetch.progress import Progress, write_json
from .engine import Engine, EngineError, auth_header
from .labels import LABEL_CUTLASS, LABEL_CUTLASS_ON, LABEL_PATCHES, WORK, labels_of, tags_of

KEEP_REPOSITORY, CUTLASS_REPOSITORY = "reap-base", "reap-base-cutlass"
# A pull that brought nothing new is tried again this often; one that got further starts counting anew.
ATTEMPTS = 3
GB = 1e9
CONTAINERD_ROOT = "/var/lib/containerd"


@dataclass(frozen=True)
class Spec:
    """What the base image must be and where it may come from.

    Attributes:
        repository: name without tag or digest, such as ``ghcr.io/owner/image``.
        digest: manifest digest, ``sha256:`` and 64 hex digits.
        id: config digest, or empty.
        override: full reference of another image to test; replaces identity, and is never validated.
        archive: path or URL of a `docker save` archive; archive_sha256 its checksum.
        cutlass_base: ID or reference of an image on the host to put the cutlass layer on.
        cutlass_package: what pip installs there.
        free_bytes: what a pull or load needs at the engine's root, packed and unpacked layers together.
        state: file that remembers what this recipe brought to the host.
    """

    repository: str
    digest: str
    id: str = ""
    override: str = ""
    archive: str = ""
    archive_sha256: str = ""
    cutlass_base: str = ""
    cutlass_package: str = ""
    free_bytes: int = 0
    state: str = "/var/lib/reap/images.json"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Spec:
        """From a configuration's JSON.

        Raises:
            ReapError: an unknown or malformed value.
        """
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ReapError(f"unknown image settings {sorted(unknown)}")
        spec = cls(**{key: value for key, value in values.items() if value is not None})
        for name in ("digest", "id"):
            value = getattr(spec, name)
            if (value or name == "digest") and not is_sha256(value):
                raise ReapError(f"image {name} is {value!r}, wanted sha256: and 64 hex digits")
        if spec.archive and not is_sha256(f"sha256:{spec.archive_sha256.removeprefix('sha256:')}"):
            raise ReapError(f"archive {spec.archive} needs its sha256 (64 hex digits); got {spec.archive_sha256!r}")
        return spec

    @property
    def pinned(self) -> str:
        return f"{self.repository}@{self.digest}"

    @property
    def kept_name(self) -> tuple[str, str]:
        """Repository and tag by which the pinned image is kept."""
        return KEEP_REPOSITORY, self.digest.partition(":")[2][:12]

    @property
    def cutlass(self) -> str:
        """What the cutlass layer is, in words that name its base as the setting does."""
        return f"{self.cutlass_package} on {self.cutlass_base}"


def is_sha256(value: str) -> bool:
    """Whether a text is ``sha256:`` and 64 lower-case hex digits."""
    head, _, tail = value.partition(":")
    return head == "sha256" and len(tail) == 64 and set(tail) <= set("0123456789abcdef")


@dataclass(frozen=True)
class Found:
    """A base image on the host.

    Attributes:
        id: the engine's ID of it.
        matched: by what it was known.
        source: disk, registry, archive or build.
        validated: one of the two pinned identities matched.
        reference: what it is: the pinned name and digest, another image's name, an archive's checksum, or the layer.
    """

    id: str
    matched: str
    source: str
    validated: bool
    reference: str

    def record(self) -> dict[str, Any]:
        return asdict(self)


def _state(spec: Spec) -> dict[str, Any]:
    try:
        state = json.loads(Path(spec.state).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        state = {}
    return state if isinstance(state, dict) else {}


def _remember(spec: Spec, **values: Any) -> None:
    path = Path(spec.state)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = _state(spec)
    for key, value in values.items():
        entries = state.setdefault(key, {})
        entries.update(value)
    write_json(path, state)


def locate(engine: Engine, spec: Spec) -> Found | None:
    """The image on the host that has the right identity, None where there is none. Changes nothing."""
    if spec.override:
        image = engine.image(spec.override)
        return Found(image["Id"], f"reference {spec.override}", "disk", False, spec.override) if image else None
    for name, matched in (
        (spec.pinned, "repo digest"),
        (spec.digest, "repo digest as image ID"),
        (spec.id, "image ID"),
    ):
        image = engine.image(name) if name else None
        # A name may be a prefix or a tag of something else; the identity itself has to be there.
        if image and (image["Id"] in (spec.digest, spec.id) or _has_digest(image, spec.digest)):
            return Found(image["Id"], matched, "disk", True, spec.pinned)
    entries = engine.call("GET", "/images/json") or []
    for entry in entries:
        if _has_digest(entry, spec.digest):
            return Found(entry["Id"], "repo digest under another name", "disk", True, spec.pinned)
    loaded = _state(spec).get("archives", {}).get(_archive_sum(spec))
    if loaded and engine.image(loaded):
        return _from_archive(spec, loaded, "disk")
    return _cutlass_layer(engine, spec, entries) if spec.cutlass_base else None


def _archive_sum(spec: Spec) -> str:
    return spec.archive_sha256.removeprefix("sha256:")


def _from_archive(spec: Spec, image: str, source: str) -> Found:
    """An image that its archive's checksum alone speaks for: what was meant, but not known to be the pinned one."""
    return Found(image, "archive sha256", source, False, f"archive sha256:{_archive_sum(spec)}")


def _cutlass_layer(engine: Engine, spec: Spec, entries: list[dict[str, Any]]) -> Found | None:
    base = engine.image(spec.cutlass_base)
    for entry in sorted(entries, key=lambda one: int(one.get("Created") or 0), reverse=True):
        labels = labels_of(entry)
        # A patched image inherits the labels of the layer that it was made of, and is no base.
        if labels.get(LABEL_CUTLASS) != spec.cutlass or LABEL_PATCHES in labels:
            continue
        # Where the base is gone the layer built on it is all there is; where it changed, the layer is another one.
        if base is None or labels.get(LABEL_CUTLASS_ON) == base["Id"]:
            return Found(entry["Id"], "cutlass layer built here", "disk", False, spec.cutlass)
    return None


def _has_digest(image: Mapping[str, Any], digest: str) -> bool:
    return any(name.rpartition("@")[2] == digest for name in image.get("RepoDigests") or [])


def store_root(info: Mapping[str, Any]) -> str:
    """The folder that holds an engine's images, from its ``/info``.

    The containerd image store, which a new Docker 29 uses, is containerd's own folder; only a containerd that the
    engine started itself lies below the engine's.
    """
    root = str(info.get("DockerRootDir") or "/var/lib/docker")
    by_containerd = ["driver-type", "io.containerd.snapshotter.v1"] in (info.get("DriverStatus") or [])
    address = str((info.get("Containerd") or {}).get("Address", ""))
    return CONTAINERD_ROOT if by_containerd and address.startswith("/run/containerd/") else root


def free_bytes(engine: Engine) -> tuple[str, int]:
    """Where the engine keeps its images, and the bytes free there."""
    root = store_root(engine.call("GET", "/info"))
    place = Path(root)
    while not place.exists():
        place = place.parent
    numbers = os.statvfs(place)
    return root, numbers.f_bavail * numbers.f_frsize


def _check_space(engine: Engine, needed: int, what: str) -> None:
    root, free = free_bytes(engine)
    if free < needed:
        raise ReapError(
            f"{root} has {free / GB:.1f} GB free, {what} needs {needed / GB:.1f} GB packed and unpacked: "
            "free space there or move the engine's data root; nothing was brought"
        )


def ensure(engine: Engine, spec: Spec, progress: Progress, secrets: Mapping[str, str]) -> tuple[Found, bool]:
    """Bring the base image to the host.

    Args:
        secrets: REAP_REGISTRY_USER and REAP_REGISTRY_PASSWORD, used for the pull and kept nowhere.

    Returns:
        The image, and whether anything was changed.

    Raises:
        ReapError: no source has it; the text names each and what it said. Images and names are as they were.
    """
    found = locate(engine, spec)
    if found:
        return found, False
    refusals = []
    sources: list[tuple[str, Callable[[], Found]]] = [
        ("registry", lambda: _pull(engine, spec, progress, secrets)),
    ]
    if spec.archive:
        sources.append(("archive", lambda: _load(engine, spec, progress)))
    if spec.cutlass_base:
        sources.append(("build", lambda: _build_cutlass(engine, spec, progress)))
    for name, bring in sources:
        progress.update(source=name)
        try:
            found = bring()
        except ReapError as error:
            refusals.append(f"{name}: {error}")
            continue
        _remember(spec, bases={found.id: {"source": found.source, "reference": spec.override or spec.pinned}})
        return found, True
    raise ReapError("; ".join(refusals))


# Pull


def _pull(engine: Engine, spec: Spec, progress: Progress, secrets: Mapping[str, str]) -> Found:
    _check_space(engine, spec.free_bytes, "the image")
    reference = spec.override or spec.pinned
    registry = reference.split("/", 1)[0]
    headers = {}
    if secrets.get("REAP_REGISTRY_USER") and secrets.get("REAP_REGISTRY_PASSWORD"):
        headers = auth_header(registry, secrets["REAP_REGISTRY_USER"], secrets["REAP_REGISTRY_PASSWORD"])
    best, left = (0, 0), ATTEMPTS
    # One for all tries: a layer that is there from an earlier one counts.
    layers = _Layers(progress)
    while True:
        try:
            for line in engine.lines(
                "POST", "/images/create", query=_pull_query(reference), headers=headers, timeout=600
            ):
                if "error" in line:
                    raise EngineError(str(line["error"]))
                layers.take(line)
            break
        except (EngineError, OSError, ValueError) as error:
            message = str(error)
            if _final(message):
                raise ReapError(_explain(message, reference, registry)) from error
            reached = (len(layers.finished), layers.done)
            left = ATTEMPTS if reached > best else left - 1
            best = max(best, reached)
            if left <= 0:
                raise ReapError(_explain(message, reference, registry)) from error
            progress.update(detail=f"broke off ({message[:80]}), goes on in a moment")
            time.sleep(2.0 * (ATTEMPTS - left))
    found = locate(engine, spec)
    if found is None:
        raise ReapError(f"{reference} was pulled, but the engine shows no image with that identity")
    if not spec.override:
        # Without a name of its own it would look like a leftover to whoever tidies up.
        engine.tag(found.id, *spec.kept_name)
    return replace(found, source="registry")


def _pull_query(reference: str) -> dict[str, str]:
    name, at, digest = reference.partition("@")
    if at:
        return {"fromImage": name, "tag": digest}
    last = name.rpartition("/")[2]
    if ":" in last:
        return {"fromImage": name.rpartition(":")[0], "tag": last.partition(":")[2]}
    return {"fromImage": name, "tag": "latest"}


class _Layers:
    """Bytes of a pull out of the engine's stream of {id, status, progressDetail}."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.current: dict[str, int] = {}
        self.total: dict[str, int] = {}
        self.finished: set[str] = set()
        self.done = 0

    def take(self, line: Mapping[str, Any]) -> None:
        layer, status, detail = str(line.get("id", "")), str(line.get("status", "")), line.get("progressDetail") or {}
        if status == "Downloading":
            self.current[layer] = int(detail.get("current") or 0)
            self.total[layer] = max(int(detail.get("total") or 0), self.current[layer])
        elif status in ("Download complete", "Pull complete", "Verifying Checksum", "Extracting", "Already exists"):
            self.finished.add(layer)
            self.current[layer] = self.total.get(layer, self.current.get(layer, 0))
        self.done = sum(self.current.values())
        self.progress.update(self.done, total=sum(self.total.values()) or None, detail=status)


def _final(message: str) -> bool:
    words = (
        "manifest unknown",
        "not found",
        "denied",
        "unauthorized",
        "no basic auth",
        "invalid reference",
        "no space left",
    )
    return any(word in message.lower() for word in words)


def _explain(message: str, reference: str, registry: str) -> str:
    low = message.lower()
    if "manifest unknown" in low or "not found" in low:
        return f"{registry} has no {reference} ({message}): check the repository and the digest"
    if "denied" in low or "unauthorized" in low or "no basic auth" in low:
        return (
            f"{registry} refuses {reference} ({message}): set REAP_REGISTRY_USER and REAP_REGISTRY_PASSWORD, "
            "or give runtime_image_archive"
        )
    if "no space left" in low:
        return (
            f"the disk filled up while pulling {reference} ({message}): free space, run again; finished layers are kept"
        )
    return f"{registry} does not answer for {reference} ({message}): start the registry or mend the network, run again"


# Saved archive

# What the engine says of each name, or of an image without one.
_LOADED = re.compile(r"Loaded image(?: ID)?: (\S+)")


def _load(engine: Engine, spec: Spec, progress: Progress) -> Found:
    wanted = _archive_sum(spec)
    path, temporary = Path(spec.archive), None
    if spec.archive.startswith(("http://", "https://")):
        temporary = path = Path(spec.state).parent / f"image-{wanted[:12]}.tar.partial"
        # Before an hour of download, and not after it.
        _check_space(engine, spec.free_bytes, "the archive's image")
        _download(spec.archive, path, progress)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ReapError(f"archive {path}: {error.strerror}") from error
    _check_space(engine, max(spec.free_bytes, size), "the archive")
    progress.update(0, total=size, detail="checking the archive")
    if (got := _sha256(path, progress)) != wanted:
        if temporary:
            temporary.unlink(missing_ok=True)
        raise ReapError(f"archive {spec.archive} has sha256 {got}, wanted {wanted}: fetch it again; nothing was loaded")
    before = engine.call("GET", "/images/json") or []
    brought: list[str] = []
    progress.update(detail="loading the archive")
    with path.open("rb") as archive:
        for line in engine.lines("POST", "/images/load", query={"quiet": 1}, body=archive, timeout=None):
            if "error" in line:
                raise EngineError(f"archive {path} cannot be loaded: {line['error']}")
            brought += _LOADED.findall(str(line.get("stream", "")))
    if temporary:
        temporary.unlink(missing_ok=True)
    # Only what the archive held: others may pull and build meanwhile.
    held = {name: image["Id"] for name in brought if (image := engine.image(name))}
    new = sorted(set(held.values()) - {entry["Id"] for entry in before})
    found = locate(engine, spec)
    if found is None and not spec.override and not spec.id and len(new) == 1:
        # A saved image has lost its repo digest, and no image ID is pinned: the checked archive is what speaks for it.
        found = _from_archive(spec, new[0], "archive")
        _remember(spec, archives={wanted: found.id})
    if found and not spec.override:
        engine.tag(found.id, *spec.kept_name)
    _restore_names(engine, before, held, spec.override)
    left = [image for image in new if not (found and image == found.id) and not _gone(engine, image)]
    if found is None:
        fate = f"{', '.join(left)} stays on the host, because something uses it" if left else "it was unloaded"
        raise ReapError(
            f"archive {spec.archive} holds {', '.join(new) or 'nothing new'}, wanted "
            f"{spec.override or spec.id or spec.digest}: {fate}"
        )
    return replace(found, source="archive")


def _restore_names(engine: Engine, before: list[dict[str, Any]], held: Mapping[str, str], wanted: str) -> None:
    """Take back the names that an archive brought or moved; they are its maker's, and would keep images for ever.

    Args:
        held: what the engine said it loaded, names and IDs, and the ID of each.
    """
    had = {name: entry["Id"] for entry in before for name in tags_of(entry)}
    for name, image in held.items():
        if name == image:
            continue
        if name not in had and name != wanted:
            engine.remove_image(name)
        elif had.get(name, image) != image:
            repository, _, tag = name.rpartition(":")
            engine.tag(had[name], repository, tag)


def _gone(engine: Engine, image: str) -> bool:
    """Remove an image by its ID; whether it is gone."""
    return engine.remove_image(image) or engine.image(image) is None


def _sha256(path: Path, progress: Progress | None = None) -> str:
    total, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
            done += len(chunk)
            if progress:
                progress.update(done)
    return total.hexdigest()


def _download(url: str, path: Path, progress: Progress) -> None:
    """Fetch a file, going on where an earlier try stopped, as long as each try brings something."""
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = _size(path)
        try:
            _download_rest(url, path, progress)
            return
        except (OSError, http.client.HTTPException) as error:
            failures = 1 if _size(path) > before else failures + 1
            final = isinstance(error, urllib.error.HTTPError) or getattr(error, "errno", None) == errno.ENOSPC
            if final or failures >= ATTEMPTS:
                raise ReapError(
                    f"archive {url} cannot be fetched: {error}; what came is kept and the next run goes on"
                ) from error
            progress.update(detail=f"broke off ({str(error)[:80]}), goes on in a moment")
            time.sleep(2.0 * failures)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _download_rest(url: str, path: Path, progress: Progress) -> None:
    have = _size(path)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # all of it is here; the checksum says whether it is right
        raise
    with answer:
        resumed = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        have = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with path.open("ab" if resumed else "wb") as file:
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                have += len(chunk)
                progress.update(have, total=total, detail="downloading the archive")
    # A connection that is closed early looks like an end.
    if total is not None and have < total:
        raise ConnectionError(f"the connection ended after {have} of {total} bytes")


# The cutlass layer


def _build_cutlass(engine: Engine, spec: Spec, progress: Progress) -> Found:
    base = engine.image(spec.cutlass_base)
    if base is None:
        raise ReapError(f"the base for the cutlass layer, {spec.cutlass_base}, is not on the host")
    _check_space(engine, 2_000_000_000, "the cutlass layer")
    progress.update(detail=f"installing {spec.cutlass_package}")
    pip, package = ["python3", "-m", "pip", "install"], spec.cutlass_package
    name = f"{WORK}-cutlass"
    engine.remove_container(name)
    worker = engine.create(
        base["Id"],
        # As a variable, because an older pip does not know the option, and not in Env, which would be committed.
        {"Entrypoint": ["env", "PIP_BREAK_SYSTEM_PACKAGES=1"], "Cmd": [*pip, "--no-cache-dir", "-U", package]},
        name=name,
    )
    try:
        status, output = engine.run(worker, timeout=1800)
        if status != 0:
            raise ReapError(f"{package} cannot be installed on {spec.cutlass_base}: {output.strip()[-300:]}")
        config = base.get("Config") or {}
        changes = [
            f"LABEL {LABEL_CUTLASS}={json.dumps(spec.cutlass)}",
            f"LABEL {LABEL_CUTLASS_ON}={json.dumps(base['Id'])}",
            f"ENTRYPOINT {json.dumps(config.get('Entrypoint') or [])}",
            f"CMD {json.dumps(config.get('Cmd') or [])}",
        ]
        built = engine.call(
            "POST",
            "/commit",
            query={
                "container": worker,
                "repo": CUTLASS_REPOSITORY,
                "tag": str(base["Id"]).partition(":")[2][:12],
                "changes": "\n".join(changes),
            },
            body={},
            timeout=1800,
        )["Id"]
    finally:
        engine.remove_container(worker)
    return Found(str(built), "cutlass layer built here", "build", False, spec.cutlass)


# Tidying up


def prune(engine: Engine, spec: Spec, keep: set[str]) -> list[str]:
    """Remove base images that this recipe brought and that nothing needs any more.

    Only the names are removed that the recipe gave or pulled by; an image that somebody else named as well stays.

    Args:
        keep: IDs that stay: the current base, and the bases of the patched images that are kept.

    Returns:
        References that are gone.
    """
    state = _state(spec)
    bases: dict[str, Any] = state.get("bases", {})
    gone = []
    for identity in [one for one in bases if one not in keep]:
        reference = str(bases[identity].get("reference", ""))
        image = engine.image(identity)
        filters = json.dumps({"ancestor": [identity]})
        if image and engine.call("GET", "/containers/json", query={"all": 1, "filters": filters}):
            continue
        own = [
            name for name in tags_of(image or {}) if name.startswith((f"{KEEP_REPOSITORY}:", f"{CUTLASS_REPOSITORY}:"))
        ]
        for name in [*own, *([reference] if image else [])]:
            if engine.remove_image(name):
                gone.append(name)
        rest = engine.image(identity)
        # One whose name went to its successor has none that could be removed.
        if rest and not tags_of(rest) and not rest.get("RepoDigests") and engine.remove_image(identity):
            gone.append(identity)
        del bases[identity]
    if gone or bases != _state(spec).get("bases", {}):
        write_json(Path(spec.state), state)
    return gone
