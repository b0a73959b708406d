"""Writes images into an OCI registry over its HTTP API (OCI distribution specification 1.1), without an engine."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import tarfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from sim.common import SimError

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"

# Fast and nearly as small as the slower levels: each test host unpacks the image once.
GZIP_LEVEL = 3


class _Digesting:
    """A writer that passes bytes on and knows their sha256 and count."""

    def __init__(self, target: IO[bytes]) -> None:
        self._target = target
        self._sha256 = hashlib.sha256()
        self.count = 0

    def write(self, data: bytes) -> int:
        """Writes `data` through."""
        self._sha256.update(data)
        self.count += len(data)
        self._target.write(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back here."""

    def digest(self) -> str:
        """`sha256:<hex>` of what was written."""
        return "sha256:" + self._sha256.hexdigest()


@dataclass(frozen=True)
class Layer:
    """One layer. `path`, `digest` and `size` (bytes): the compressed archive. `diff_id`, `unpacked`: the plain one."""

    path: Path
    digest: str
    size: int
    diff_id: str
    unpacked: int

    @classmethod
    def from_tar(cls, tar: Path, target: Path) -> Layer:
        """A layer out of an archive that is there."""
        with tar.open("rb") as source:
            return cls._compress(iter(lambda: source.read(1 << 20), b""), target)

    @classmethod
    def from_folder(cls, folder: Path, target: Path, epoch: int) -> Layer:
        """A layer out of the files below `folder`: sorted, owned by root, with `epoch` (seconds) as their time."""
        with target.open("wb") as stream:
            packed = _Digesting(stream)
            with gzip.GzipFile(filename="", mode="wb", fileobj=packed, compresslevel=GZIP_LEVEL, mtime=0) as zipped:
                plain = _Digesting(zipped)  # type: ignore[arg-type]
                with tarfile.open(mode="w|", fileobj=plain, format=tarfile.PAX_FORMAT, bufsize=1 << 20) as archive:  # type: ignore[call-overload]
                    for path in sorted(folder.rglob("*")):
                        archive.add(path, str(path.relative_to(folder)), recursive=False, filter=_clean(epoch))
        return cls(target, packed.digest(), packed.count, plain.digest(), plain.count)

    @classmethod
    def _compress(cls, chunks: Iterator[bytes], target: Path) -> Layer:
        with target.open("wb") as stream:
            packed = _Digesting(stream)
            with gzip.GzipFile(filename="", mode="wb", fileobj=packed, compresslevel=GZIP_LEVEL, mtime=0) as zipped:
                plain = _Digesting(zipped)  # type: ignore[arg-type]
                for chunk in chunks:
                    plain.write(chunk)
        return cls(target, packed.digest(), packed.count, plain.digest(), plain.count)


def _clean(epoch: int) -> Any:
    def change(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = "root"
        info.mtime = epoch
        info.mode = 0o755 if info.isdir() or info.mode & 0o100 else 0o644
        return info

    return change


@dataclass(frozen=True)
class Pushed:
    """What identifies an image: the registry's digest, and the image id that an engine shows (overlay2 store)."""

    digest: str
    config_digest: str


def documents(
    layers: list[Layer], labels: dict[str, str], epoch: int, architecture: str = "amd64"
) -> tuple[bytes, bytes]:
    """(config, manifest) of an image, as the bytes that their digests are of."""
    created = datetime.fromtimestamp(epoch, UTC).isoformat().replace("+00:00", "Z")
    config = {
        "architecture": architecture,
        "os": "linux",
        "created": created,
        "config": {
            "Cmd": ["vllm", "--help"],
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Labels": labels,
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": created, "created_by": "python3 -m sim build runtime-image"} for _ in layers],
    }
    config_bytes = json.dumps(config, sort_keys=True).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "size": len(config_bytes), "digest": _digest(config_bytes)},
        "layers": [{"mediaType": LAYER, "size": layer.size, "digest": layer.digest} for layer in layers],
    }
    return config_bytes, json.dumps(manifest, sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def push(
    url: str,
    name: str,
    layers: list[Layer],
    labels: dict[str, str],
    epoch: int,
    tag: str = "latest",
    architecture: str = "amd64",
) -> Pushed:
    """Sends the image; blobs that the registry has are not sent again. The manifest goes last: never half an image."""
    config, manifest = documents(layers, labels, epoch, architecture)
    for layer in layers:
        if not _has(url, f"/v2/{name}/blobs/{layer.digest}"):
            with layer.path.open("rb") as stream:
                _upload(url, name, layer.digest, stream, layer.size)
    if not _has(url, f"/v2/{name}/blobs/{_digest(config)}"):
        _upload(url, name, _digest(config), config, len(config))
    _call(url, "PUT", f"/v2/{name}/manifests/{tag}", manifest, {"Content-Type": MANIFEST}, wanted=201)
    return Pushed(_digest(manifest), _digest(config))


def has_manifest(url: str, name: str, digest: str) -> bool:
    """Whether the registry has that image."""
    return _has(url, f"/v2/{name}/manifests/{digest}")


def _has(url: str, path: str) -> bool:
    status, _, _ = _request(url, "HEAD", path, None, {"Accept": MANIFEST})
    return status == 200


def _upload(url: str, name: str, digest: str, body: IO[bytes] | bytes, size: int) -> None:
    headers = _call(url, "POST", f"/v2/{name}/blobs/uploads/", b"", {}, wanted=202)
    place = urllib.parse.urlsplit(headers["location"])
    query = f"{place.query}&digest={digest}" if place.query else f"digest={digest}"
    sent = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
    _call(url, "PUT", f"{place.path}?{query}", body, sent, wanted=201)


def _call(
    url: str, method: str, path: str, body: IO[bytes] | bytes | None, headers: dict[str, str], wanted: int
) -> dict[str, str]:
    status, found, text = _request(url, method, path, body, headers)
    if status != wanted:
        raise SimError(f"the registry answered {status} to {method} {path}, wanted {wanted}: {text[:500]}")
    return found


def _request(
    url: str, method: str, path: str, body: IO[bytes] | bytes | None, headers: dict[str, str]
) -> tuple[int, dict[str, str], str]:
    place = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=600)
    try:
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}, text
    except OSError as error:
        raise SimError(f"the registry at {url} does not answer: {error}") from None
    finally:
        connection.close()
