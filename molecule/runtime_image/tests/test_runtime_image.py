"""The pinned image on a real engine: identities, sources, and what a failing source leaves behind."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

FACTS = json.loads((Path(__file__).resolve().parents[3] / ".cache/sim/facts.json").read_text())["runtime_image"]
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
    return str(host.check_output("docker images --all --digests --no-trunc | sort"))


@pytest.fixture
def tiny(host: Host) -> Any:
    """An image of a few bytes and its archive: what is true of it is true of one of 20 GB."""
    host.check_output(
        "mkdir -p /tmp/tiny && date +%N > /tmp/tiny/file && tar c -C /tmp/tiny . | docker import - tiny:one"
    )
    identity = host.check_output("docker inspect --format '{{.Id}}' tiny:one")
    host.check_output("docker save -o /tmp/tiny.tar tiny:one && docker rmi tiny:one")
    yield {"id": identity, "sha256": host.check_output("sha256sum /tmp/tiny.tar").split()[0]}
    host.run("docker rmi -f $(docker images -q --filter reference=tiny --filter reference=reap-base:000000000000)")


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
    assert "nothing was downloaded" in said["msg"]


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
    assert said["base"]["matched"] == "archive sha256"
    assert ensure(host, id="", **source)[1]["changed"] is False


def test_an_archive_from_a_url_goes_on_where_it_broke_off(host: Host, tiny: dict[str, str]) -> None:
    partial = f"/var/lib/reap/image-{tiny['sha256'][:12]}.tar.partial"
    host.check_output(f"head -c 2000 /tmp/tiny.tar > {partial}")
    pid = host.check_output(
        "cd /tmp && { setsid python3 -m http.server --bind 127.0.0.1 8791 >/dev/null 2>&1 & echo $!; }"
    )
    try:
        look = "import urllib.request as u; u.urlopen('http://127.0.0.1:8791/')"
        host.check_output(f"timeout 30 sh -c 'until python3 -c \"$0\" 2>/dev/null; do :; done' {shlex.quote(look)}")
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
    rc, said = ensure(host)
    assert rc == 0, said
    assert (said["changed"], said["base"]["source"]) == (True, "registry")
    assert host.check_output("docker inspect --format '{{.Id}}' reap-runtime:served") == served
    host.run("docker rmi reap-runtime:served")
