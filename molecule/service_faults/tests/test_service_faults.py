"""Faults made on purpose: each ends in one clear state with nothing orphaned, and the service serves again.

The tests build on one another; each begins with a served model, and ends with one unless it says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from testinfra.host import Host

from tests.support.service_host import CONFIG, HEADERS, REQUEST, URL, Service, await_true, long_request, playbook

METER = "/run/reap/meminfo-double"
SETTINGS = "/etc/reap/watchdog.toml"
WEDGED = "wedged: a request waits and nothing moved for"
GIB_KB = 1024 * 1024


class Faulty(Service):
    """The host, and what is done to it."""

    def container(self) -> str:
        return str(self.state()["container_id"])

    def segments(self) -> set[str]:
        """What of the model lies in the host's shared memory; a test that compares must have something to compare."""
        found = set(self.run("ls /dev/shm | grep -E '^(psm_|sem.mp-)'", good=(0, 1)).split())
        assert {name[:4] for name in found} == {"psm_", "sem."}, found
        return found

    def engines(self) -> set[str]:
        """Processes of any vLLM on this host."""
        return set(self.run("pgrep -f '[V]LLM|[v]llm serve'", good=(0, 1)).split())

    def serves_alone(self, not_container: str, old_engines: set[str], old_segments: set[str]) -> None:
        """A new container serves, says so in one line, and nothing of the old one is left."""
        self.await_serving(not_container=not_container)
        assert self.run("docker ps -aq --no-trunc").split() == [self.container()]
        assert not self.engines() & old_engines
        assert not self.segments() & old_segments
        line = self.run("/opt/reap/bin/reap status")
        assert line.startswith("serving for ")
        assert line.count("\n") == 1

    def in_a_long_request(self, tokens: int, then: str) -> None:
        """Run a command while a client reads a streamed answer of so many tokens into /tmp/stream.

        All on the host, and in one go: where two cores are all there is, a server that computes leaves so little to
        anything else that a new connection can take longer than the answer.
        """
        ask = f"curl -sN {HEADERS} -d @/tmp/request {URL} > /tmp/stream"
        wait = 'until [ "$(grep -c ^data: /tmp/stream)" -gt 5 ]; do sleep 0.1; done'
        self.run(f"cat > /tmp/ask <<'EOF'\n{ask}\nEOF\n: > /tmp/stream")
        self.run(f"cat > /tmp/request <<'EOF'\n{long_request(tokens)}\nEOF")
        self.run(f"cat > /tmp/go <<'EOF'\nsystemd-run --unit=client sh /tmp/ask\n{wait}\n{then}\nEOF")
        self.run("systemctl reset-failed client", good=(0, 1))
        self.run("timeout 300 sh /tmp/go")

    def journal(self) -> str:
        return self.run("journalctl -u reap -o cat -b")

    def meter(self, available_gib: float) -> None:
        """What the watchdog reads in place of /proc/meminfo: a double, because the machine's memory is not ours."""
        available_kb = int(available_gib * GIB_KB)
        self.run(f"printf 'MemTotal: {250 * GIB_KB} kB\\nMemAvailable: {available_kb} kB\\n' > {METER}")


@pytest.fixture
def service(host: Host) -> Faulty:
    return Faulty(host)


@pytest.fixture
def metered_watchdog(service: Faulty) -> Iterator[None]:
    """The watchdog reads the meter, and allows one stop within an hour."""
    service.meter(8.01)
    new = {
        "floor_kb": 8 * GIB_KB,
        "loading_floor_kb": 6 * GIB_KB,
        "hard_floor_kb": 3 * GIB_KB,
        "return_kb": 200 * GIB_KB,
        "cooldown_s": 1,
        "budget": 1,
    }
    lines = "\n".join(f"{key} = {value}" for key, value in new.items())
    ours = "|".join(new)
    service.run(
        f"cp -p {SETTINGS} /srv/watchdog.toml; grep -vE '^({ours}) = ' /srv/watchdog.toml > /srv/kept;"
        f" (printf '{lines}\\n'; sed 's|^\\[paths\\]|&\\nmeminfo = \"{METER}\"|' /srv/kept) > {SETTINGS};"
        " systemctl restart reap-watchdog"
    )
    yield
    service.run(f"cp -p /srv/watchdog.toml {SETTINGS}; systemctl restart reap-watchdog")


@pytest.mark.parametrize("pattern", ["[V]LLM::Worker", "[V]LLM::EngineCore", "[v]llm serve"])
def test_a_killed_process_of_the_model_brings_a_new_container(service: Faulty, pattern: str) -> None:
    before, engines, segments = service.container(), service.engines(), service.segments()
    service.run(f"pkill -KILL -f '{pattern}'")
    service.serves_alone(before, engines, segments)


def test_a_restart_of_the_engine_lets_requests_end_and_refuses_new_ones(service: Faulty) -> None:
    before, engines, segments = service.container(), service.engines(), service.segments()
    ask = f"curl -s -D /tmp/head -o /tmp/refusal -w '%{{http_code}}' -m 5 {HEADERS} http://127.0.0.1:8000/v1/models"
    refused = f"until [ $({ask}) = 503 ]; do sleep 0.1; done; /opt/reap/bin/reap status --json > /tmp/status || true"
    # Long enough to run when the stop has come, and over within the time that a stop gives requests.
    service.in_a_long_request(12000, then=f"systemctl restart --no-block docker.service; {refused}")
    assert "retry-after: 30" in service.run("cat /tmp/head").lower()
    assert json.loads(service.run("cat /tmp/refusal"))["requests_inside"] == 1
    assert "stopping: 1 requests have" in json.loads(service.run("cat /tmp/status"))["line"]
    await_true(lambda: service.run("systemctl is-active client", good=(0, 3, 4)) != "active\n", "the end of the answer")
    assert service.run("grep -v '^$' /tmp/stream | tail -n 1") == "data: [DONE]\n"
    service.serves_alone(before, engines, segments)
    assert "failed" not in service.run("systemctl show -p Result reap.service")


def test_the_engines_stop_and_start_bring_it_back_and_a_persons_stop_does_not(service: Faulty) -> None:
    before, engines, segments = service.container(), service.engines(), service.segments()
    service.run("systemctl stop docker.socket docker.service")
    assert service.show("ActiveState") == "inactive"
    service.run("systemctl start docker.socket docker.service")
    service.serves_alone(before, engines, segments)
    service.run("systemctl stop reap.service; systemctl stop docker.socket docker.service; systemctl start docker")
    assert service.run("systemctl show -p ConditionResult --value reap-return.service").strip() == "no"
    assert service.show("ActiveState") == "inactive"
    service.nothing_is_left()
    service.run("systemctl start reap.service")
    assert service.answers()


def test_a_wedge_under_load_is_found_in_the_metrics_and_leaves_evidence(service: Faulty) -> None:
    before, engines, segments = service.container(), service.engines(), service.segments()
    # Longer than it takes to stop the engine, whatever this machine is.
    service.in_a_long_request(30000, then="pkill -STOP -f '[V]LLM::EngineCore'")
    service.serves_alone(before, engines, segments)
    service.run("systemctl stop client", good=(0, 5))
    assert WEDGED in service.journal()
    wedge = service.status()["wedge"]
    assert wedge["path"] in service.status()["line"]
    bundle = json.loads(service.run(f"cat {wedge['path']}"))
    assert [sample["running"] for sample in bundle["samples"][-3:]] == [1, 1, 1]
    assert len({sample["tokens"] for sample in bundle["samples"][-3:]}) == 1
    stopped = [
        thread
        for process in bundle["processes"]
        for thread in process["threads"]
        if thread["state"] == "T" and thread["name"].startswith("VLLM::EngineCor")
    ]
    assert stopped
    assert bundle["container_state"]["Running"] is True
    assert bundle["log"]


def test_a_wedge_of_an_idle_engine_is_found_by_the_next_request(service: Faulty) -> None:
    before, engines, segments = service.container(), service.engines(), service.segments()
    told = service.journal().count(WEDGED)
    service.run("pkill -STOP -f '[V]LLM::EngineCore'")
    service.run(f"(curl -s -m 300 {HEADERS} -d '{REQUEST}' {URL} >/dev/null 2>&1 &)")
    service.serves_alone(before, engines, segments)
    assert service.journal().count(WEDGED) > told


def test_a_broken_image_gives_way_and_the_gap_is_told(service: Faulty) -> None:
    good, before = service.state()["generation"], service.container()
    engines, segments = service.engines(), service.segments()
    image = json.loads(service.run(f"cat {CONFIG}"))["image"]
    service.run(
        f"docker create --name broken {image} && printf '#!/bin/sh\\nexit 3\\n' > /tmp/vllm && chmod 755 /tmp/vllm"
        f" && docker cp /tmp/vllm broken:$(docker run --rm --entrypoint sh {image} -c 'command -v vllm')"
        " && docker commit broken broken:latest && docker rm broken"
    )
    # As a provision does whose profile needs another floor: the watchdog first, then what it is to guard.
    settings = service.run(f"cat {SETTINGS}")
    service.run(f"sed -i 's/^floor_kb = .*/floor_kb = 1100000/' {SETTINGS}; systemctl restart reap-watchdog")
    service.edit("c['image'] = 'broken:latest'")
    outcome = service.apply(good=(1,))
    print(outcome["error"])
    assert service.run(f"cat {SETTINGS}") == settings
    assert "the watchdog guards by the settings of" in service.journal()
    assert service.status()["watchdog"]["running"] is True
    assert service.status()["watchdog"]["floor_kb"] != 1100000
    assert "did not serve: the container ended with exit status 3" in outcome["error"]
    assert f"The previous one, {good}, serves again" in outcome["error"]
    assert "nothing answered for" in outcome["error"]
    service.serves_alone(before, engines, segments)
    assert service.state()["generation"] == good
    assert "NOT sim-needle-32k-" in service.status()["line"]
    service.edit(f"c['image'] = '{image}'")
    assert service.apply()["changed"] is False


def test_ten_crashes_in_a_row_end_in_the_latch(service: Faulty) -> None:
    """Without a generation to go back to. Ends with the service latched: the next test starts it."""
    service.run("systemctl stop reap.service; mv /var/lib/reap/service /var/lib/reap/service.aside")
    image = json.loads(service.run(f"cat {CONFIG}"))["image"]
    service.edit("c['image'] = 'broken:latest'")
    service.apply(good=(1,))
    await_true(lambda: service.show("SubState") == "failed", "the latch", service.story)
    assert service.show("ExecMainStatus") == "76"
    assert service.show("NRestarts") == "9"
    for text in (service.show("StatusText"), service.status()["line"]):
        assert "latched after 10 failures, the last: the container ended with exit status 3" in text
    service.nothing_is_left()
    service.run("rm -r /var/lib/reap/service; mv /var/lib/reap/service.aside /var/lib/reap/service")
    service.edit(f"c['image'] = '{image}'")


@pytest.mark.usefixtures("metered_watchdog")
def test_after_a_shed_it_comes_back_with_the_memory_and_after_too_many_by_a_word(service: Faulty) -> None:
    service.apply()
    before, engines, segments = service.container(), service.engines(), service.segments()
    kills = json.loads(service.run("cat /run/reap/watchdog.json"))["kills"]
    service.meter(7.99)
    waiting = "waiting for memory: .* the watchdog asks for"
    await_true(
        lambda: service.run(f"systemctl status reap | grep -E '{waiting}'", good=(0, 1)), "the wait", service.story
    )
    assert "the memory watchdog asked for a stop: graceful stop" in service.journal()
    service.nothing_is_left()
    service.meter(210)
    await_true(lambda: service.state()["phase"] == "loading", "the load", service.story)
    # Now, and not later: a fall of so much within a second is a kill.
    service.meter(8.01)
    service.serves_alone(before, engines, segments)
    # One stop more than the budget.
    service.meter(7.99)
    await_true(lambda: service.show("SubState") == "failed", "the latch", service.story)
    assert "latched because the memory watchdog allows no start: graceful stop" in service.status()["line"]
    assert service.show("ExecMainStatus") == "76"
    service.nothing_is_left()
    service.meter(210)
    assert service.apply(good=(0,))["changed"] is True
    assert service.answers()
    assert json.loads(service.run("cat /run/reap/watchdog.json"))["kills"] == kills


def test_the_playbook_tells_the_same_state(service: Faulty) -> None:
    """One line for the host, from status.yml as an operator runs it."""
    said = playbook("service_faults", "playbooks/status.yml")
    assert said.startswith("passed")
    assert "serving for" in said
    assert service.status()["wedge"]["path"] in said
