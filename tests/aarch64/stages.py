"""What each stage of `make test-aarch64` does and wants."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pages.memory_series import render_series_svg
from sim.aarch64 import bed, machine
from sim.common import GIB, REPOSITORY, say, wait_for, write_atomic, write_json
from tests.aarch64.want import want

if TYPE_CHECKING:
    from tests.aarch64.run import Run

FIRST, SECOND = "spark-aarch64", "spark-aarch64-b"
# MemTotal of two Sparks, GiB (docs/hosts.md), and what the emulator gives for the larger one, MiB.
MEM_TOTAL = {FIRST: 119.7, SECOND: 121.7}
SECOND_MIB = 127048
ARTIFACTS = REPOSITORY / "artifacts" / "aarch64"
# The floor and the hard floor of k144-nospec-200k, kB of MemAvailable.
FLOOR_KB, HARD_FLOOR_KB = 8388608, 3145728
KB_PER_GIB = 1024 * 1024
UNITS = ("reap.service", "reap-watchdog.service")
# MemAvailable "moves by tens of GB in seconds": so much within so long.
MOVED_GIB, MOVED_S = 20, 5.0
SERVICE, WATCHDOG = "/run/reap/service.json", "/run/reap/watchdog.json"
# Ansible, apt and the system itself write there; nothing of the recipe does.
NOT_OURS = (
    "/var/log", "/var/cache", "/var/lib/apt", "/var/lib/systemd", "/var/lib/private", "/var/lib/docker",
    "/var/lib/containerd", "/var/tmp", "/tmp", "/root/.ansible", f"/home/{bed.USER}/.ansible",
)  # fmt: skip
MARKER = "/run/before-the-stage"


# What the machine says.


def meminfo(name: str) -> dict[str, int]:
    """/proc/meminfo of the machine, kB."""
    text = machine.ssh(name, "cat /proc/meminfo")
    return {match[1]: int(match[2]) for match in re.finditer(r"^(\w+):\s+(\d+)", text, re.MULTILINE)}


def remote_json(name: str, path: str) -> dict[str, Any]:
    """A JSON file of the machine; empty where it is not there or the machine does not answer."""
    text = machine.ssh(name, f"sudo cat {path}", check=False)
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError:
        return {}
    return found


def await_json(name: str, path: str, wanted: Callable[[dict[str, Any]], bool], what: str, seconds: float = 600) -> Any:
    """The file's content as soon as it is what is wanted. A single reading can be seconds old."""
    found: dict[str, Any] = {}

    def ready() -> bool:
        found.clear()
        found.update(remote_json(name, path))
        return wanted(found)

    try:
        wait_for(ready, seconds, what, every=2.0)
    except Exception:
        say(f"{name}: {path} is {json.dumps(found)[:600]}")
        raise
    return dict(found)


def await_serving(name: str, another_than: str | None = None) -> dict[str, Any]:
    """The service's state once its model has answered in this boot, in another container than the one named."""
    boot = machine.boot_id(name)

    def wanted(state: dict[str, Any]) -> bool:
        serves = state.get("phase") == "serving" and state.get("boot_id") == boot
        return serves and state.get("container_id") not in (None, another_than)

    service: dict[str, Any] = await_json(name, SERVICE, wanted, f"reap.service on {name} serving again")
    return service


def await_guarding(name: str) -> dict[str, Any]:
    """The watchdog's state once it guards a serving model of this boot, with the profile's floor."""
    boot = machine.boot_id(name)

    def wanted(state: dict[str, Any]) -> bool:
        return state.get("phase") == "serving" and state.get("boot_id") == boot

    state: dict[str, Any] = await_json(name, WATCHDOG, wanted, f"the watchdog of {name} seeing a serving model", 120)
    want(state["floor_kb"] == FLOOR_KB, f"{name}: the floor is {state['floor_kb']} kB, wanted the profile's {FLOOR_KB}")
    want(state["hard_floor_kb"] == HARD_FLOOR_KB, f"{name}: the hard floor is {state['hard_floor_kb']} kB")
    want(state["hold_until_available_kb"] is None, f"{name}: the next start is held: {state}")
    return state


def events(name: str, after: int = 0) -> list[dict[str, Any]]:
    """The watchdog's events, without the first `after`."""
    text = machine.ssh(name, "sudo cat /var/lib/reap/watchdog/events.jsonl")
    return [json.loads(line) for line in text.splitlines()][after:]


def kind(event: dict[str, Any]) -> str:
    """The event in a word: a change of phase by the phase that it leads to."""
    return f"phase {event['phase']}" if event["event"] == "phase" else str(event["event"])


def want_in_order(found: list[dict[str, Any]], wanted: list[str]) -> None:
    """The wanted events are among those found, in this order."""
    kinds = [kind(event) for event in found]
    rest = iter(kinds)
    want(all(word in rest for word in wanted), f"events are {kinds}, wanted in this order {wanted}")


def units(name: str) -> dict[str, str]:
    """Both units are active, and will be after a boot."""
    found = {}
    for unit in UNITS:
        text = machine.ssh(name, f"systemctl is-active {unit}; systemctl is-enabled {unit}", check=False)
        found[unit] = " ".join(text.split())
    want(set(found.values()) == {"active enabled"}, f"{name}: units are {found}")
    return found


def completion(name: str) -> str:
    """What the endpoint answers to a chat."""
    served = remote_json(name, SERVICE)["served_model_name"]
    body = {"model": served, "messages": [{"role": "user", "content": "What is 7 times 6?"}], "max_tokens": 32}
    answer = json.loads(post(name, "/v1/chat/completions", body))
    text = str(answer["choices"][0]["message"]["content"])
    want("42" in text and answer["model"] == served, f"{name}: the endpoint answers {answer}")
    return text


def post(name: str, path: str, body: dict[str, Any], check: bool = True) -> str:
    """The answer of the endpoint on the machine."""
    data = json.dumps(body)
    flags = "--silent --show-error --fail --max-time 60 --header 'Content-Type: application/json'"
    return machine.ssh(name, f"curl {flags} --data '{data}' http://127.0.0.1:8000{path}", check=check)


@contextlib.contextmanager
def untouched(name: str) -> Iterator[None]:
    """Nothing was written on the machine meanwhile, beside what Ansible, apt and the system write of their own."""
    machine.ssh(name, f"sudo touch {MARKER}")
    yield
    pruned = " -o ".join(f"-path '{path}'" for path in NOT_OURS)
    command = rf"sudo find / -xdev \( {pruned} \) -prune -o \( -newer {MARKER} -o -cnewer {MARKER} \) ! -type d -print"
    found = machine.ssh(name, command, check=False).split()
    want(not found, f"{name}: written there: {' '.join(found[:20])}")
    ours = machine.ssh(
        name,
        "sudo ls -d /opt/reap /etc/reap /run/reap /var/lib/reap/cache /etc/systemd/system/reap* 2>/dev/null",
        check=False,
    )
    want(not ours.strip(), f"{name}: left there: {ours.split()}")


SAMPLER = """
import json, re, time
while True:
    available = int(re.search(r"MemAvailable: *([0-9]+)", open("/proc/meminfo").read())[1])
    try:
        phase = json.load(open("/run/reap/service.json"))["phase"]
    except (OSError, ValueError):
        phase = ""
    print(f"{time.monotonic():.2f}", available, phase, flush=True)
    time.sleep(0.1)
"""


@contextlib.contextmanager
def sampled(name: str) -> Iterator[Callable[[], list[tuple[float, int, str]]]]:
    """A reader of (s, MemAvailable in kB, the service's phase), read on the machine ten times a second meanwhile."""
    with tempfile.TemporaryFile("w+") as stream:
        words = ["ssh", "-F", str(machine.SSH_CONFIG), "-o", "BatchMode=yes", name, f"sudo python3 -c '{SAMPLER}'"]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.DEVNULL)

        def samples() -> list[tuple[float, int, str]]:
            stream.seek(0)
            # The last line may still be half written.
            lines = [line.split(" ") for line in stream.read().splitlines()[:-1]]
            return [(float(when), int(kb), phase) for when, kb, phase in lines]

        try:
            wait_for(lambda: len(samples()) > 1, 60, f"readings of the memory of {name}")
            yield samples
        finally:
            process.terminate()
            process.wait()


def steepest_fall(series: list[tuple[float, int]], seconds: float) -> int:
    """The most that memory fell within so long, kB."""
    most, start = 0, 0
    for end in range(len(series)):
        while series[end][0] - series[start][0] > seconds:
            start += 1
        most = max(most, max(kb for _, kb in series[start : end + 1]) - series[end][1])
    return most


# The stages.


def first_snapshot(_: Run) -> dict[str, Any]:
    """The first machine as its first boot leaves it; it is kept for later runs."""
    if (machine.SNAPSHOTS / "fresh" / "snapshot.json").exists():
        return {"kept": True}
    seconds = machine.up(FIRST)["up_s"]
    machine.snapshot(FIRST, "fresh")
    return {"up_s": seconds}


def identity(_: Run) -> dict[str, Any]:
    """They are what they should look like, without any help of the inventory."""
    found = {}
    for name, wanted in MEM_TOTAL.items():
        product = machine.ssh(name, "cat /sys/class/dmi/id/product_name").strip()
        architecture = machine.ssh(name, "uname -m").strip()
        total = meminfo(name)["MemTotal"]
        want(product == "NVIDIA_DGX_Spark", f"{name}: the product is {product}")
        want(architecture == "aarch64", f"{name}: the architecture is {architecture}")
        gib = total * 1024 / GIB
        want(abs(gib - wanted) < 0.05, f"{name}: MemTotal is {gib:.2f} GiB, wanted {wanted}")
        found[name] = {"product": product, "architecture": architecture, "mem_total_kb": total}
    return found


def unchanged(run: Run, playbook: str, *hosts: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """No host was changed and none failed."""
    recap, _ = run.play(playbook, hosts, *options)
    want(all(one["changed"] == 0 for one in recap.values()), f"wanted changed=0, found {recap}")
    return {"recap": recap}


def memory(run: Run) -> dict[str, Any]:
    """The verdicts on the real profiles, on both MemTotals."""
    found = unchanged(run, "tests/aarch64/memory.yml", FIRST, SECOND)
    for name in MEM_TOTAL:
        found[name] = json.loads((ARTIFACTS / f"memory-{name}.json").read_text())
    return found


def check_fresh(run: Run) -> dict[str, Any]:
    """--check of a machine that has nothing yet tells what would be done, and does none of it."""
    with untouched(FIRST):
        recap, _ = run.play("site.yml", [FIRST], "--check")
    want(recap[FIRST]["changed"] > 0, f"nothing would be done on a fresh machine: {recap}")
    return {"recap": recap}


def site(run: Run) -> dict[str, Any]:
    """One run for both: the first serves and is verified, the second is refused and nothing is written there."""
    with untouched(SECOND):
        recap, text = run.play(
            "site.yml", [FIRST, SECOND], "-i", "tests/aarch64/too_large.yml", fails={SECOND: "is short by"}
        )
    service, guard = await_serving(FIRST), await_guarding(FIRST)
    refusal = next(line.strip() for line in text.splitlines() if SECOND in line and "is short by" in line)
    machine.down([SECOND])
    newest = max((ARTIFACTS.parent / FIRST).glob("*/report.json"))
    evidence = json.loads(newest.read_text())
    want(
        evidence["verdict"] == "passed", f"{FIRST}: the verification says {evidence['verdict']}: {evidence['failures']}"
    )
    return {
        "recap": recap,
        "refused": refusal,
        "service": {key: service[key] for key in ("phase", "profile", "image")},
        "mem_available_serving_kb": guard["mem_available_kb"],
        "verdict": evidence["verdict"],
        "tasks_passed": sorted(name for name, task in evidence["tasks"].items() if task["passed"]),
        "prompt_tokens": evidence["prompt_tokens"],
    }


def watchdog(_: Run) -> dict[str, Any]:
    """The model's memory grows over the production floor: a kill, and the service comes back by itself."""
    before, guard = await_serving(FIRST), await_guarding(FIRST)
    told = len(events(FIRST))
    # A model that serves leaves 17 GiB: to move tens of GB, some has to be given back first.
    post(FIRST, "/double/give", {"bytes": 24 * GIB})
    start_kb = meminfo(FIRST)["MemAvailable"]
    grow = (start_kb - 5 * KB_PER_GIB) * 1024
    post(FIRST, "/double/grow", {"bytes": grow, "step": 2 * GIB, "pause_s": 0.1}, check=False)
    await_json(FIRST, WATCHDOG, lambda state: state.get("kills", 0) > guard["kills"], "the watchdog's kill", 120)
    await_serving(FIRST, another_than=before["container_id"])
    after = await_guarding(FIRST)
    found = events(FIRST, told)
    want_in_order(found, ["kill", "killed", "release", "phase loading", "phase serving"])
    kills = [event for event in found if event["event"] == "kill"]
    want(len(kills) == 1 and after["kills"] == guard["kills"] + 1, f"wanted one kill, found {kills}")
    path = f"/var/lib/reap/evidence/watchdog/{kills[0]['evidence']}/bundle.json"
    bundle = remote_json(FIRST, path)
    series = [(float(when), int(kb)) for when, kb in bundle["series"] if kb >= 0]
    until = kills[0]["monotonic"]
    # The series of five minutes may hold the load too, which takes far more.
    fell = steepest_fall([point for point in series if until - 30 <= point[0] <= until], MOVED_S)
    want(fell >= MOVED_GIB * KB_PER_GIB, f"memory fell by {fell} kB within {MOVED_S:.0f} s, wanted {MOVED_GIB} GiB")
    least = min(kb for _, kb in series)
    want(least > HARD_FLOOR_KB, f"memory came down to {least} kB, the hard floor is {HARD_FLOOR_KB}")
    write_json(ARTIFACTS / "watchdog-bundle.json", bundle)
    write_atomic(ARTIFACTS / "watchdog.svg", render_series_svg(bundle))
    return {
        "mem_available_before_kb": start_kb,
        "asked_bytes": grow,
        "fell_kb": fell,
        "fell_within_s": MOVED_S,
        "mem_available_least_kb": least,
        "events": found,
        "mem_available_serving_again_kb": after["mem_available_kb"],
        "completion": completion(FIRST),
    }


def stop(run: Run) -> dict[str, Any]:
    """A planned stop whose teardown takes memory below the floor is no kill; a start serves again."""
    before, guard = await_serving(FIRST), await_guarding(FIRST)
    told = len(events(FIRST))
    grow = (meminfo(FIRST)["MemAvailable"] - 6 * KB_PER_GIB) * 1024
    post(FIRST, "/double/stop", {"bytes": grow, "step": GIB // 4, "pause_s": 0.06, "hold_s": 4})
    with sampled(FIRST) as read:
        stopped, _ = run.play("playbooks/stop.yml", [FIRST])
        samples = read()
    stopping = [kb for _, kb, phase in samples if phase == "stopping"]
    want(bool(stopping), f"the service was never seen stopping: {sorted({phase for _, _, phase in samples})}")
    want(
        HARD_FLOOR_KB < min(stopping) < FLOOR_KB,
        f"the least seen while it stopped is {min(stopping)} kB, wanted between {HARD_FLOOR_KB} and {FLOOR_KB}",
    )
    now = remote_json(FIRST, WATCHDOG)
    want(now["kills"] == guard["kills"] and now["sheds"] == guard["sheds"], f"the planned stop was a kill: {now}")
    state = machine.ssh(FIRST, "systemctl is-active reap.service", check=False).strip()
    want(state == "inactive", f"{FIRST}: reap.service is {state} after the stop")
    started, _ = run.play("playbooks/start.yml", [FIRST])
    await_serving(FIRST, another_than=before["container_id"])
    after = await_guarding(FIRST)
    found = events(FIRST, told)
    want_in_order(found, ["phase stopping", "phase absent", "phase loading", "phase serving"])
    kinds = [kind(event) for event in found]
    want(not {"kill", "shed"} & set(kinds), f"events are {kinds}, wanted neither a kill nor a shed")
    return {
        "recap_stop": stopped,
        "recap_start": started,
        "asked_bytes": grow,
        "mem_available_least_kb": min(stopping),
        "below_floor_s": round(below(samples), 1),
        "kills": after["kills"],
        "events": found,
        "completion": completion(FIRST),
    }


def below(samples: list[tuple[float, int, str]]) -> float:
    """How long a service that stopped was seen below the floor, s."""
    times = [when for when, kb, phase in samples if phase == "stopping" and kb < FLOOR_KB]
    return times[-1] - times[0]


def reboot(_: Run) -> dict[str, Any]:
    """A restart of the machine brings everything back by itself."""
    before, told = machine.boot_id(FIRST), len(events(FIRST))
    began = time.monotonic()
    machine.reboot(FIRST)
    up = time.monotonic() - began
    await_serving(FIRST)
    guard = await_guarding(FIRST)
    seconds = time.monotonic() - began
    want(guard["boot_id"] != before, "the machine did not restart")
    want(guard["kills"] == 0 and guard["sheds"] == 0, f"something was stopped in this boot: {guard}")
    found = events(FIRST, told)
    want_in_order(found, ["start", "phase loading", "phase serving"])
    kinds = [kind(event) for event in found]
    want(not {"kill", "shed"} & set(kinds), f"events are {kinds}, wanted neither a kill nor a shed")
    return {
        "up_s": round(up, 1),
        "serving_s": round(seconds, 1),
        "units": units(FIRST),
        "floor_kb": guard["floor_kb"],
        "mem_available_serving_kb": guard["mem_available_kb"],
        "events": found,
        "completion": completion(FIRST),
    }


Stage = Callable[["Run"], "dict[str, Any] | None"]

# key: what it shows, and the work
STAGES: dict[str, tuple[str, Stage]] = {
    "build": ("build (cached after the first time)", lambda run: bed.build()),
    "boot": ("cold boot and snapshot (kept)", first_snapshot),
    "restore": ("from the snapshot to SSH", lambda run: {"up_s": machine.up(FIRST, snapshot="fresh")["up_s"]}),
    "second": ("second machine: cold boot", lambda run: {"up_s": machine.up(SECOND, SECOND_MIB)["up_s"]}),
    "identity": ("both look like a Spark", identity),
    "preflight": ("preflight of both", lambda run: unchanged(run, "playbooks/preflight.yml", FIRST, SECOND)),
    "memory": ("memory_fit on both MemTotals", memory),
    "check-fresh": ("site.yml --check, fresh", check_fresh),
    "site": ("site.yml for both, one refused", site),
    "again": ("site.yml again, changed=0", lambda run: unchanged(run, "site.yml", FIRST)),
    "check-again": ("site.yml --check, converged", lambda run: unchanged(run, "site.yml", FIRST, options=("--check",))),
    "watchdog": ("watchdog, floor 8 GiB", watchdog),
    "stop": ("planned stop below the floor, start", stop),
    "reboot": ("reboot", reboot),
}
