"""The role model_fetch on a real host: what lies there, and what its filesystem and its hub can do to it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

REPOSITORY = Path(__file__).resolve().parents[3]
TOKEN = "hf_open_sesame_0123456789"
REPO = "sim/needle"
FACTS = json.loads((REPOSITORY / ".cache/sim/facts.json").read_text())
REVISION = FACTS["checkpoints"][REPO]["revision"]
MODELS = "/var/lib/reap/models"
DEST = f"{MODELS}/{REPO}/{REVISION}"
HUB = "http://127.0.0.1:5080"


def fetch(host: Host, dest: str, *more: str, repo: str = REPO, revision: str = REVISION) -> Any:
    words = ["/opt/reap/bin/reap", "fetch", f"--repo={repo}", f"--revision={revision}", f"--dest={dest}"]
    words += ["--downloader=/opt/reap/downloader/bin/python", f"--endpoint={HUB}", "--patience=3", *more]
    return host.run(shlex.join(words))


def manifest(host: Host, dest: str = DEST) -> Any:
    return json.loads(host.file(f"{dest}/reap-manifest.json").content_string)


def test_the_model_is_whole_by_the_words_of_another_program(host: Host) -> None:
    record = manifest(host)
    assert (record["repo"], record["commit"]) == (REPO, REVISION)
    sums = "".join(f"{entry['sha256']}  {DEST}/{entry['name']}\n" for entry in record["files"])
    done = host.run("printf %s | sha256sum --check --quiet --strict", sums)
    assert done.rc == 0, done.stdout
    assert len(record["files"]) == int(host.check_output(f"find {DEST} -type f ! -name reap-manifest.json | wc -l"))
    assert host.check_output(f"find {MODELS} -type l -o -name '*.partial'") == ""


def test_a_reader_without_rights_can_serve_it(host: Host) -> None:
    assert host.run(f"find {DEST} ! -perm -o=r").stdout == ""
    assert host.file(DEST).mode == 0o755


def test_the_downloader_is_the_pinned_one(host: Host) -> None:
    wanted = (
        (REPOSITORY / "roles/model_fetch/files/requirements.in").read_text().split("huggingface_hub==")[1].split()[0]
    )
    program = "import huggingface_hub; print(huggingface_hub.__version__)"
    assert host.check_output(f"/opt/reap/downloader/bin/python -c '{program}'") == wanted


def test_the_token_is_nowhere_on_the_host(host: Host) -> None:
    folders = "/run /etc /opt/reap /var/lib/reap /var/log /root /home /tmp /var/tmp"
    assert host.run(f"grep -rIlsF {TOKEN} {folders}").stdout == ""
    assert host.run(f"journalctl --no-pager | grep -F {TOKEN} | grep -v 'grep -rIlsF'").stdout == ""


def test_a_second_look_is_cheap_and_says_ready(host: Host) -> None:
    done = fetch(host, DEST, "--check")
    assert (done.rc, json.loads(done.stdout)["ready"]) == (0, True)


def test_another_checkpoint_is_refused_and_the_one_that_is_there_stays(host: Host) -> None:
    done = fetch(host, DEST, '--expect={"n_routed_experts": 144}')
    assert done.rc == 2
    assert "n_routed_experts is missing, wanted 144" in done.stderr
    assert host.file(DEST).is_directory


@pytest.fixture
def small(host: Host) -> Iterator[str]:
    """A filesystem of the test's own; the name says where."""
    folder = "/mnt/small"
    host.run_test(f"mkdir -p {folder}")
    yield folder
    host.run(f"umount {folder}; rmdir {folder}")


def test_a_disk_that_is_too_small_is_refused_before_a_byte(host: Host, small: str) -> None:
    assert host.run(f"mount -t tmpfs -o size=1m tmpfs {small}").rc == 0
    done = fetch(host, f"{small}/{REPO}/{REVISION}")
    assert done.rc == 2
    assert re.search(r"free; wanted \d\.\d MB for the model", done.stderr)
    assert "model" not in host.run(f"ls -R {small} | grep safetensors").stdout


def test_a_disk_that_fills_up_is_named_and_then_continued(host: Host, small: str) -> None:
    # Files run out, not bytes: the check before the download passes, and the disk fills up on the way.
    assert host.run(f"mount -t tmpfs -o size=50m,nr_inodes=13 tmpfs {small}").rc == 0
    dest = f"{small}/{REPO}/{REVISION}"
    done = fetch(host, dest)
    assert done.rc == 2
    assert "No space left on device; free space there" in done.stderr
    assert not host.file(dest).exists
    assert host.run(f"mount -o remount,nr_inodes=1000 {small}").rc == 0
    assert fetch(host, dest).rc == 0
    assert host.file(dest).is_directory


def test_a_read_only_disk_is_named(host: Host, small: str) -> None:
    assert host.run(f"mount -t tmpfs -o size=50m,ro tmpfs {small}").rc == 0
    done = fetch(host, f"{small}/{REPO}/{REVISION}")
    assert done.rc == 2
    assert "Read-only file system; mount it for writing" in done.stderr


def test_a_hub_that_went_down_is_named(host: Host, small: str) -> None:
    name = host.backend.host.name

    def hub(action: str) -> None:
        command = ["python3", "-m", "sim", "service", "hub", action, "--host", name]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)

    hub("stop")
    try:
        done = fetch(host, f"{small}/{REPO}/{REVISION}")
        assert done.rc == 2
        assert f"{HUB} has not sent a byte" in done.stderr
        # What is there needs no hub.
        assert fetch(host, DEST).rc == 0
    finally:
        hub("start")


def test_an_old_revision_goes_only_when_asked_and_never_the_wanted(host: Host) -> None:
    old = f"{MODELS}/org/old/{'a' * 40}"
    host.run_test(f"mkdir -p {old} && echo x > {old}/model.bin")
    listed = json.loads(host.check_output(f"/opt/reap/bin/reap fetch --list --models {MODELS}"))["revisions"]
    assert {revision["path"] for revision in listed} == {DEST, old}
    done = host.run(f"/opt/reap/bin/reap fetch --models {MODELS} --prune unused --keep {DEST}")
    assert json.loads(done.stdout)["removed"] == [old]
    assert host.file(DEST).is_directory
