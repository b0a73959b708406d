"""The pinned image on a real engine: identities, sources, and what a failing source leaves behind."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pip
import pytest
from testinfra.host import Host

REPOSITORY, SCENARIO = Path(__file__).resolve().parents[3], Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "plugins" / "module_utils"))

from reap.images.naming import image_name, patch_set  # noqa: E402

FACTS = json.loads((REPOSITORY / ".cache/sim/facts.json").read_text())["runtime_image"]
REAP, STATE = "/opt/reap/bin/reap", "/var/lib/reap/images.json"
PINNED = {
    "repository": FACTS["reference"],
    "digest": FACTS["digest"],
    "id": FACTS["id"],
    "free_bytes": 1,
    "state": STATE,
}
ABSENT = "sha256:" + "0" * 64


def ensure(host: Host, environment: str = "", **changes: Any) -> tuple[int, dict[str, Any]]:
    words = [REAP, "image", "base", "--base", json.dumps({**PINNED, **changes})]
    done = host.run(f"{environment} {shlex.join(words)}")
    return done.rc, json.loads(done.stdout or "{}")


def images(host: Host) -> str:
    form = "{{.Repository}} {{.Tag}} {{.Digest}} {{.ID}}"
    return str(host.check_output(f"docker images --all --digests --no-trunc --format '{form}' | sort"))


@pytest.fixture
def tiny(host: Host) -> Any:
    """An image of a few bytes and its archive: what is true of it is true of one of 20 GB."""
    host.check_output(
        "mkdir -p /tmp/tiny && date +%N > /tmp/tiny/file && tar c -C /tmp/tiny . | docker import - tiny:one"
    )
    identity = host.check_output("docker inspect --format '{{.Id}}' tiny:one")
    host.check_output("docker save -o /tmp/tiny.tar tiny:one && docker rmi tiny:one")
    yield {"id": identity, "sha256": host.check_output("sha256sum /tmp/tiny.tar").split()[0]}
    # The archive's own name must be gone by itself, wherever the recipe loaded it.
    host.run(f"docker rmi tiny:one {LOGIN}/tiny:one")
    host.run("docker rmi reap-base:000000000000")
    assert tiny_names(host) == ""


def tiny_names(host: Host) -> str:
    return str(host.check_output("docker images --format '{{.Repository}}:{{.Tag}}' --filter reference='*tiny*'"))


def test_the_image_is_known_by_its_digest_and_has_a_name_of_its_own(host: Host) -> None:
    found = json.loads(host.check_output(f"docker inspect {FACTS['reference']}@{FACTS['digest']}"))[0]
    assert found["Id"] in (FACTS["id"], FACTS["digest"])
    assert f"reap-base:{FACTS['digest'][7:19]}" in found["RepoTags"]


def test_a_second_look_changes_nothing_and_says_what_matched(host: Host) -> None:
    before = images(host)
    rc, said = ensure(host)
    assert (rc, said["changed"], said["base"]["matched"], said["base"]["validated"]) == (0, False, "repo digest", True)
    assert images(host) == before


def test_an_image_without_its_repo_digest_is_known_by_its_id(host: Host) -> None:
    rc, said = ensure(host, digest=ABSENT, repository="127.0.0.1:9/nothing")
    assert rc == 0, said
    assert said["base"]["matched"] == "image ID"


def test_it_is_known_under_another_repository(host: Host) -> None:
    rc, said = ensure(host, repository="registry.invalid/moved", id="")
    assert rc == 0, said
    assert "repo digest" in said["base"]["matched"]


def test_a_wrong_digest(host: Host) -> None:
    before = images(host)
    rc, said = ensure(host, digest=ABSENT, id="")
    assert rc == 1
    assert "check the repository and the digest" in said["msg"]
    assert images(host) == before


def test_a_registry_that_does_not_answer(host: Host) -> None:
    before = images(host)
    rc, said = ensure(host, repository="127.0.0.1:9/reap-runtime-sim", digest=ABSENT, id="")
    assert rc == 1
    assert "127.0.0.1:9 does not answer" in said["msg"]
    assert "start the registry" in said["msg"]
    assert images(host) == before


def test_a_disk_that_is_too_small(host: Host) -> None:
    rc, said = ensure(host, digest=ABSENT, id="", free_bytes=10**18)
    assert rc == 1
    assert "GB free" in said["msg"]
    assert "nothing was brought" in said["msg"]


def test_an_override_is_reported_as_unvalidated(host: Host) -> None:
    rc, said = ensure(host, override=f"{FACTS['reference']}@{FACTS['digest']}")
    assert (rc, said["base"]["validated"]) == (0, False)


def test_a_saved_archive_with_a_pinned_id(host: Host, tiny: dict[str, str]) -> None:
    source = {
        "repository": "127.0.0.1:9/tiny",
        "digest": ABSENT,
        "archive": "/tmp/tiny.tar",
        "archive_sha256": tiny["sha256"],
    }
    rc, said = ensure(host, id=tiny["id"], **source)
    assert rc == 0, said
    assert (said["base"]["id"], said["base"]["source"]) == (tiny["id"], "archive")
    assert said["base"]["validated"] is True
    assert tiny_names(host) == ""
    assert ensure(host, id=tiny["id"], **source)[1]["changed"] is False


def test_a_saved_archive_known_by_its_checksum_alone(host: Host, tiny: dict[str, str]) -> None:
    source = {
        "repository": "127.0.0.1:9/tiny",
        "digest": ABSENT,
        "archive": "/tmp/tiny.tar",
        "archive_sha256": tiny["sha256"],
    }
    rc, said = ensure(host, id="", **source)
    assert rc == 0, said
    assert (said["base"]["matched"], said["base"]["validated"]) == ("archive sha256", False)
    assert tiny_names(host) == ""
    assert ensure(host, id="", **source)[1]["changed"] is False


def test_an_archive_from_a_url_goes_on_where_it_broke_off(host: Host, tiny: dict[str, str]) -> None:
    partial = f"/var/lib/reap/image-{tiny['sha256'][:12]}.tar.partial"
    host.check_output(f"head -c 2000 /tmp/tiny.tar > {partial}")
    pid = host.check_output(
        "cd /tmp && { setsid python3 -m http.server --bind 127.0.0.1 8791 >/dev/null 2>&1 & echo $!; }"
    )
    try:
        look = "import urllib.request as u; u.urlopen('http://127.0.0.1:8791/')"
        host.check_output(f"timeout 300 sh -c 'until python3 -c \"$0\" 2>/dev/null; do :; done' {shlex.quote(look)}")
        rc, said = ensure(
            host,
            repository="127.0.0.1:9/tiny",
            digest=ABSENT,
            id=tiny["id"],
            archive="http://127.0.0.1:8791/tiny.tar",
            archive_sha256=tiny["sha256"],
        )
    finally:
        host.run(f"kill {pid}")
    assert rc == 0, said
    assert not host.file(partial).exists


def test_a_damaged_archive_is_not_loaded(host: Host, tiny: dict[str, str]) -> None:
    before = images(host)
    rc, said = ensure(
        host,
        repository="127.0.0.1:9/tiny",
        digest=ABSENT,
        id=tiny["id"],
        archive="/tmp/tiny.tar",
        archive_sha256="1" * 64,
    )
    assert rc == 1
    assert "nothing was loaded" in said["msg"]
    assert images(host) == before


def test_an_archive_of_another_image_is_unloaded(host: Host, tiny: dict[str, str]) -> None:
    before = images(host)
    rc, said = ensure(
        host,
        repository="127.0.0.1:9/tiny",
        digest=ABSENT,
        id="sha256:" + "2" * 64,
        archive="/tmp/tiny.tar",
        archive_sha256=tiny["sha256"],
    )
    assert rc == 1
    assert "it was unloaded" in said["msg"]
    assert images(host) == before


def test_a_pull_that_was_only_begun_says_at_its_end_what_matched(host: Host, tiny: dict[str, str]) -> None:
    """As playbooks/provision.yml does it, with an image that is not there yet and is not the pinned one."""
    image = {"repository": "127.0.0.1:9/tiny", "digest": ABSENT, "id": ""}
    rc, said = play(
        image,
        playbook="background.yml",
        settings={"runtime_image_archive": "/tmp/tiny.tar", "runtime_image_archive_sha256": tiny["sha256"]},
    )
    assert rc == 0, said
    # Ansible breaks a long message where it likes.
    said = " ".join(said.split())
    assert f"{host.backend.host.name}: runtime image {tiny['id'][:19]} by archive sha256, from archive" in said
    assert f"NOT the validated image, but archive sha256:{tiny['sha256']}" in said


def test_credentials_stay_nowhere(host: Host) -> None:
    secret = "correct-horse-battery-staple"
    ensure(host, f"REAP_REGISTRY_USER=me REAP_REGISTRY_PASSWORD={secret}", digest=ABSENT, id="")
    found = host.run(
        f"grep -rlF {secret} /root /home /etc /run/reap /var/lib/reap /var/lib/docker/*.json /tmp 2>/dev/null"
    )
    assert found.stdout == ""


def test_a_pull_that_is_cut_off_leaves_what_was_there_and_the_next_run_ends_it(
    host: Host, tiny: dict[str, str]
) -> None:
    host.check_output("docker load -i /tmp/tiny.tar && docker tag tiny:one reap-runtime:served")
    served = host.check_output("docker inspect --format '{{.Id}}' reap-runtime:served")
    host.check_output(f"docker rmi -f {FACTS['id']}")
    assert host.run(f"docker inspect {FACTS['id']}").rc != 0
    progress = "/tmp/pull.json"
    words = shlex.join([REAP, "image", "base", "--base", json.dumps(PINNED), "--progress", progress])
    # Cut off as soon as a good part of the first layers has come.
    done = f'python3 -c \'import json; assert json.load(open("{progress}"))["done"] > 20e6\' 2>/dev/null'
    wait = f"until {done}; do kill -0 $pull || exit 7; done"
    cut = f"rm -f {progress}; {words} & pull=$!; {wait}; kill -9 $pull; wait $pull"
    assert host.run(cut).rc == 137
    assert host.run(f"docker inspect {FACTS['reference']}@{FACTS['digest']}").rc != 0
    assert host.check_output("docker inspect --format '{{.Id}}' reap-runtime:served") == served
    # The next run meets a registry that dies in the middle and comes back once the pull has noticed.
    die = f"{wait}; systemctl stop lab-registry.socket lab-registry.service"
    seen = f"until grep -q -e 'broke off' -e Retrying {progress}; do kill -0 $pull || exit 8; done"
    try:
        ran = host.run(
            f"rm -f {progress}; {words} & pull=$!; {die}; {seen}; systemctl start lab-registry.socket; wait $pull"
        )
    finally:
        host.check_output("systemctl start lab-registry.socket")
    assert ran.rc == 0, ran.stdout + ran.stderr
    said = json.loads(ran.stdout)
    assert (said["changed"], said["base"]["source"], said["base"]["validated"]) == (True, "registry", True)
    assert host.check_output("docker inspect --format '{{.Id}}' reap-runtime:served") == served
    host.run("docker rmi reap-runtime:served")


# A registry with a login


USER, PASSWORD = "me", "tram-lagoon-74-pepper"
HTPASSWD = f"{USER}:$2b$04$vbdvSwteIePPO.dEyw9Nfualqxg80aRu2LRTEBrLITt9mBdSXFpQ2"  # bcrypt of PASSWORD
LOGIN = "127.0.0.1:5055"
REGISTRY = f"""
version: 0.1
storage: {{filesystem: {{rootdirectory: /tmp/login/data}}}}
http: {{addr: "{LOGIN}"}}
"""
# Reads a password from its standard input, then looks at all command lines until something more comes.
WATCH = """
import glob, select, sys
secret, found = sys.stdin.readline().strip().encode(), set()
while not select.select([sys.stdin], [], [], 0.02)[0]:
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            words = open(path, "rb").read()
        except OSError:
            continue
        if secret in words:
            found.add(words.replace(b"\\0", b" ").decode(errors="replace"))
print(sorted(found))
"""


@pytest.fixture
def guarded(host: Host, tiny: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Debian's docker-registry with htpasswd on the host, and a tiny image in it."""
    host.check_output(
        "mkdir -p /tmp/login && cd /tmp/login && chmod 777 . && { apt-get download -q docker-registry"
        " || { apt-get update -q && apt-get download -q docker-registry; }; } && dpkg -x docker-registry_*.deb ."
    )
    realm = "auth: {htpasswd: {realm: test, path: /tmp/login/htpasswd}}\n"
    host.check_output(f"printf %s {shlex.quote(HTPASSWD)} > /tmp/login/htpasswd")
    for name, text in (("open", REGISTRY), ("login", REGISTRY + realm)):
        host.check_output(f"printf %s {shlex.quote(text)} > /tmp/login/{name}.yml")
    run = "systemd-run -q --collect --unit=login-registry /tmp/login/usr/bin/docker-registry serve"
    up = f"timeout 300 sh -c 'until curl -s -o /dev/null http://{LOGIN}/v2/; do :; done'"
    try:
        host.check_output(f"{run} /tmp/login/open.yml && {up}")
        host.check_output(f"docker load -i /tmp/tiny.tar && docker tag tiny:one {LOGIN}/tiny:one")
        host.check_output(f"docker push -q {LOGIN}/tiny:one")
        digest = host.check_output(f"docker inspect --format '{{{{index .RepoDigests 0}}}}' {LOGIN}/tiny:one")
        host.check_output(f"docker rmi -f {tiny['id']}")
        host.check_output(f"systemctl stop login-registry && {run} /tmp/login/login.yml && {up}")
        yield {"repository": f"{LOGIN}/tiny", "digest": digest.rpartition("@")[2], "id": ""}
    finally:
        host.run("systemctl stop login-registry; rm -rf /tmp/login")
        host.run(f"docker rmi -f {tiny['id']}")


def play(
    image: dict[str, Any], playbook: str = "converge.yml", settings: dict[str, Any] | None = None, **environment: str
) -> tuple[int, str]:
    """A playbook of the scenario with another image, and what it said."""
    command = [str(REPOSITORY / ".venv/bin/ansible-playbook"), str(SCENARIO / playbook), "-vvv"]
    command += [f"--inventory={REPOSITORY / 'molecule/shared/inventory'}", f"--inventory={SCENARIO / 'inventory'}"]
    command += ["-e", json.dumps({"reap_runtime_image": {**image, "free_bytes": 1}, **(settings or {})})]
    unwanted = ("ANSIBLE_", "MOLECULE_", "FORCE_COLOR", "PY_COLORS", "REAP_REGISTRY")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    kept |= {"ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "LC_ALL": "C.UTF-8", **environment}
    done = subprocess.run(command, cwd=REPOSITORY, env=kept, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_credentials_are_used_for_the_pull_and_stay_nowhere(host: Host, guarded: dict[str, Any]) -> None:
    name = host.backend.host.name
    host.check_output(f"printf %s {shlex.quote(WATCH)} > /tmp/watch.py")
    ssh = ["ssh", "-F", str(REPOSITORY / ".cache/sim/ssh_config"), name]
    command = [*ssh, "sudo python3 /tmp/watch.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdin is not None
        watcher.stdin.write(f"{PASSWORD}\n")
        watcher.stdin.flush()
        rc, said = play(guarded, REAP_REGISTRY_USER=USER, REAP_REGISTRY_PASSWORD=PASSWORD)
        lines, _ = watcher.communicate("end")
    assert rc == 0, said
    assert PASSWORD not in said
    assert lines.strip() == "[]"
    host.check_output(f"docker inspect {guarded['repository']}@{guarded['digest']}")
    host.check_output("rm -r /tmp/login/htpasswd /tmp/watch.py")
    # Over standard input, because sudo writes command lines to the journal.
    search = "sudo grep -rlFf - /root /home /etc /opt/reap /run /var/lib/reap /var/log /tmp 2>/dev/null"
    found = subprocess.run([*ssh, search], input=f"{PASSWORD}\n", capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (1, "")
    assert PASSWORD not in host.check_output("journalctl --no-pager")
    assert not host.file("/root/.docker/config.json").exists


def test_a_wrong_password_is_one_clear_error(host: Host, guarded: dict[str, Any]) -> None:
    before = images(host)
    for environment in ("", "REAP_REGISTRY_USER=me REAP_REGISTRY_PASSWORD=wrong"):
        rc, said = ensure(host, environment, **guarded)
        assert rc == 1
        assert said["msg"].startswith(f"registry: {LOGIN} refuses {guarded['repository']}@{guarded['digest']}")
        assert "set REAP_REGISTRY_USER and REAP_REGISTRY_PASSWORD" in said["msg"]
        assert "wrong" not in said["msg"]
    assert images(host) == before


# The cutlass layer


def wheel(name: str, files: dict[str, str], *metadata: str) -> str:
    """Shell commands that put a wheel of version 4.5.1 into the folder; a double of the real one, a few bytes long."""
    info = f"{name}-4.5.1.dist-info"
    words = ["Metadata-Version: 2.1", f"Name: {name.replace('_', '-')}", "Version: 4.5.1", *metadata, ""]
    files = {
        **files,
        f"{info}/METADATA": "\n".join(words),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    program = textwrap.dedent(
        f"""
        import json, zipfile
        with zipfile.ZipFile("{name}-4.5.1-py3-none-any.whl", "w") as archive:
            for path, text in json.loads({json.dumps(files)!r}).items():
                archive.writestr(path, text)
        """
    )
    return f"python3 -c {shlex.quote(program)}"


def send_pip(host: Host, target: str) -> None:
    """Copy the controller's pip to the host; the simulated image has none."""
    tar = ["tar", "c", "--exclude=__pycache__", "-C", str(Path(pip.__file__).parent), "."]
    ssh = ["ssh", "-F", str(REPOSITORY / ".cache/sim/ssh_config"), host.backend.host.name]
    with subprocess.Popen(tar, stdout=subprocess.PIPE) as packed:
        subprocess.run([*ssh, f"mkdir -p {target} && tar x -C {target}"], stdin=packed.stdout, check=True)


def test_the_cutlass_layer_is_built_on_a_base_that_is_here(host: Host) -> None:
    """The base is the simulated Spark's real image with the real pip in it; the package index is a double in a folder
    of the image: two wheels of a few bytes with the real ones' names, version and dependency."""
    extra = ("Provides-Extra: cu13", 'Requires-Dist: nvidia-cutlass-dsl-libs-cu13==4.5.1; extra == "cu13"')
    wheels = [
        wheel("nvidia_cutlass_dsl", {}, *extra),
        wheel("nvidia_cutlass_dsl_libs_cu13", {"cutlass/__init__.py": "", "cutlass/cute.py": "def fmin(): ..."}),
    ]
    index = "printf '[global]\\nno-index = true\\nfind-links = /wheels\\n' > /etc/pip.conf"
    site = "import sys; print(next(path for path in sys.path if path.endswith('dist-packages')))"
    install = f'site="$(python3 -c {shlex.quote(site)})" && mkdir -p "$site" && mv /pip "$site"'
    make = " && ".join(["mkdir /wheels", "cd /wheels", *wheels, index, install])
    pinned = f"{FACTS['reference']}@{FACTS['digest']}"
    source = {"repository": "127.0.0.1:9/nothing", "digest": ABSENT, "id": "", "cutlass_base": "cutlass:base"}
    source["state"] = "/tmp/cutlass-images.json"
    package = "nvidia-cutlass-dsl[cu13]==4.5.1"
    try:
        send_pip(host, "/tmp/pip")
        host.check_output(f"docker create --name make-cutlass --entrypoint sh {pinned} -c {shlex.quote(make)}")
        host.check_output("docker cp /tmp/pip make-cutlass:/pip && docker start --attach make-cutlass")
        entry, words = (json.dumps(value) for value in (["vllm"], ["serve"]))
        changes = shlex.join(["--change", f"ENTRYPOINT {entry}", "--change", f"CMD {words}"])
        host.check_output(f"docker commit {changes} make-cutlass cutlass:base && docker rm make-cutlass")
        before = images(host)
        rc, said = ensure(host, **source, cutlass_package="nvidia-cutlass-dsl[cu13]==4.5.0")
        assert rc == 1
        assert "nvidia-cutlass-dsl[cu13]==4.5.0 cannot be installed on cutlass:base" in said["msg"]
        assert images(host) == before
        rc, said = ensure(host, **source, cutlass_package=package)
        assert rc == 0, said
        assert (said["base"]["source"], said["base"]["validated"]) == ("build", False)
        built, base = (
            json.loads(host.check_output(f"docker inspect {i}"))[0] for i in (said["base"]["id"], "cutlass:base")
        )
        for key in ("Entrypoint", "Cmd", "Env", "WorkingDir", "User"):
            assert (built["Config"].get(key) or None) == (base["Config"].get(key) or None), key
        look = (
            "import cutlass.cute, importlib.metadata as m; print(m.version('nvidia-cutlass-dsl'), cutlass.cute.fmin())"
        )
        ran = host.check_output(f"docker run --rm --entrypoint python3 {built['Id']} -c {shlex.quote(look)}")
        assert ran == "4.5.1 None"
        # Patched, the image has the layer's labels too, and must not be taken for the layer.
        layer = {**PINNED, **source, "cutlass_package": package}
        wanted = {"identity": "cutlass:base", "router": "torch", "patch_set": patch_set("torch")}
        wanted["name"] = image_name("cutlass:base", "torch")
        command = [REAP, "image", "patched", "--base", json.dumps(layer), "--build", json.dumps(wanted)]
        first, second = (json.loads(host.run(shlex.join(command)).stdout) for _ in range(2))
        assert (first.get("msg"), first["changed"]) == (None, True)
        assert second == {**first, "changed": False, "report": None, "pruned": []}
        labels = json.loads(host.check_output(f"docker inspect {first['id']}"))[0]["Config"]["Labels"]
        assert labels["io.reap.base"] == f"{package} on cutlass:base"
        assert (labels["io.reap.base-id"], labels["io.reap.base-validated"]) == (built["Id"], "false")
        again = ensure(host, **source, cutlass_package=package)[1]
        assert (again["changed"], again["base"]["matched"]) == (False, "cutlass layer built here")
        assert again["base"]["id"] == built["Id"]
        assert host.check_output("docker ps --all --quiet") == ""
        # What was made goes, and the base that it was made on stays.
        removed = json.loads(host.check_output(shlex.join([REAP, "image", "remove", "--base", json.dumps(layer)])))
        assert {first["image"], f"reap-base-cutlass:{base['Id'][7:19]}"} <= set(removed["removed"])
        assert images(host) == before
    finally:
        host.run("docker rm -f make-cutlass; docker rmi cutlass:base; rm -f /tmp/cutlass-images.json")


# Tidying up


def test_what_the_recipe_brought_goes_and_what_others_have_stays(host: Host, tiny: dict[str, str]) -> None:
    own = {
        "repository": "127.0.0.1:9/tiny",
        "digest": ABSENT,
        "id": "",
        "archive": "/tmp/tiny.tar",
        "archive_sha256": tiny["sha256"],
        "state": "/tmp/own-images.json",
    }
    remove = shlex.join([REAP, "image", "remove", "--base", json.dumps({**PINNED, **own})])
    host.check_output("tar c -C /etc hostname | docker import - somebody/elses:image")
    try:
        before = images(host)
        assert ensure(host, **own)[0] == 0
        host.check_output("docker create --name uses reap-base:000000000000 none")
        assert json.loads(host.check_output(remove))["removed"] == []
        host.check_output("docker rm uses")
        assert "reap-base:000000000000" in json.loads(host.check_output(remove))["removed"]
        assert images(host) == before
    finally:
        host.run("docker rm -f uses; docker rmi somebody/elses:image; rm -f /tmp/own-images.json")
