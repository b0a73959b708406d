"""The patched image made of the real vLLM for CPUs: what it is, what its router does, what a bad base does to it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY / "plugins" / "module_utils"))

from reap.images.naming import image_name, patch_set  # noqa: E402

FACTS = json.loads((REPOSITORY / ".cache/sim/facts.json").read_text())["runtime_image"]
FILES = Path(__file__).resolve().parents[1] / "files"
MODEL = REPOSITORY / ".cache/sim/hub/sim/needle"
REAP = "/opt/reap/bin/reap"
BASE = {
    "repository": FACTS["reference"],
    "digest": FACTS["digest"],
    "id": FACTS["id"],
    "state": "/var/lib/reap/images.json",
}
IMAGE = image_name(FACTS["digest"], "torch")
EXAMPLES = 150


def build(identity: str, router: str = "torch", **more: Any) -> dict[str, Any]:
    return {
        "name": image_name(identity, router),
        "patch_set": patch_set(router),
        "identity": identity,
        "router": router,
        **more,
    }


def patched(host: Host, base: dict[str, Any], wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    words = [REAP, "image", "patched", "--base", json.dumps(base), "--build", json.dumps(wanted)]
    done = host.run(shlex.join(words))
    return done.rc, json.loads(done.stdout or "{}")


def inspect(host: Host, image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(host.check_output(f"docker inspect {image}"))[0]
    return found


def send(host: Host, source: Path, target: str) -> None:
    """Copy a folder to the host."""
    name = host.backend.get_pytest_id().removeprefix("ssh://")
    ssh = [
        "ssh",
        "-F",
        str(REPOSITORY / ".cache/sim/ssh_config"),
        name,
        f"sudo mkdir -p {target} && sudo tar x -C {target}",
    ]
    with subprocess.Popen(["tar", "c", "-C", str(source), "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(ssh, stdin=tar.stdout, check=True)


@pytest.fixture
def derived_bases(host: Host) -> Iterator[Any]:
    """Makes images on the runtime image by a shell command in it; removes them after the test."""
    made: list[str] = []

    def make(name: str, command: str) -> dict[str, Any]:
        host.run("docker rm -f make-base")
        pinned = f"{FACTS['reference']}@{FACTS['digest']}"
        host.check_output(f"docker run --name make-base --entrypoint /bin/sh {pinned} -c {shlex.quote(command)}")
        host.check_output(f"docker commit make-base {name} && docker rm make-base")
        made.append(name)
        return {**BASE, "override": name}

    yield make
    for name in made:
        host.run(f"docker rmi -f {name}")


def test_the_image_says_what_it_is_made_of(host: Host) -> None:
    labels = inspect(host, IMAGE)["Config"]["Labels"]
    assert labels["io.reap.base"] == f"{FACTS['reference']}@{FACTS['digest']}"
    assert labels["io.reap.base-id"] == inspect(host, labels["io.reap.base"])["Id"]
    assert (labels["io.reap.base-matched"], labels["io.reap.base-validated"]) == ("repo digest", "true")
    assert labels["io.reap.patch-set"] == patch_set("torch")
    assert labels["io.reap.router"] == "torch"
    assert labels["io.reap.self-test"] == "passed"


def test_its_configuration_is_the_bases(host: Host) -> None:
    base = inspect(host, f"{FACTS['reference']}@{FACTS['digest']}")["Config"]
    ours = inspect(host, IMAGE)["Config"]
    for key in ("Entrypoint", "Cmd", "Env", "User", "WorkingDir", "Volumes", "ExposedPorts"):
        assert ours.get(key) == base.get(key), key


def test_the_report_inside_names_patches_and_self_test(host: Host) -> None:
    report = json.loads(
        host.check_output(f"docker run --rm --network none --entrypoint cat {IMAGE} /opt/reap/patch-report.json")
    )
    assert report["ok"]
    assert {one["id"]: one["state"] for one in report["patches"]} == {
        "router-fallback": "applied",
        "mxfp4-hygiene": "already_fixed",
        "cutedsl-switch": "applied",
        "flashinfer-libcudart": "not_needed",
        "vllm-libcudart": "already_fixed",
    }
    assert (report["base"]["reference"], report["base"]["validated"]) == (
        f"{FACTS['reference']}@{FACTS['digest']}",
        True,
    )
    assert report["packages"]["vllm"] is not None
    assert report["packages"]["vllm"] == report["selftest"]["vllm"]
    assert report["selftest"]["ok"]
    assert 144 in report["selftest"]["refused"]


def test_nothing_of_the_build_is_left(host: Host) -> None:
    assert host.check_output("docker ps --all --quiet") == ""
    assert host.check_output("docker images --quiet --filter dangling=true --filter label=io.reap.base") == ""


def test_properties_of_the_router_hold_in_the_image(host: Host) -> None:
    """Hypothesis, in the version of this environment, for the image's Python."""
    python = host.check_output(
        f"docker run --rm --network none --entrypoint python3 {IMAGE} -c "
        "'import sys; print(\".\".join(map(str, sys.version_info[:2])))'"
    )
    target = REPOSITORY / ".cache" / "packages" / f"hypothesis-{version('hypothesis')}-py{python}"
    if not (target / "hypothesis").is_dir():
        words = ["--quiet", "--target", str(target), "--python-version", python, "--only-binary", ":all:"]
        package = f"hypothesis=={version('hypothesis')}"
        subprocess.run([sys.executable, "-m", "pip", "install", *words, package], check=True, capture_output=True)
    send(host, target, "/probe/packages")
    send(host, FILES, "/probe/files")
    done = host.run(
        "docker run --rm --network none -v /probe:/probe:ro -e PYTHONPATH=/probe/packages --entrypoint python3 "
        f"{IMAGE} /probe/files/router_properties.py {EXAMPLES}"
    )
    assert done.rc == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "examples, replacement used for" in done.stdout


def test_144_experts_are_routed_in_the_servers_every_process(host: Host) -> None:
    send(host, FILES, "/probe/files")
    send(host, MODEL, "/probe/model")
    host.check_output("rm -rf /probe/out && mkdir -p /probe/out && docker rm -f probe 2>/dev/null; true")
    host.check_output(
        "docker run -d --name probe --network none --ipc host -v /probe/files/probe:/probe-plugin:ro "
        f"-v /probe/model:/model:ro -v /probe/out:/probe-out -e PYTHONPATH=/probe-plugin {IMAGE} "
        "vllm serve /model --max-model-len 1024 --kv-cache-memory-bytes 64M --enforce-eager "
        "--distributed-executor-backend mp --max-num-seqs 1 --served-model-name probe"
    )
    health = "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"
    wait = (
        'timeout 420 sh -c \'until docker exec probe python3 -c "$0" 2>/dev/null; '
        "do test $(docker inspect --format {{.State.Running}} probe) = true || exit 9; done' " + shlex.quote(health)
    )
    try:
        done = host.run(wait)
        assert done.rc == 0, host.run("docker logs --tail 60 probe 2>&1").stdout
        records = [
            json.loads(text)
            for text in host.check_output("cd /probe/out && for f in *.json; do cat $f; echo; done").split("\n")
            if text
        ]
        body = json.dumps({"model": "probe", "prompt": "hello", "max_tokens": 2})
        ask = (
            "import sys,urllib.request as u; r=u.Request('http://127.0.0.1:8000/v1/completions', sys.argv[1].encode(), "
            "{'Content-Type': 'application/json'}); print(u.urlopen(r, timeout=120).status)"
        )
        assert host.check_output(shlex.join(["docker", "exec", "probe", "python3", "-c", ask, body])) == "200"
    finally:
        host.run("docker rm -f probe")
    names = {record["process"] for record in records}
    assert "MainProcess" in names, names
    assert any(name.startswith("EngineCore") for name in names), names
    assert any("Worker" in name for name in names), names
    for record in records:
        assert set(record["problems"].values()) == {None}, record
        assert {144, 160} <= set(record["by_replacement"])


def test_the_other_router_variant_is_another_image(host: Host) -> None:
    rc, said = patched(host, BASE, build(FACTS["digest"], "padded"))
    assert rc == 0, said
    assert said["changed"]
    assert said["image"] != IMAGE
    assert inspect(host, said["image"])["Config"]["Labels"]["io.reap.router"] == "padded"
    assert patched(host, BASE, build(FACTS["digest"], "padded"))[1]["changed"] is False


def check_refused(host: Host, base: dict[str, Any], wanted: dict[str, Any], *words: str) -> None:
    """One clear error, and no image or container that was not there before."""
    before, served = host.check_output("docker images --all --quiet --no-trunc | sort"), inspect(host, IMAGE)["Id"]
    rc, said = patched(host, base, wanted)
    assert rc == 1, said
    for word in words:
        assert word in said["msg"], said["msg"]
    assert host.check_output("docker images --all --quiet --no-trunc | sort") == before
    assert inspect(host, IMAGE)["Id"] == served
    assert host.check_output("docker ps --all --quiet") == ""


FIND = "import importlib.util as u; print(u.find_spec('vllm').submodule_search_locations[0])"
VLLM = f'"$(python3 -c "{FIND}")"'


def test_a_base_without_vllm(host: Host, derived_bases: Any) -> None:
    base = derived_bases("bad:no-vllm", f"rm -r {VLLM}")
    check_refused(host, base, build("bad:no-vllm"), "bad:no-vllm", "no vllm")


def test_a_base_with_a_vllm_that_is_too_new(host: Host, derived_bases: Any) -> None:
    router = f"{VLLM}/model_executor/layers/fused_moe/router/fused_topk_bias_router.py"
    base = derived_bases("bad:new", f"sed -i s/topk_hash_softplus_sqrt/topk_sqrt_softplus/ {router}")
    check_refused(host, base, build("bad:new"), "router-fallback", "fused_topk_bias_router.py", "looked for")


def test_a_base_with_a_vllm_that_is_too_old(host: Host, derived_bases: Any) -> None:
    base = derived_bases("bad:old", f"rm -r {VLLM}/model_executor/layers/fused_moe/router")
    check_refused(host, base, build("bad:old"), "router-fallback", "fused_topk_bias_router.py", "looked for")


def test_another_python_than_the_images(host: Host) -> None:
    wanted = build(FACTS["digest"], python="python9")
    check_refused(host, BASE, {**wanted, "name": "reap-runtime:elsewhere"}, "python9", "vllm_patches_python")


def test_a_site_packages_that_is_not_there(host: Host) -> None:
    wanted = build(FACTS["digest"], site_packages="/usr/lib/python3.12/site-packages")
    check_refused(host, BASE, {**wanted, "name": "reap-runtime:elsewhere"}, "/usr/lib/python3.12/site-packages")


def test_a_router_that_routes_wrongly_never_gets_the_name(host: Host, derived_bases: Any) -> None:
    # torch's own softplus is bent, so that everything installs and only the answers are wrong.
    find = "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    bend = "_s = softplus\ndef softplus(x, *a): return _s(x, *a) + 0.01\n"
    base = derived_bases("bad:bent", f'printf %s {shlex.quote(bend)} >> "$(python3 -c "{find}")"/nn/functional.py')
    check_refused(host, base, build("bad:bent"), "self-test", "weight")


def test_a_base_that_changed_under_the_same_tag_is_refused_unless_it_may_change(host: Host, derived_bases: Any) -> None:
    base = derived_bases("moving:tag", "echo one > /one")
    wanted = build("moving:tag", keep=9)
    first = patched(host, base, wanted)[1]
    assert first["changed"], first
    assert patched(host, base, wanted)[1]["changed"] is False
    was = inspect(host, "moving:tag")["Id"]
    derived_bases("moving:tag", "echo two > /two")
    now = inspect(host, "moving:tag")["Id"]
    check_refused(host, base, wanted, was, now, "moving:tag", "vllm_patches_base_may_change")
    assert inspect(host, wanted["name"])["Id"] == first["id"]
    second = patched(host, base, {**wanted, "base_may_change": True})[1]
    assert second["changed"], second
    assert second["id"] != first["id"]
    assert second["base"]["validated"] is False
    labels = inspect(host, wanted["name"])["Config"]["Labels"]
    assert (labels["io.reap.base"], labels["io.reap.base-id"]) == ("moving:tag", now)
    assert labels["io.reap.base-validated"] == "false"
    # Its name went to its successor; it went too.
    assert first["id"] in second["pruned"]
    assert host.run(f"docker inspect {first['id']}").rc != 0


def test_a_build_that_is_killed_leaves_nothing_for_good(host: Host) -> None:
    wanted = build(FACTS["digest"], name="reap-runtime:killed", keep=9)
    words = shlex.join([REAP, "image", "patched", "--base", json.dumps(BASE), "--build", json.dumps(wanted)])
    testing = "docker ps --quiet --filter name=reap-image-work-selftest"
    until = f'until test -n "$({testing})"; do kill -0 $build || exit 7; done'
    assert host.run(f"{words} & build=$!; {until}; kill -9 $build; wait $build").rc == 137
    left = "docker images --quiet --no-trunc --filter label=io.reap.candidate"
    assert host.check_output(left) != ""
    assert host.run("docker inspect reap-runtime:killed").rc != 0
    rc, said = patched(host, BASE, wanted)
    assert rc == 0, said
    assert host.check_output(left) == ""
    assert host.check_output("docker ps --all --quiet") == ""


def test_old_patched_images_go_and_others_stay(host: Host) -> None:
    for name in ("old-1", "old-2"):
        host.check_output(f"docker create --name make-{name} --env NAME={name} {IMAGE}")
        host.check_output(f"docker commit make-{name} reap-runtime:{name} && docker rm make-{name}")
    host.check_output(f"docker tag {IMAGE} somebody/elses:image")
    host.check_output("docker run -d --name uses --network none --entrypoint sleep reap-runtime:old-1 600")
    host.run(f"docker rmi {image_name(FACTS['digest'], 'padded')}")
    try:
        rc, said = patched(host, BASE, build(FACTS["digest"], "padded", keep=0))
        assert rc == 0, said
        names = host.check_output("docker images --format '{{.Repository}}:{{.Tag}}'").split()
    finally:
        host.run("docker rm -f uses; docker tag somebody/elses:image " + IMAGE)
        host.run("docker rmi somebody/elses:image reap-runtime:old-1 reap-runtime:old-2")
    assert "reap-runtime:old-2" in said["pruned"]
    assert "reap-runtime:old-2" not in names
    assert {"somebody/elses:image", f"reap-base:{FACTS['digest'][7:19]}", "reap-runtime:old-1"} <= set(names)
