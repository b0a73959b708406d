"""One model on four hosts: from the hub once, from each other over SSH, and what happens when a giver is lost."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import testinfra
import yaml
from testinfra.host import Host

from sim import engine, hosts
from sim.common import object_name

REPOSITORY = Path(__file__).resolve().parents[3]
SCENARIO = REPOSITORY / "molecule" / "model_fleet"
REPO = "sim/many"
REVISION = json.loads((REPOSITORY / ".cache/sim/facts.json").read_text())["checkpoints"][REPO]["revision"]
DEST = f"/var/lib/reap/models/{REPO}/{REVISION}"
NAMES = [f"reap-fleet-{number}" for number in (1, 2, 3, 4)]
PRIVATE = {f"spark@10.77.0.{name[-1]}": name for name in NAMES}
KEYS = "/run/reap/fetch-peers"


def on(name: str) -> Host:
    return testinfra.get_host(f"ssh://{name}?ssh_config={hosts.SSH_CONFIG}&sudo=true")


def manifest(host: Host) -> Any:
    return json.loads(host.check_output(f"cat {DEST}/reap-manifest.json"))


def sources() -> dict[str, str]:
    """Where each host has the model from: ``hub``, or the name of the host that gave it."""
    found = {name: str(manifest(on(name))["source"]) for name in NAMES}
    return {name: PRIVATE.get(source.removeprefix("peer:"), source) for name, source in found.items()}


def assert_whole(host: Host) -> None:
    """By the words of another program, and with no link among the files."""
    record = manifest(host)
    assert (record["repo"], record["commit"]) == (REPO, REVISION)
    sums = "".join(f"{entry['sha256']}  {DEST}/{entry['name']}\n" for entry in record["files"])
    done = host.run("printf %s | sha256sum --check --quiet --strict", sums)
    assert done.rc == 0, done.stdout
    assert int(host.check_output(f"find {DEST} -type f ! -name reap-manifest.json | wc -l")) == len(record["files"])
    assert host.check_output("find /var/lib/reap/models -type l -o -name '*.partial'") == ""


def requests() -> list[dict[str, Any]]:
    """The hub's answers with files of this revision; the revision is new in each run of the scenario."""
    log = (REPOSITORY / ".cache/sim/hub-state/requests.jsonl").read_text().splitlines()
    wanted = f"/{REPO}/resolve/{REVISION}/"
    return [line for line in map(json.loads, log) if line["method"] == "GET" and line["path"].startswith(wanted)]


def test_every_host_has_the_whole_model(host: Host) -> None:
    assert_whole(host)


def test_the_hub_gave_each_file_once() -> None:
    counts = Counter(line["path"] for line in requests())
    assert len(counts) == len(manifest(on(NAMES[0]))["files"])
    assert set(counts.values()) == {1}


def test_the_copies_form_a_tree_over_the_private_addresses() -> None:
    found = sources()
    first = [name for name, source in found.items() if source == "hub"]
    # The one that model_fetch_seeds names.
    assert first == [NAMES[1]]
    # Two rounds: that one gives one copy and then another, and whoever got the first gives the third.
    given = Counter(source for name, source in found.items() if name not in first)
    assert given[first[0]] == 2
    assert sorted(given.values()) == [1, 2]
    assert set(given) < set(NAMES)


def test_no_key_of_the_run_is_left(host: Host) -> None:
    lines = host.check_output("cat /home/spark/.ssh/authorized_keys").splitlines()
    assert [line.split()[2] for line in lines] == ["reap-sim"]
    assert not host.file(KEYS).exists


# --- a giver that is lost; each of these tests begins with hosts that have the model and one that has not ---


def limit(name: str, rate: str) -> None:
    on(name).check_output(f"tc qdisc replace dev eth0 root tbf rate {rate} burst 1mb latency 100ms")


def play_model(inventory: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [str(REPOSITORY / ".venv/bin/ansible-playbook"), str(SCENARIO / "converge.yml"), *arguments]
    command += [f"--inventory={REPOSITORY / 'molecule/shared/inventory'}", f"--inventory={inventory}"]
    unwanted = ("ANSIBLE_", "MOLECULE_", "FORCE_COLOR", "PY_COLORS")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    environment |= {"ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "LC_ALL": "C.UTF-8"}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@contextmanager
def receiving(receiver: str, *givers: str, **variables: Any) -> Iterator[subprocess.Popen[str]]:
    """The play runs over these hosts, and the receiver has begun to copy."""
    on(receiver).check_output(f"rm -rf {DEST} {DEST}.partial /run/reap/progress/model_fetch.json")
    limit = ",".join([receiver, *givers])
    process = play_model(SCENARIO / "inventory", "--limit", limit, "-e", json.dumps(variables))
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def copying(receiver: str, at_least: int = 20_000_000, after_unix: float = 0.0) -> tuple[str, int]:
    """The giver's name and the bytes that are there, once a copy has come so far; by a report of after that time."""
    # One connection that waits on the host, not one for each look.
    script = f"""
import json, sys, time
end = time.monotonic() + 90
while time.monotonic() < end:
    try:
        state = json.load(open("/run/reap/progress/model_fetch.json"))
    except (OSError, ValueError):
        state = {{}}
    source = str(state.get("source"))
    if source.startswith("peer:") and state["done"] >= {at_least} and state["updated_unix"] > {after_unix}:
        print(source, state["done"])
        sys.exit()
    time.sleep(0.05)
sys.exit("no copy came so far: " + json.dumps(state))
"""
    source, done = on(receiver).check_output(f"python3 -c {shlex.quote(script)}").split()
    return PRIVATE[source.removeprefix("peer:")], int(done)


def sent(name: str) -> int:
    return int(on(name).check_output("cat /sys/class/net/eth0/statistics/tx_bytes"))


def test_a_giver_whose_session_dies_is_tried_again_and_then_the_hub_is_next() -> None:
    giver, receiver = NAMES[0], NAMES[3]
    limit(giver, "60mbit")
    asked = len(requests())
    with receiving(receiver, giver) as play:
        _, first = copying(receiver)
        on(giver).check_output("pkill -KILL --exact rsync")
        # What came is kept: the second copy of the same giver begins where the first one ended.
        killed = float(on(giver).check_output("date +%s.%N"))
        _, second = copying(receiver, first + 10_000_000, killed + 1)
        on(giver).check_output("pkill -KILL --exact rsync")
        out, _ = play.communicate(timeout=120)
    assert play.returncode == 0, out
    assert_whole(on(receiver))
    assert manifest(on(receiver))["source"] == "hub"
    came = sum(line["bytes"] for line in requests()[asked:])
    # Only what had not come yet, and at most the rest of one file.
    assert came <= manifest_size(receiver) - second + FILE_BYTES


FILE_BYTES = 4 << 20


def manifest_size(name: str) -> int:
    return sum(entry["size"] for entry in manifest(on(name))["files"])


def test_a_giver_that_loses_its_power_is_replaced_by_another() -> None:
    receiver, givers = NAMES[3], NAMES[:3]
    for name in givers:
        limit(name, "60mbit")
    asked = len(requests())
    with receiving(receiver, *givers) as play:
        giver, came = copying(receiver)
        others = [name for name in givers if name != giver]
        keys = {name: on(name).check_output(f"sha256sum < {KEYS}/key") for name in [receiver, *others]}
        rights = on(others[0]).check_output("cat /home/spark/.ssh/authorized_keys").splitlines()[1:]
        before = {name: sent(name) for name in others}
        docker = engine.require()
        docker.docker("kill", object_name("host", giver))
        try:
            for name in others:
                limit(name, "200mbit")
            out, _ = play.communicate(timeout=180)
        finally:
            # With its disk, and without its memory and what was configured for one boot.
            hosts.up(giver)
            address = next(address for address, name in PRIVATE.items() if name == giver).rpartition("@")[2]
            on(giver).check_output(f"ip address replace {address}/24 dev eth0")
    assert_whole(on(receiver))
    replacement = sources()[receiver]
    assert replacement in others, out
    # The one that was lost is named, by its address, and no other.
    told = json.loads(on(receiver).check_output("tail -n 1 /run/reap/jobs/model_fetch/stdout"))
    assert {PRIVATE[warning.partition(": ")[0]] for warning in told["warnings"]} == {giver}, told["warnings"]
    assert len(requests()) == asked
    # No private key is on two hosts, and what a key opens is one command, for a week.
    assert len(set(keys.values())) == len(keys)
    assert len(rights) == 3
    command = r'command="/opt/reap/bin/reap fetch --serve-peer --models /var/lib/reap/models"'
    assert all(re.match(rf'restrict,expiry-time="\d{{12}}",{re.escape(command)} ssh-ed25519 ', line) for line in rights)
    # Files that had come whole are not sent again, and the one that was cut off is continued.
    size = manifest_size(receiver)
    assert sent(replacement) - before[replacement] < 1.1 * (size - came + FILE_BYTES)


def job(name: str) -> str:
    return str(json.loads(on(name).check_output("cat /run/reap/jobs/model_fetch/job.json"))["id"])


def test_a_play_that_was_interrupted_attaches_and_hands_over_its_keys() -> None:
    """The second play's keys replace the first one's while the copy runs, and the next connection needs them."""
    giver, other, receiver = NAMES[0], NAMES[1], NAMES[3]
    limit(giver, "30mbit")
    asked = len(requests())
    rights = "sha256sum < /home/spark/.ssh/authorized_keys"
    with receiving(receiver, giver) as first:
        copying(receiver)
        before, begun = on(giver).check_output(rights), job(receiver)
        first.kill()
        first.communicate()
    # One more host than before: the command for the same step is another one.
    second = play_model(SCENARIO / "inventory", "--limit", ",".join([receiver, giver, other]))
    changed = f'until [ "$({rights})" != {shlex.quote(before)} ]; do sleep 0.2; done'
    try:
        on(giver).check_output(f"timeout 120 sh -c {shlex.quote(changed)}")
        on(giver).run("pkill -KILL --exact rsync")
        out, _ = second.communicate(timeout=240)
    finally:
        if second.poll() is None:
            second.kill()
            second.communicate()
        limit(giver, "200mbit")
    assert second.returncode == 0, out
    assert job(receiver) == begun
    assert sources()[receiver] in (giver, other)
    assert len(requests()) == asked
    assert_whole(on(receiver))
    assert not on(receiver).file(KEYS).exists


def test_an_offline_fleet_takes_it_from_the_host_with_the_disk() -> None:
    """The folder is set for all, and the host that has it is not the first of the play."""
    disk, without = NAMES[3], NAMES[2]
    on(disk).check_output(f"rm -rf /var/lib/reap/disk && cp -a {DEST} /var/lib/reap/disk && rm -rf {DEST}")
    on(without).check_output(f"rm -rf {DEST} {DEST}.partial")
    asked = len(requests())
    extra = {"model_fetch_offline": True, "model_fetch_imports": ["/var/lib/reap/disk"], "model_fetch_seeds": []}
    play = play_model(SCENARIO / "inventory", "--limit", f"{without},{disk}", "-e", json.dumps(extra))
    out, _ = play.communicate(timeout=240)
    on(disk).check_output("rm -rf /var/lib/reap/disk")
    assert play.returncode == 0, out
    assert sources()[without] == disk
    assert manifest(on(disk))["source"] == "disk:/var/lib/reap/disk"
    assert len(requests()) == asked
    for name in (disk, without):
        assert_whole(on(name))


def test_a_folder_of_links_is_given_to_nobody() -> None:
    """As a cache of links: by its names and sizes all is there."""
    giver, receiver = NAMES[0], NAMES[3]
    on(giver).check_output(
        f"cp -a {DEST} /var/lib/reap/elsewhere && cd {DEST} && "
        "for name in *.safetensors; do ln -sf /var/lib/reap/elsewhere/$name $name; done"
    )
    key, user = "/root/peer-key", "/home/spark/.ssh/authorized_keys"
    on(receiver).check_output(f"rm -f {key} {key}.pub && ssh-keygen -q -t ed25519 -N '' -f {key}")
    public = on(receiver).check_output(f"cat {key}.pub")
    command = "/opt/reap/bin/reap fetch --serve-peer --models /var/lib/reap/models"
    on(giver).check_output("printf %s >> %s", f'restrict,command="{command}" {public}\n', user)
    ask = f"ssh -i {key} -o BatchMode=yes -o StrictHostKeyChecking=accept-new spark@10.77.0.1"
    told = on(receiver).check_output(f"{ask} have {REPO} {REVISION}")
    assert json.loads(told) == {"state": "absent"}
    copied = on(receiver).run(
        f"rsync -rtL --inplace --partial -e {shlex.quote(ask.rpartition(' ')[0])} spark@10.77.0.1:{DEST}/ /root/x/"
    )
    assert copied.rc != 0
    assert "reads one verified model revision and nothing else" in copied.stderr


def test_a_host_that_is_no_spark_downloads_and_passes_it_on() -> None:
    outside, spark = NAMES[1], NAMES[2]
    fleet = yaml.safe_load((SCENARIO / "inventory/hosts.yml").read_text())["sparks"]
    sim = yaml.safe_load((REPOSITORY / "inventories/sim/group_vars/sparks.yml").read_text())
    own = yaml.safe_load((REPOSITORY / "molecule/shared/inventory/hosts.yml").read_text())["sparks"]["vars"]
    own |= {key: value for key, value in sim.items() if key.startswith("model_fetch_")}
    groups = {
        "all": {"vars": fleet["vars"] | {"model_fetch_revision": REVISION, "model_fetch_seeds": [outside]}},
        "model_sources": {"hosts": {outside: fleet["hosts"][outside]}, "vars": own},
        "sparks": {"hosts": {spark: fleet["hosts"][spark]}},
    }
    for name in (outside, spark):
        on(name).check_output(f"rm -rf {DEST} {DEST}.partial")
    asked = len(requests())
    with tempfile.TemporaryDirectory(dir=REPOSITORY / ".cache") as folder:
        inventory = Path(folder, "hosts.yml")
        inventory.write_text(yaml.safe_dump(groups))
        play = play_model(inventory)
        out, _ = play.communicate(timeout=240)
    assert play.returncode == 0, out
    assert (sources()[outside], sources()[spark]) == ("hub", outside)
    assert max(Counter(line["path"] for line in requests()[asked:]).values()) == 1
    assert_whole(on(spark))
