"""Decisions about images that need no engine; what needs one is tested on a real one in the Molecule scenarios."""

from __future__ import annotations

import hashlib
import http.server
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from reap.cli import main
from reap.errors import ReapError
from reap.fetch.progress import Progress
from reap.images import base, derived, naming
from reap.images.engine import Engine, EngineError, auth_header, demultiplex
from reap.images.labels import LABEL_BASE, LABEL_BASE_ID, LABEL_CANDIDATE, LABEL_MATCHED, LABEL_VALIDATED, WORK

ROOT = Path(__file__).resolve().parents[3]
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


def test_the_pinned_image_has_one_home() -> None:
    """Another digest is pulled, patched and served: no role has a variable of its own for it."""

    def settings(path: str) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
        return found

    brought = settings("roles/runtime_image/vars/main.yml")["__runtime_image_base"]
    patched = settings("roles/vllm_patches/defaults/main.yml")["vllm_patches_base_identity"]
    facts = yaml.safe_load((ROOT / "roles/spark_host/tasks/facts.yml").read_text(encoding="utf-8"))
    looked_for = facts[0]["spark_facts"]["image"]
    for key in ("repository", "digest", "id"):
        assert brought[key] == patched[key] == looked_for[key]
        assert f"reap_runtime_image.{key}" in brought[key]
    everybody = settings("group_vars/all/main.yml")
    assert "reap_runtime_image.digest" in everybody["reap_runtime_base"]
    assert "reap_runtime_base" in everybody["reap_image"]
    assert "reap_runtime_base" in settings("roles/vllm_patches/defaults/main.yml")["vllm_patches_base"]


# What happens to the images of a host, on a double that keeps names, labels and containers as an engine does. The same
# on a real engine: molecule/runtime_image and molecule/vllm_patches.


class HostDouble:
    """An engine's images, {ID: {names, labels}}, and containers, {name: image ID}. Its archive is a list of images."""

    def __init__(self) -> None:
        self.images: dict[str, dict[str, Any]] = {}
        self.containers: dict[str, str] = {}
        self.archive: list[tuple[str, list[str]]] = []
        self.pinned_by_others: set[str] = set()
        self.meanwhile: tuple[str, ...] = ()
        self.clock = 0

    def put(self, image: str, *names: str, **labels: str) -> str:
        """An image appears, as by a pull or a build of somebody."""
        self.clock += 1
        entry = self.images.setdefault(image, {"Id": image, "RepoTags": [], "Labels": {}, "Created": self.clock})
        entry["Labels"].update({key.replace("_", "."): value for key, value in labels.items()})
        for name in names:
            repository, _, tag = name.rpartition(":")
            self.tag(image, repository, tag)
        return image

    def tag(self, image: str, repository: str, tag: str) -> None:
        for other in self.images.values():
            if f"{repository}:{tag}" in other["RepoTags"]:
                other["RepoTags"].remove(f"{repository}:{tag}")
        self.images[image]["RepoTags"].append(f"{repository}:{tag}")

    def image(self, name: str) -> dict[str, Any] | None:
        return next((one for one in self.images.values() if name == one["Id"] or name in one["RepoTags"]), None)

    def remove_image(self, name: str) -> bool:
        found = self.image(name)
        used = found is not None and found["Id"] in {*self.containers.values(), *self.pinned_by_others}
        if found is None or (name == found["Id"] and (used or len(found["RepoTags"]) > 1)):
            return False
        found["RepoTags"] = [one for one in found["RepoTags"] if one != name and name != found["Id"]]
        if not found["RepoTags"] and not used:
            del self.images[found["Id"]]
        return True

    def call(self, method: str, target: str, query: dict[str, Any] | None = None, **_: Any) -> Any:
        if target == "/info":
            return {"DockerRootDir": "/"}
        filters = json.loads((query or {}).get("filters", "{}"))
        if target == "/containers/json":
            wanted = self.image(filters["ancestor"][0]) or {"Id": None}
            return [name for name, image in self.containers.items() if image == wanted["Id"]]
        if target == "/commit":
            assert query is not None
            changes = [line.removeprefix("LABEL ").partition("=") for line in (query["changes"] or "").splitlines()]
            labels = {key: json.loads(value) for key, _, value in changes if key.startswith("io.")}
            made = self.put(f"sha256:{self.clock:064d}")
            self.images[made]["Labels"] = {**self.images[self.containers[query["container"]]]["Labels"], **labels}
            if query.get("repo"):
                self.tag(made, query["repo"], query["tag"])
            return {"Id": made}
        assert (method, target) == ("GET", "/images/json")
        return [
            json.loads(json.dumps(one))
            for one in self.images.values()
            if all(label.partition("=")[0] in one["Labels"] for label in filters.get("label", []))
        ]

    def lines(self, method: str, target: str, **_: Any) -> Iterator[dict[str, Any]]:
        if target == "/images/create":
            raise EngineError("manifest unknown", 404)
        if self.meanwhile:
            # Somebody builds while the archive is being loaded.
            self.put(*self.meanwhile)
        for image, names in self.archive:
            self.put(image, *names)
            yield from ({"stream": f"Loaded image: {name}\n"} for name in names)
            if not names:
                yield {"stream": f"Loaded image ID: {image}\n"}

    def create(self, image: str, config: dict[str, Any] | None = None, name: str | None = None) -> str:
        self.containers[name or f"nameless-{len(self.containers)}"] = image
        return name or f"nameless-{len(self.containers) - 1}"

    def run(self, container: str, timeout: float) -> tuple[int, str]:
        return 0, ""

    def remove_container(self, container: str) -> None:
        self.containers.pop(container, None)

    def put_archive(self, folder: Path, *images: tuple[str, list[str]]) -> dict[str, str]:
        """An archive with these images, as settings."""
        self.archive = list(images)
        (folder / "a.tar").write_bytes(b"x")
        return {"archive": str(folder / "a.tar"), "archive_sha256": hashlib.sha256(b"x").hexdigest()}


OLD, NEW, OTHER = ("sha256:" + letter * 64 for letter in "def")


def have(host: HostDouble, wanted: base.Spec) -> tuple[base.Found, bool]:
    return base.ensure(host, wanted, Progress(None, "image_pull"), {})  # type: ignore[arg-type]


def patch(host: HostDouble, found: base.Found, name: str = "reap-runtime:x", **more: Any) -> derived.Build:
    """A patched image of a base, with the labels of one, inheriting the base's."""
    build = derived.Build.of({"name": name, "patch_set": "p" * 64, "identity": found.reference, **more})
    inherited = host.images[found.id]["Labels"]
    made = host.put(f"sha256:{host.clock:064x}")
    host.images[made]["Labels"] = {**inherited, **build.labels(found)}
    host.tag(made, *name.split(":"))
    return build


def test_a_cutlass_layer_is_built_once_and_a_patched_image_is_no_layer(tmp_path: Path) -> None:
    host = HostDouble()
    host.put(OLD, "my/base:1")
    wanted = spec(tmp_path, cutlass_base="my/base:1", cutlass_package="cutlass==1")
    layer, changed = have(host, wanted)
    assert (layer.source, layer.validated, changed) == ("build", False, True)
    assert layer.reference == "cutlass==1 on my/base:1"
    build = patch(host, layer)
    # The second run: the patched image is newer and has the layer's labels, and yet the layer is what is found.
    again, changed = have(host, wanted)
    assert (again.id, changed) == (layer.id, False)
    assert derived.current(host, build, again) is not None  # type: ignore[arg-type]
    assert host.containers == {}


def test_another_base_under_the_cutlass_layers_name_is_another_layer(tmp_path: Path) -> None:
    host = HostDouble()
    host.put(OLD, "my/base:1")
    wanted = spec(tmp_path, cutlass_base="my/base:1", cutlass_package="cutlass==1")
    first, _ = have(host, wanted)
    build = patch(host, first)
    host.put(NEW, "my/base:1")
    second, changed = have(host, wanted)
    assert changed
    assert second.id != first.id
    with pytest.raises(ReapError, match=first.id) as caught:
        derived.refuse_changed_base(host, build, second)  # type: ignore[arg-type]
    assert second.id in str(caught.value)


def test_a_base_that_changed_under_the_same_name_is_one_error_with_both_ids(tmp_path: Path) -> None:
    host = HostDouble()
    host.put(OLD, "my/test:1")
    wanted = spec(tmp_path, override="my/test:1")
    build = patch(host, have(host, wanted)[0])
    derived.refuse_changed_base(host, build, have(host, wanted)[0])  # type: ignore[arg-type]
    host.put(NEW, "my/test:1")
    changed = have(host, wanted)[0]
    before = json.dumps(host.images)
    with pytest.raises(ReapError) as caught:
        derived.ensure(host, build, changed, tmp_path, Progress(None, "p"))  # type: ignore[arg-type]
    for word in (OLD, NEW, "my/test:1", "vllm_patches_base_may_change"):
        assert word in str(caught.value)
    assert json.dumps(host.images) == before
    # Under a new patch set the name of the result differs, and the base has changed all the same.
    for more in ({"patch_set": "q" * 64, "name": "reap-runtime:y"}, {}):
        other = derived.Build.of({**build.__dict__, **more})
        with pytest.raises(ReapError, match="changed under the same name"):
            derived.refuse_changed_base(host, other, changed)  # type: ignore[arg-type]
        derived.refuse_changed_base(host, derived.Build.of({**other.__dict__, "base_may_change": True}), changed)  # type: ignore[arg-type]
    # Once that was allowed, the new one is what the name stands for; going back is a change again.
    patch(host, changed)
    derived.refuse_changed_base(host, build, changed)  # type: ignore[arg-type]
    host.put(OLD, "my/test:1")
    with pytest.raises(ReapError, match="changed under the same name"):
        derived.refuse_changed_base(host, build, have(host, wanted)[0])  # type: ignore[arg-type]


def test_a_patched_image_is_no_base(tmp_path: Path) -> None:
    host = HostDouble()
    patch(host, base.Found(host.put(OLD, "my/test:1"), "x", "disk", False, "my/test:1"))
    found = have(host, spec(tmp_path, override="reap-runtime:x"))[0]
    build = derived.Build.of({"name": "reap-runtime:y", "patch_set": "p" * 64, "identity": "reap-runtime:x"})
    with pytest.raises(ReapError, match=r"patched image already.*my/test:1"):
        derived.ensure(host, build, found, tmp_path, Progress(None, "p"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "labels"),
    [
        (
            base.Found(IMAGE_ID, "image ID", "disk", True, f"host/image@{DIGEST}"),
            {LABEL_BASE: f"host/image@{DIGEST}", LABEL_MATCHED: "image ID", LABEL_VALIDATED: "true"},
        ),
        (
            base.Found(OLD, "reference my/test:1", "disk", False, "my/test:1"),
            {LABEL_BASE: "my/test:1", LABEL_MATCHED: "reference my/test:1", LABEL_VALIDATED: "false"},
        ),
    ],
)
def test_labels_say_what_the_image_is_made_of(found: base.Found, labels: dict[str, str]) -> None:
    build = derived.Build.of({"name": "reap-runtime:x", "patch_set": "p" * 64, "identity": "whatever was asked for"})
    assert build.labels(found).items() >= {**labels, LABEL_BASE_ID: found.id}.items()


def test_an_archives_own_names_do_not_stay(tmp_path: Path) -> None:
    host = HostDouble()
    host.put(OTHER, "theirs:latest")
    archive = host.put_archive(tmp_path, (IMAGE_ID, ["maker/image:1", "theirs:latest"]), (NEW, ["maker/more:1"]))
    found, _ = have(host, spec(tmp_path, **archive))
    assert (found.id, found.source, found.validated) == (IMAGE_ID, "archive", True)
    assert {one["Id"]: one["RepoTags"] for one in host.images.values()} == {
        OTHER: ["theirs:latest"],
        IMAGE_ID: ["reap-base:aaaaaaaaaaaa"],
    }
    assert base.prune(host, spec(tmp_path), set()) == ["reap-base:aaaaaaaaaaaa"]  # type: ignore[arg-type]
    assert set(host.images) == {OTHER}


def test_an_archive_that_its_checksum_alone_speaks_for_is_not_called_validated(tmp_path: Path) -> None:
    host = HostDouble()
    archive = host.put_archive(tmp_path, (NEW, ["maker/image:1"]))
    wanted = spec(tmp_path, id="", **archive)
    for source in ("archive", "disk"):
        found, _ = have(host, wanted)
        assert (found.id, found.source, found.matched, found.validated) == (NEW, source, "archive sha256", False)
    assert archive["archive_sha256"] in found.reference


@pytest.mark.parametrize("identity", [IMAGE_ID, ""])
def test_an_override_out_of_an_archive_is_the_override_and_never_validated(tmp_path: Path, identity: str) -> None:
    host = HostDouble()
    archive = host.put_archive(tmp_path, (NEW, ["my/test:1"]))
    found, _ = have(host, spec(tmp_path, id=identity, override="my/test:1", **archive))
    assert (found.id, found.source, found.validated) == (NEW, "archive", False)
    assert host.images[NEW]["RepoTags"] == ["my/test:1"]
    # One that does not hold it is no stand-in for it, pinned or not.
    host = HostDouble()
    archive = host.put_archive(tmp_path, (IMAGE_ID, ["maker/image:1"]))
    with pytest.raises(ReapError, match=r"wanted my/test:2: it was unloaded"):
        have(host, spec(tmp_path, id=identity, override="my/test:2", **archive))
    assert host.images == {}


def test_what_could_not_be_unloaded_is_not_called_unloaded(tmp_path: Path) -> None:
    host = HostDouble()
    host.pinned_by_others.add(NEW)
    archive = host.put_archive(tmp_path, (NEW, ["maker/image:1"]))
    with pytest.raises(ReapError, match=f"{NEW} stays on the host") as caught:
        have(host, spec(tmp_path, **archive))
    assert "unloaded" not in str(caught.value)


def test_what_somebody_builds_during_a_load_stays(tmp_path: Path) -> None:
    host = HostDouble()
    host.meanwhile = (OTHER, "operators/own:build")
    have(host, spec(tmp_path, id="", **host.put_archive(tmp_path, (NEW, []))))
    assert host.images[OTHER]["RepoTags"] == ["operators/own:build"]


def test_an_image_that_the_service_can_go_back_to_is_not_pruned(tmp_path: Path) -> None:
    """A stopped service has no container that would hold it."""
    host = HostDouble()
    found = base.Found(host.put(OLD, "my/test:1"), "x", "disk", False, "my/test:1")
    for name in ("reap-runtime:good", "reap-runtime:failed", "reap-runtime:now"):
        patch(host, found, name)
    service, running = tmp_path / "service.json", tmp_path / "running.json"
    generations = tmp_path / "state" / "generations"
    generations.mkdir(parents=True)
    service.write_text(json.dumps({"image": "reap-runtime:failed", "state_dir": str(tmp_path / "state")}))
    (generations / "good.json").write_text(json.dumps({"image": "reap-runtime:good"}))
    served = derived.served_images(service, running)
    assert served == {"reap-runtime:good", "reap-runtime:failed"}
    assert derived.prune(host, "reap-runtime:now", 0, served) == []  # type: ignore[arg-type]
    service.write_text("{")
    assert derived.served_images(service, running) is None
    assert derived.prune(host, "reap-runtime:now", 0, None) == []  # type: ignore[arg-type]
    service.unlink()
    assert derived.served_images(service, running) == set()


def test_a_pull_that_gets_further_with_each_try_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reap.images.base.time.sleep", lambda _seconds: None)
    tries: list[int] = []

    class Breaks(HostDouble):
        def lines(self, method: str, target: str, **_: Any) -> Iterator[dict[str, Any]]:
            tries.append(len(tries))
            for layer in range(len(tries)):
                yield {"id": str(layer), "status": "Already exists" if layer < len(tries) - 1 else "Download complete"}
            if len(tries) < 8:
                raise EngineError("unexpected EOF")
            self.put(IMAGE_ID)

    assert have(Breaks(), spec(tmp_path))[0].source == "registry"
    assert len(tries) == 8


def test_a_pull_that_gets_no_further_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reap.images.base.time.sleep", lambda _seconds: None)

    class Stuck(HostDouble):
        def lines(self, method: str, target: str, **_: Any) -> Iterator[dict[str, Any]]:
            yield {"id": "a", "status": "Downloading", "progressDetail": {"current": 10, "total": 100}}
            raise EngineError("unexpected EOF")

    with pytest.raises(ReapError, match="unexpected EOF"):
        have(Stuck(), spec(tmp_path))


@pytest.mark.parametrize("gpus", [True, False])
def test_a_self_test_without_the_gpu_that_was_asked_for_is_refused(gpus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostDouble()
    found = base.Found(host.put(OLD, "my/test:1"), "x", "disk", False, "my/test:1")
    build = derived.Build.of({"name": "reap-runtime:x", "patch_set": "p" * 64, "identity": DIGEST, "gpus": gpus})
    monkeypatch.setattr(derived, "_worker", lambda *_arguments, **_named: "worker")
    monkeypatch.setattr(derived, "_run", lambda *_arguments: (0, {"ok": True, "device": "cpu"}, ""))
    if gpus:
        with pytest.raises(ReapError, match="found no GPU, wanted one"):
            derived._selftest(host, build, found, "candidate", [])  # type: ignore[arg-type]
    else:
        assert derived._selftest(host, build, found, "candidate", [])["ok"]  # type: ignore[arg-type]


def test_every_patched_image_goes_that_is_older_named_or_not(tmp_path: Path) -> None:
    host = HostDouble()
    found = base.Found(host.put(OLD, "my/test:1"), "x", "disk", False, "my/test:1")
    for name in ("reap-runtime:a", "reap-runtime:b", "reap-runtime:b", "reap-runtime:c", "reap-runtime:c"):
        patch(host, found, name)
    names = [one["RepoTags"] for one in host.images.values()]
    assert names == [["my/test:1"], ["reap-runtime:a"], [], ["reap-runtime:b"], [], ["reap-runtime:c"]]
    nameless = [one["Id"] for one in host.images.values() if not one["RepoTags"]]
    host.containers["serves"] = nameless[1]
    assert derived.prune(host, "reap-runtime:c", 1) == [nameless[0], "reap-runtime:a"]  # type: ignore[arg-type]
    assert derived.prune(host, "reap-runtime:c", 1) == []  # type: ignore[arg-type]
    # What has no name is no image to go back to, however many are kept.
    del host.containers["serves"]
    assert derived.prune(host, "reap-runtime:c", 1) == [nameless[1]]  # type: ignore[arg-type]
    assert derived.prune(host, "reap-runtime:c") == ["reap-runtime:b"]  # type: ignore[arg-type]
    host.tag(host.image("reap-runtime:c")["Id"], "somebody/elses", "image")  # type: ignore[index]
    assert derived.prune(host) == ["reap-runtime:c"]  # type: ignore[arg-type]
    assert [one["RepoTags"] for one in host.images.values()] == [["my/test:1"], ["somebody/elses:image"]]


def test_what_a_killed_build_left_goes_with_the_next_one() -> None:
    host = HostDouble()
    host.put(OLD, "my/test:1")
    host.put(NEW)
    host.images[NEW]["Labels"] = {LABEL_CANDIDATE: "reap-runtime:x"}
    host.containers = {f"{WORK}-image": OLD, f"{WORK}-selftest": NEW, f"{WORK}-cutlass": OLD, "theirs": OLD}
    assert derived.sweep(host) == [NEW]  # type: ignore[arg-type]
    assert (set(host.images), set(host.containers)) == ({OLD}, {"theirs"})


def test_a_layer_whose_name_went_to_its_successor_goes_by_its_id(tmp_path: Path) -> None:
    host = HostDouble()
    host.put(OLD)
    state = {"bases": {OLD: {"source": "build", "reference": f"host/image@{DIGEST}"}}}
    (tmp_path / "s.json").write_text(json.dumps(state))
    assert base.prune(host, spec(tmp_path), set()) == [OLD]  # type: ignore[arg-type]
    assert host.images == {}


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
    found = base.Found(IMAGE_ID, "image ID", "disk", True, f"host/image@{DIGEST}")
    labels = build.labels(found)

    def current(**changes: str) -> str | None:
        image = {"Id": "sha256:new", "RepoTags": [build.name], "Config": {"Labels": {**labels, **changes}}}
        return derived.current(EngineDouble(image), build, found)  # type: ignore[arg-type]

    assert current() == "sha256:new"
    # The same image may be found by another of its names or identities next time; nothing is rebuilt for that.
    assert current(**{LABEL_BASE: "mirror/image@x", LABEL_MATCHED: "repo digest"}) == "sha256:new"
    for key in set(labels) - {LABEL_BASE, LABEL_MATCHED}:
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


@pytest.mark.parametrize("whole", [True, False])
def test_an_answer_that_is_cut_off_is_no_end(tmp_path: Path, whole: bool) -> None:
    """An engine that dies in the midst of a pull."""
    said = b'{"status": "x"}\n'
    sent = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(said), said)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()

    def answer() -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(sent + (b"0\r\n\r\n" if whole else b""))
        connection.close()

    for call in ("lines", "call"):
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        engine = Engine(str(tmp_path / "s"))
        if whole:
            assert list(engine.lines("GET", "/x")) if call == "lines" else engine.call("GET", "/x")
        else:
            with pytest.raises(EngineError, match="answer broke off"):
                _ = list(engine.lines("GET", "/x")) if call == "lines" else engine.call("GET", "/x")
        thread.join()
    listener.close()


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


@pytest.mark.parametrize(
    ("info", "root"),
    [
        ({"DockerRootDir": "/srv/docker", "DriverStatus": [["Backing Filesystem", "extfs"]]}, "/srv/docker"),
        (
            {
                "DockerRootDir": "/srv/docker",
                "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
                "Containerd": {"Address": "/run/containerd/containerd.sock"},
            },
            "/var/lib/containerd",
        ),
        (
            {
                "DockerRootDir": "/srv/docker",
                "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
                "Containerd": {"Address": "/var/run/docker/containerd/containerd.sock"},
            },
            "/srv/docker",
        ),
    ],
)
def test_room_is_looked_for_where_the_engine_keeps_its_images(info: dict[str, Any], root: str) -> None:
    assert base.store_root(info) == root


def test_an_archive_is_fetched_on_where_a_connection_ended_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 4096
    begun: list[int] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            at = int(self.headers.get("Range", "bytes=0-")[6:-1])
            begun.append(at)
            self.send_response(206 if at else 200)
            self.send_header("Content-Length", str(len(content) - at))
            self.end_headers()
            self.wfile.write(content[at:][: 400_000 if len(begun) < 3 else None])

        def log_message(self, *_arguments: object) -> None:
            """Quiet."""

    monkeypatch.setattr(base.time, "sleep", lambda _s: None)
    host = HostDouble()
    host.archive = [(NEW, ["my/test:1"])]
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.tar"
        digest = hashlib.sha256(content).hexdigest()
        found, _ = have(host, spec(tmp_path, override="my/test:1", archive=address, archive_sha256=digest))
        server.shutdown()
    assert (found.id, found.source) == (NEW, "archive")
    assert begun == [0, 400_000, 800_000]
