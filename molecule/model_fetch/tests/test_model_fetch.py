"""The role model_fetch on a real host: what lies there, and what its filesystem and its hub can do to it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

from sim import engine, hosts, services
from sim.common import object_name
from sim.hub.repository import Repositories
from sim.hub.requestlog import sent_twice

REPOSITORY = Path(__file__).resolve().parents[3]
SCENARIO = REPOSITORY / "molecule" / "model_fetch"
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


# Looks at every process, as fast as it can, until its input ends; what it looks for comes on the first line.
LOOK = """
import json, os, select, sys
token = sys.stdin.buffer.readline().strip()
print("looking", flush=True)
found = set()
while not select.select([sys.stdin], [], [], 0.01)[0]:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = open("/proc/%s/cmdline" % pid, "rb").read()
            environ = open("/proc/%s/environ" % pid, "rb").read()
            owner = os.stat("/proc/" + pid).st_uid
        except OSError:
            continue
        words = command.replace(b"\\0", b" ").decode(errors="replace")[:200]
        if token in command: found.add(("command line", words, owner))
        if token in environ: found.add(("environment", words, owner))
print(json.dumps(sorted(found)))
"""


def play(*more: str) -> tuple[int, str]:
    """The scenario's playbook once more, and what it said."""
    command = [str(REPOSITORY / ".venv/bin/ansible-playbook"), str(SCENARIO / "converge.yml"), *more]
    command += [f"--inventory={REPOSITORY / 'molecule/shared/inventory'}", f"--inventory={SCENARIO / 'inventory'}"]
    unwanted = ("ANSIBLE_", "MOLECULE_", "FORCE_COLOR", "PY_COLORS")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    environment |= {"ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@contextmanager
def faults(**content: Any) -> Iterator[None]:
    """The hub misbehaves as long as the block lasts."""
    file = REPOSITORY / ".cache/sim/hub-state/faults.json"
    file.write_text(json.dumps(content))
    try:
        yield
    finally:
        file.unlink()


def test_while_it_is_used_the_token_is_in_the_downloads_environment_only(host: Host) -> None:
    name = host.backend.host.name
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    host.check_output(f"rm -rf {DEST}")
    there = ["ssh", "-F", str(REPOSITORY / ".cache/sim/ssh_config"), name, f"sudo python3 -c {shlex.quote(LOOK)}"]
    watchers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for command in (there, [sys.executable, "-c", LOOK])
    ]
    for watcher in watchers:
        assert watcher.stdin is not None
        watcher.stdin.write(TOKEN + "\n")
        watcher.stdin.flush()
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "looking\n"
    # Only whoever has the token gets a file, and not at once.
    with faults(access={REPO: {"kind": "gated", "token_sha256": [digest]}}, total_bytes_per_s=1_000_000):
        rc, out = play("-vvv")
    on_host, here = (json.loads(watcher.communicate("\n", timeout=600)[0]) for watcher in watchers)
    assert rc == 0, out
    assert TOKEN not in out
    # This machine sees the simulated host's processes too, with their environments.
    assert [found for found in here if found[0] == "command line"] == []
    # Root's, and only the fetch and its own children: it did look at the right ones.
    assert {(where, owner) for where, _, owner in on_host} == {("environment", 0)}
    # A process that begins or ends between two looks has no words; one that stays is seen with them too.
    commands = {words.split(" --")[0].strip() for _, words, _ in on_host} - {""}
    assert any("reap.fetch.worker" in words for words in commands), commands
    assert all("reap.fetch.worker" in words or "/opt/reap/bin/reap fetch" in words for words in commands), commands


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


def test_a_disk_that_fills_up_while_a_shard_is_written_is_named_and_then_continued(host: Host, small: str) -> None:
    """Bytes run out in the midst of a write, after the check: somebody else fills the disk."""
    assert host.run(f"mount -t tmpfs -o size=50m tmpfs {small}").rc == 0
    dest = f"{small}/{REPO}/{REVISION}"
    unit = "fetch-full"
    command = ["/opt/reap/bin/reap", "fetch", f"--repo={REPO}", f"--revision={REVISION}", f"--dest={dest}"]
    command += ["--downloader=/opt/reap/downloader/bin/python", f"--endpoint={HUB}", "--patience=3"]
    with faults(total_bytes_per_s=200_000):
        host.check_output(f"systemd-run --quiet --unit={unit} --property=RemainAfterExit=yes {shlex.join(command)}")
        await_bytes(host, dest, 2_000_000, unit)
        assert host.run(f"dd if=/dev/zero of={small}/other bs=64k").rc != 0
        gone = f"until systemctl is-failed --quiet {unit}; do sleep 0.1; done"
        host.check_output(f"timeout 300 sh -c {shlex.quote(gone)}")
    said = host.check_output(f"journalctl --no-pager --unit={unit}; systemctl reset-failed {unit}")
    assert re.search(r"\.partial/\.reap/incoming/\S+: No space left on device; free space there", said), said
    assert not host.file(dest).exists
    begun = int(host.check_output(f"du -sb {dest}.partial | cut -f 1"))
    assert begun >= 2_000_000
    host.check_output(f"rm {small}/other")
    done = fetch(host, dest)
    assert done.rc == 0
    # What was written before is not fetched again.
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["fetched"] < told["size"] - 1_000_000


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


def test_a_full_verification_mends_one_file_and_what_was_asked_goes_but_never_the_previous(host: Host) -> None:
    victim = f"{DEST}/config.json"
    record = {entry["name"]: entry for entry in manifest(host)["files"]}["config.json"]
    # Same size, time and inode: only a look at the content finds it.
    host.check_output(
        f"cp -p {victim} /root/before && printf X | dd of={victim} conv=notrunc status=none && "
        f"touch -r /root/before {victim}"
    )
    previous, unused = (f"{MODELS}/org/old/{digit * 40}" for digit in "bc")
    # As the service keeps it: a configuration that served, and that a rollback goes to.
    generations = "/var/lib/reap/service/generations"
    host.check_output(f"mkdir -p {previous} {unused} {generations} && touch {previous}/model.bin {unused}/model.bin")
    host.check_output(f"printf %s > {generations}/before-0123456789ab.json", json.dumps({"model_dir": previous}))
    rc, out = play("-e", json.dumps({"model_fetch_verify": "full", "model_fetch_prune": ["unused"]}))
    assert rc == 0, out
    assert host.file(victim).sha256sum == record["sha256"]
    told = json.loads(host.check_output("cat /run/reap/jobs/model_fetch/stdout"))
    assert (told["fetched"], len(told["repaired"])) == (record["size"], 1)
    assert [host.file(folder).exists for folder in (DEST, previous, unused)] == [True, True, False]
    host.check_output(f"rm {generations}/before-0123456789ab.json")
    rc, out = play()
    assert (rc, "changed=0 " in out) == (0, True), out


# --- killed at a random byte, twenty times ---

KILLS = 20
MANY = "sim/many"
FILE_BYTES = 4 << 20


def await_bytes(host: Host, dest: str, at_least: int, unit: str) -> None:
    """Returns when the unfinished folder holds so many bytes, the fetch runs and there is nothing to serve.

    One connection that waits, not one for each look.
    """
    script = f"""
import os, subprocess, sys, time
end = time.monotonic() + 600
while time.monotonic() < end:
    total = 0
    for root, _, names in os.walk({dest + ".partial"!r}):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:
                pass
    if total >= {at_least}:
        subprocess.run(["systemctl", "is-active", {unit!r}], check=True)
        sys.exit("served" if os.path.exists({dest!r}) else 0)
    time.sleep(0.01)
sys.exit("only " + str(total))
"""
    host.check_output(f"python3 -c {shlex.quote(script)}")


def test_twenty_kills_of_the_client_the_hub_and_the_host(host: Host) -> None:
    """The host as by a power cut: every process of it at once. Its disk's cache is this machine's and stays."""
    name = host.backend.host.name
    docker = engine.require()
    hub = object_name("hub")
    publish = [sys.executable, "-m", "sim", "publish", MANY]
    done = subprocess.run(publish, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    revision = done.stdout.strip()
    wanted = Repositories(services.HUB_ROOT).revision(MANY, "main")
    assert wanted is not None
    total = sum(file.size for file in wanted.files.values())
    dest = f"{MODELS}/{MANY}/{revision}"
    command = ["/opt/reap/bin/reap", "fetch", f"--repo={MANY}", f"--revision={revision}", f"--dest={dest}"]
    command += ["--downloader=/opt/reap/downloader/bin/python", f"--endpoint={HUB}", "--stall-timeout=5"]
    units = (f"fetch-{number}" for number in range(KILLS + 1))

    def start() -> str:
        unit = next(units)
        host.check_output(f"systemd-run --quiet --unit={unit} {shlex.join(command)}")
        return unit

    chance = random.Random(11)
    # A connection to the host takes a moment, in which the download goes on: no two marks close together.
    marks = [int(total * 0.8 * (number + chance.random()) / KILLS) for number in range(KILLS)]
    killed = Counter[str]()
    times: list[float] = []
    with faults(total_bytes_per_s=2_000_000):
        unit = start()
        for number, mark in enumerate(marks):
            await_bytes(host, dest, mark, unit)
            victim = ("client", "hub", "host")[number % 3]
            killed[victim] += 1
            times.append(time.time())
            if victim == "hub":
                docker.docker("kill", hub)
                docker.docker("start", hub)
            elif victim == "client":
                host.check_output(f"systemctl kill --signal=KILL {unit}")
                unit = start()
            else:
                hosts.reboot(name, hard=True)
                unit = start()
        host.check_output(f"timeout 300 sh -c 'until [ -e {dest} ]; do sleep 0.1; done'")
    assert killed == {"client": 7, "hub": 7, "host": 6}
    found = {entry["name"]: entry["sha256"] for entry in manifest(host, dest)["files"]}
    there = {
        path.split("  ")[1].removeprefix("./"): path.split("  ")[0]
        for path in host.check_output(
            f"cd {dest} && find . -type f ! -name reap-manifest.json -exec sha256sum {{}} +"
        ).splitlines()
    }
    assert there == found
    assert found == {n: hashlib.sha256(f.location.read_bytes()).hexdigest() for n, f in wanted.files.items()}
    log = (services.HUB_STATE / "requests.jsonl").read_text().splitlines()
    twice = sent_twice(map(json.loads, log), f"/{MANY}/resolve/{revision}/", times)
    print(
        f"{total} bytes wanted, {sum(twice)} sent twice: {sum(twice) / KILLS / FILE_BYTES:.2f} files a kill, "
        f"{max(twice) / FILE_BYTES:.2f} at most"
    )
    assert max(twice) <= FILE_BYTES
    host.check_output(f"rm -rf {dest}")
