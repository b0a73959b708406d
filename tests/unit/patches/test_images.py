"""Decisions about images that need no engine; what needs one is tested on a real one in the Molecule scenarios."""

from __future__ import annotations

import http.server
import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from reap.cli import main
from reap.errors import ReapError
from reap.fetch.progress import Progress
from reap.images import base, derived, naming
from reap.images.engine import Engine, EngineError, auth_header, demultiplex

DIGEST, IMAGE_ID = "sha256:" + "a" * 64, "sha256:" + "b" * 64


class EngineDouble:
    """An engine's list of images and nothing else: `{reference or ID: inspect answer}`."""

    def __init__(self, *images: dict[str, Any]) -> None:
        self.images = images

    def image(self, name: str) -> dict[str, Any] | None:
        for one in self.images:
            if name == one["Id"] or name in (one.get("RepoDigests") or []) or name in (one.get("RepoTags") or []):
                return one
        return None

    def call(self, method: str, target: str, **_: Any) -> Any:
        assert (method, target) == ("GET", "/images/json")
        return list(self.images)


def spec(tmp_path: Path, **changes: Any) -> base.Spec:
    return base.Spec.of(
        {"repository": "host/image", "digest": DIGEST, "id": IMAGE_ID, "state": str(tmp_path / "s.json"), **changes}
    )


@pytest.mark.parametrize(
    ("image", "matched"),
    [
        ({"Id": IMAGE_ID, "RepoDigests": [f"host/image@{DIGEST}"]}, "repo digest"),  # overlay2 store, pulled
        ({"Id": DIGEST, "RepoDigests": [f"host/image@{DIGEST}"]}, "repo digest"),  # containerd store, pulled
        ({"Id": DIGEST, "RepoDigests": []}, "repo digest as image ID"),  # containerd store, loaded
        ({"Id": IMAGE_ID, "RepoDigests": []}, "image ID"),  # overlay2 store, loaded
        ({"Id": "sha256:" + "c" * 64, "RepoDigests": [f"else/where@{DIGEST}"]}, "repo digest under another name"),
        ({"Id": "sha256:" + "c" * 64, "RepoDigests": [f"host/image@sha256:{'d' * 64}"]}, None),
        ({"Id": "sha256:" + "c" * 64, "RepoTags": ["host/image:latest"]}, None),  # the right name is no identity
    ],
)
def test_the_image_is_known_by_either_identity(tmp_path: Path, image: dict[str, Any], matched: str | None) -> None:
    found = base.locate(EngineDouble(image), spec(tmp_path))  # type: ignore[arg-type]
    assert (found.matched if found else None) == matched
    assert found is None or found.validated


def test_an_override_is_never_validated(tmp_path: Path) -> None:
    engine = EngineDouble({"Id": "sha256:" + "c" * 64, "RepoTags": ["my/test:1"]})
    found = base.locate(engine, spec(tmp_path, override="my/test:1"))  # type: ignore[arg-type]
    assert found is not None
    assert not found.validated


def test_bases_that_nothing_needs_go_by_the_recipes_own_names(tmp_path: Path) -> None:
    old, kept, foreign = (f"sha256:{letter * 64}" for letter in "def")
    pulled = f"host/image@{DIGEST}"
    state = {"bases": {old: {"reference": pulled}, kept: {"reference": "host/image@x"}}}
    (tmp_path / "s.json").write_text(json.dumps(state))

    class Recorder(EngineDouble):
        removed: ClassVar[list[str]] = []

        def call(self, method: str, target: str, **_: Any) -> Any:
            return []  # no container

        def remove_image(self, name: str) -> bool:
            self.removed.append(name)
            return True

    tags = {"RepoTags": ["reap-base:old", "reap-base-cutlass:old", "somebody/elses:name"], "RepoDigests": [pulled]}
    engine = Recorder({"Id": old, **tags}, {"Id": kept, "RepoTags": ["reap-base:kept"]}, {"Id": foreign})
    gone = base.prune(engine, spec(tmp_path), {kept})  # type: ignore[arg-type]
    assert gone == engine.removed == ["reap-base:old", "reap-base-cutlass:old", pulled]
    assert json.loads((tmp_path / "s.json").read_text()) == {"bases": {kept: {"reference": "host/image@x"}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"digest": "latest"}, "64 hex digits"),
        ({"digest": "sha256:" + "A" * 64}, "64 hex digits"),
        ({"id": "5df60ebb"}, "image id"),
        ({"archive": "/x.tar"}, "needs its sha256"),
        ({"archive": "/x.tar", "archive_sha256": "short"}, "needs its sha256"),
        ({"tag": "x"}, "unknown image settings"),
    ],
)
def test_bad_settings_are_one_error(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    with pytest.raises(ReapError, match=words):
        spec(tmp_path, **changes)


@pytest.mark.parametrize(
    ("reference", "name", "tag"),
    [
        (f"127.0.0.1:5000/image@{DIGEST}", "127.0.0.1:5000/image", DIGEST),
        ("127.0.0.1:5000/image:one", "127.0.0.1:5000/image", "one"),
        ("127.0.0.1:5000/image", "127.0.0.1:5000/image", "latest"),
    ],
)
def test_a_port_is_no_tag(reference: str, name: str, tag: str) -> None:
    assert base._pull_query(reference) == {"fromImage": name, "tag": tag}


def test_progress_counts_bytes_of_layers(tmp_path: Path) -> None:
    layers = base._Layers(Progress(None, "image_pull"))
    for line in (
        {"id": "a", "status": "Already exists"},
        {"id": "b", "status": "Downloading", "progressDetail": {"current": 10, "total": 100}},
        {"id": "c", "status": "Downloading", "progressDetail": {"current": 5, "total": 50}},
        {"id": "b", "status": "Download complete"},
    ):
        layers.take(line)
    assert layers.done == 105


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("manifest unknown", "check the repository and the digest"),
        ("denied: requested access", "REAP_REGISTRY_USER"),
        ("unauthorized: authentication required", "REAP_REGISTRY_USER"),
        ("write /x: no space left on device", "free space"),
        ("dial tcp 1.2.3.4:443: connect: connection refused", "does not answer"),
    ],
)
def test_each_refusal_of_a_registry_has_its_remedy(said: str, words: str) -> None:
    assert words in base._explain(said, "r/i", "r")


def test_names_depend_on_base_and_patches_alone() -> None:
    name = naming.image_name(DIGEST, "torch")
    assert name.startswith("reap-runtime:aaaaaaaaaaaa-")
    assert naming.image_name(f"host/image@{DIGEST}", "torch") == name
    assert naming.image_name(DIGEST, "padded") != name
    assert naming.image_name("my/test:1", "torch") != naming.image_name("my/test:2", "torch")
    for bad in (("", "torch"), (DIGEST, "fast")):
        with pytest.raises(ReapError):
            naming.image_name(*bad)


def test_a_patched_image_of_another_base_or_of_failed_tests_is_not_current() -> None:
    build = derived.Build.of({"name": "reap-runtime:x", "patch_set": "p" * 64, "identity": DIGEST})
    found = base.Found(IMAGE_ID, "image ID", "disk", True)
    labels = build.labels(found)

    def current(**changes: str) -> str | None:
        image = {"Id": "sha256:new", "RepoTags": [build.name], "Config": {"Labels": {**labels, **changes}}}
        return derived.current(EngineDouble(image), build, found)  # type: ignore[arg-type]

    assert current() == "sha256:new"
    for key in labels:
        assert current(**{key: "other"}) is None, key


@pytest.mark.parametrize(
    ("available_gib", "gpus", "watchdog", "refused"),
    [
        (9.0, True, '{"floor_kb": 8388608}', True),  # a Spark that serves K144
        (13.0, True, '{"floor_kb": 8388608}', False),
        (11.0, False, '{"floor_kb": 8388608}', False),
        (1.0, True, "", False),  # nothing is guarded, so nothing is served
        (1.0, True, "{broken", False),
    ],
)
def test_a_self_test_does_not_cost_the_model_that_is_served(
    available_gib: float, gpus: bool, watchdog: str, refused: bool
) -> None:
    build = derived.Build.of({"name": "reap-runtime:x", "patch_set": "p" * 64, "identity": DIGEST, "gpus": gpus})
    meminfo = f"MemTotal: 127000000 kB\nMemAvailable: {int(available_gib * 2**20)} kB\n"
    if refused:
        with pytest.raises(ReapError, match="stop the service"):
            derived.check_memory(build, meminfo, watchdog)
    else:
        derived.check_memory(build, meminfo, watchdog)


def test_log_frames_are_put_together() -> None:
    frames = b"\x01\0\0\0\0\0\0\x03abc" + b"\x02\0\0\0\0\0\0\x01d"
    assert demultiplex(frames) == "abcd"


def test_a_missing_engine_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "image",
        "base",
        "--base",
        json.dumps({"repository": "a/b", "digest": DIGEST, "state": str(tmp_path / "s")}),
    ]
    assert main([*words, "--check", "--socket", str(tmp_path / "no.sock")]) == 1
    said = json.loads(capsys.readouterr().out)
    assert "start docker.service" in said["msg"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"digest": "x", "repository": "a"}'])
def test_settings_that_are_no_object_end_with_2(text: str) -> None:
    assert main(["image", "base", "--base", text]) == 2


# The client against a socket that answers like an engine.


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., tuple[Engine, list[Any]]]]:
    servers = []

    def serve(status: int, body: bytes) -> tuple[Engine, list[Any]]:
        seen: list[Any] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                seen.append((self.path, dict(self.headers)))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST

            def log_message(self, *_: object) -> None: ...
            def address_string(self) -> str:
                return "local"

        server = socketserver.ThreadingUnixStreamServer(str(tmp_path / f"{len(servers)}.sock"), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return Engine(str(server.server_address)), seen

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_credentials_go_in_a_header_of_the_one_request(served: Callable[..., tuple[Engine, list[Any]]]) -> None:
    engine, seen = served(200, b'{"status": "x"}\n')
    list(engine.lines("POST", "/images/create", query={"fromImage": "r/i"}, headers=auth_header("r", "me", "secret")))
    path, headers = seen[0]
    assert "secret" not in path
    assert headers["X-Registry-Auth"]


def test_an_engines_message_becomes_the_error(served: Callable[..., tuple[Engine, list[Any]]]) -> None:
    engine, _ = served(500, b'{"message": "it is on fire"}')
    with pytest.raises(EngineError, match="it is on fire"):
        engine.call("GET", "/info")


def test_an_image_that_is_not_there_is_none(served: Callable[..., tuple[Engine, list[Any]]]) -> None:
    engine, _ = served(404, b'{"message": "No such image"}')
    assert engine.image("a/b") is None
