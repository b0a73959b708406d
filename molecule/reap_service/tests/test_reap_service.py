"""reap.service with the real vLLM on a real systemd host: what it says, and what it survives.

The tests build on one another to load the model as seldom as possible, twice after the first time; each begins and ends
with a served model unless it says so.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile

import pytest
from testinfra.host import Host

from tests.support.service_host import CONFIG, HEADERS, REQUEST, ROOT, URL, Service, await_true, long_request, playbook

NAME = "reap-service"
SCENARIO = "reap_service"
KEY = "only-of-this-scenario"
OTHER_KEY = "another-of-this-scenario"
PROXY = "https://localhost:8443"
TRUST = "--cacert /etc/reap/proxy/certificate.pem"

# Looks at every command line of the host, as fast as it can, until its input ends; what it looks for is the first line.
LOOK = """
import json, os, select, sys
token = sys.stdin.buffer.readline().strip()
print("looking", flush=True)
found = set()
while not select.select([sys.stdin], [], [], 0.02)[0]:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = open("/proc/%s/cmdline" % pid, "rb").read()
        except OSError:
            continue
        if token in command: found.add(command.replace(b"\\0", b" ").decode(errors="replace")[:200])
print(json.dumps(sorted(found)))
"""


@pytest.fixture
def service(host: Host) -> Service:
    return Service(host)


def test_the_unit_is_active_only_after_the_model_answered(service: Service) -> None:
    assert service.show("ActiveState") == "active"
    assert service.show("UnitFileState") == "enabled"
    # By the clock: the journal sorts what two processes say within a millisecond as it comes to read them.
    active = "$(systemctl show -p ActiveEnterTimestamp --value --timestamp=us reap.service)"
    assert service.state()["phase"] == "serving"
    assert service.state()["since_unix"] <= float(service.run(f'date -d "{active}" +%s.%6N'))
    lines = service.run("journalctl -u reap -o cat").splitlines()
    up = next(i for i, line in enumerate(lines) if "Application startup complete" in line)
    answered = next(i for i, line in enumerate(lines) if line.startswith("reap serve: serving Needle-Sim"))
    assert up < answered
    assert service.answers()
    assert service.show("StatusText").startswith("serving Needle-Sim on http://127.0.0.1:8000")
    assert service.status()["line"].startswith("serving for")


def test_the_key_is_asked_for_and_told_nowhere(service: Service, host: Host) -> None:
    assert service.run(f"curl -s -o /dev/null -w '%{{http_code}}' -d '{REQUEST}' {URL}") == "401"
    assert host.file("/etc/reap/api-key").mode == 0o600
    assert KEY not in service.run("ps -eww -o args")
    assert KEY not in service.run("systemctl cat reap.service; journalctl -b -o cat; systemctl status reap.service")
    # 2: a file went away while it looked.
    held = service.run(
        "grep -rlF -f /etc/reap/api-key /etc /run/reap /var/lib/reap /opt/reap --exclude-dir=cache", good=(0, 1, 2)
    )
    assert held.split() == ["/etc/reap/api-key"]
    # The proxy has it in hex.
    assert host.file("/etc/reap/proxy/key.conf").mode == 0o600


def test_the_unit_is_closed_but_for_what_it_needs(service: Service) -> None:
    said = service.run("systemd-analyze security reap.service --no-pager")
    exposure = float(said.rsplit("Overall exposure level for reap.service:", 1)[1].split()[0])
    # A unit without any of it has 9.6.
    assert exposure < 5.5, said
    wanted = {
        "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "read-only", "PrivateTmp": "yes",
        "RestrictSUIDSGID": "yes", "MemoryDenyWriteExecute": "yes", "ProtectKernelModules": "yes", "KillMode": "mixed",
    }  # fmt: skip
    assert {name: service.show(name) for name in wanted} == wanted
    assert "cap_sys_admin" not in service.show("CapabilityBoundingSet")


def test_the_watchdog_guards_before_the_model_is_loaded(service: Service) -> None:
    assert "reap-watchdog.service" in service.show("Wants").split()
    started = "systemctl show -p ActiveEnterTimestampMonotonic --value reap-watchdog.service"
    begun = "systemctl show -p ExecMainStartTimestampMonotonic --value reap.service"
    assert int(service.run(started)) < int(service.run(begun))


def test_it_is_bound_to_loopback_alone(service: Service) -> None:
    listening = service.run("ss -Hltn sport = :8000").split()
    assert listening[3] == "127.0.0.1:8000"


@pytest.mark.parametrize(
    "path", ["/health", "/metrics", "/version", "/tokenize", "/docs", "/openapi.json", "/v1/models", "/no/such/path"]
)
def test_the_proxy_asks_for_the_key_on_every_path(service: Service, path: str) -> None:
    ask = f"curl -s -o /dev/null -w '%{{http_code}}' {TRUST}"
    assert service.run(f"{ask} {PROXY}{path}") == "401"
    assert service.run(f"{ask} -X POST -d '{{}}' {PROXY}{path}") == "401"
    for wrong in (KEY.upper(), KEY + "x", KEY[:-1]):
        assert service.run(f"{ask} -H 'Authorization: Bearer {wrong}' {PROXY}{path}") == "401"
    unknown = path.startswith(("/no", "/tok"))
    assert service.run(f"{ask} {HEADERS} {PROXY}{path}") in (("404", "405") if unknown else ("200",))


def test_a_streamed_answer_passes_the_proxy_token_by_token(service: Service) -> None:
    """While the model still writes, its first tokens are with the client."""
    file = "/tmp/stream"
    ask = f"curl -sN {TRUST} {HEADERS} -d @/tmp/request {PROXY}/v1/chat/completions > {file}"
    service.run(
        f"rm -f {file}; cat > /tmp/request <<'EOF'\n{long_request(30000)}\nEOF\ncat > /tmp/ask <<'EOF'\n{ask}\nEOF"
    )
    busy = "curl -s http://127.0.0.1:8000/metrics | grep -E '^vllm:num_requests_running.* [1-9]'"
    count = f"$(grep -c ^data: {file} 2>/dev/null || true)"
    # All on the host, in one go: a connection to it may take as long as the answer.
    steps = [
        "systemd-run --unit=streamer sh /tmp/ask",
        f'until [ "{count}" -gt 5 ] 2>/dev/null; do sleep 0.1; done',
        busy,
        f'seen={count}; until [ "{count}" -gt "$seen" ]; do systemctl is-active -q streamer || exit 9; sleep 0.1; done',
        # The client goes, and the model's server learns of it through the proxy.
        "systemctl stop streamer",
    ]
    service.run(f"timeout 300 sh -ec {shlex.quote('; '.join(steps))}")
    await_true(lambda: not service.run(busy, good=(0, 1)), "the end of the request")


def test_the_network_reaches_the_proxy_and_nothing_else(service: Service) -> None:
    listening = {line.split()[3] for line in service.run("ss -Hltnp | grep -E 'nginx|:8000'").splitlines()}
    assert listening == {"0.0.0.0:8443", "127.0.0.1:8000"}
    assert service.run("systemctl is-enabled nginx.service", good=(1,)).strip() == "disabled"


def test_a_taken_port_leaves_what_serves(service: Service) -> None:
    before = service.state()["container_id"]
    service.run("systemd-run --unit=squatter python3 -m http.server --bind 127.0.0.1 8001")
    await_true(lambda: service.run("ss -Hltn sport = :8001"), "the squatter")
    service.edit("c['port'] = 8001; a = c['arguments']; a[a.index('--port') + 1] = '8001'")
    outcome = service.apply(good=(1,))
    service.run("systemctl stop squatter")
    service.edit("c['port'] = 8000; a = c['arguments']; a[a.index('--port') + 1] = '8000'")
    assert "nothing was changed: port 8001 on 127.0.0.1 is in use by process" in outcome["error"]
    assert service.state()["container_id"] == before
    assert service.apply()["changed"] is False


def test_a_wider_address_is_refused_and_the_proxy_is_named(service: Service) -> None:
    before = service.state()["container_id"]
    wider = ("-e", "reap_service_bind_address=0.0.0.0", "--tags", "reap_service_preflight")
    said = playbook(SCENARIO, "molecule/reap_service/converge.yml", *wider)
    assert said.startswith("failed")
    assert "wanted a loopback address" in said
    assert "reap_service_proxy: true" in said
    assert service.state()["container_id"] == before


def test_the_proxy_without_a_certificate_is_refused(service: Service) -> None:
    given = ("-e", "reap_service_proxy_tls=given", "--tags", "reap_service")
    said = playbook(SCENARIO, "molecule/reap_service/converge.yml", *given)
    assert said.startswith("failed")
    assert "name both files on the host, or choose self_made" in said


def test_a_certificate_of_ones_own_is_served_and_plain_text_where_that_is_asked_for(service: Service) -> None:
    before = service.state()["container_id"]
    role = ("molecule/reap_service/converge.yml", "--tags", "reap_service_preflight,reap_service_proxy")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    service.run(f"umask 077; {make} -addext subjectAltName=DNS:localhost -keyout /srv/own.key -out /srv/own.pem 2>&1")
    own = "reap_service_proxy_certificate=/srv/own.pem reap_service_proxy_certificate_key=/srv/own.key"
    given = playbook(SCENARIO, *role, "-e", f"reap_service_proxy_tls=given {own}")
    assert given.startswith("passed"), given
    ask = f"curl -s -o /dev/null -w '%{{http_code}}' {HEADERS}"
    assert service.run(f"{ask} --cacert /srv/own.pem {PROXY}/health") == "200"
    # 60: it is not the one made before.
    assert service.run(f"{ask} {TRUST} {PROXY}/health", good=(60,)) == "000"
    plain = playbook(SCENARIO, *role, "-e", "reap_service_proxy_tls=none")
    assert plain.startswith("passed"), plain
    in_the_clear = PROXY.replace("https", "http")
    assert service.run(f"{ask} {in_the_clear}/health") == "200"
    assert service.run(f"curl -s -o /dev/null -w '%{{http_code}}' {in_the_clear}/health") == "401"
    assert service.state()["container_id"] == before


def test_a_stop_with_a_client_that_never_reads_ends_and_leaves_nothing(service: Service) -> None:
    """Ends with the service stopped: the next test starts it."""
    body = long_request(30000)
    head = "POST /v1/chat/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/json\\r\\n"
    head += f"Content-Length: {len(body)}\\r\\nAuthorization: Bearer "
    client = f"""
import pathlib, socket, time
text = '{head}' + pathlib.Path('/etc/reap/api-key').read_text().strip() + '\\r\\n\\r\\n' + '{body}'
connection = socket.create_connection(('127.0.0.1', 8000))
connection.sendall(text.encode())
time.sleep(600)
"""
    service.run(f"cat > /tmp/client.py <<'EOF'\n{client}\nEOF")
    busy = "curl -s http://127.0.0.1:8000/metrics | grep -qE '^vllm:num_requests_(running|waiting).* [1-9]'"
    # All on the host, in one go: a connection to it may take as long as the answer.
    steps = [
        "systemd-run --unit=client python3 /tmp/client.py",
        f"until {busy}; do systemctl is-active -q client || exit 9; sleep 0.1; done",
        "systemctl stop reap.service",
    ]
    service.run(f"timeout 300 sh -ec {shlex.quote('; '.join(steps))}")
    service.run("systemctl stop client", good=(0, 5))
    assert service.show("Result") == "success"
    assert service.status()["phase"] == "absent"
    service.nothing_is_left()
    # Stopped by hand: a restart of the container engine does not bring it back.
    service.run("systemctl restart docker.service")
    assert service.run("systemctl show -p ConditionResult --value reap-return.service").strip() == "no"
    assert service.show("ActiveState") == "inactive"


def test_a_port_that_stays_taken_ends_in_the_latch_with_its_owner(service: Service) -> None:
    """Ends with the service latched: the next test starts it."""
    service.run("systemd-run --unit=squatter python3 -m http.server --bind 127.0.0.1 8000")
    await_true(lambda: service.run("ss -Hltn sport = :8000"), "the squatter")
    service.run("systemctl start reap.service", good=(1,))
    await_true(lambda: service.show("SubState") == "failed", "the latch", service.story)
    service.run("systemctl stop squatter")
    told = "latched after 3 failures, the last: port 8000 on 127.0.0.1 is in use by process"
    assert service.show("StatusText").startswith(told)
    assert service.show("ExecMainStatus") == "76"
    assert told in service.status()["line"]
    service.nothing_is_left()


def test_a_missing_key_file_is_said_and_not_tried_again(service: Service) -> None:
    service.run("mv /etc/reap/api-key /root/")
    service.run("systemctl start reap.service", good=(1,))
    assert "API key file /etc/reap/api-key is missing and a key is required" in service.show("StatusText")
    assert service.show("SubState") == "failed"
    service.run("mv /root/api-key /etc/reap/")


def test_a_generation_that_cannot_serve_gives_way_and_no_key_is_told(service: Service, host: Host) -> None:
    """The role as an operator runs it: a new key, and a setting with which the model cannot start."""
    good = service.state()["generation"]
    new = {"reap_service_api_key": OTHER_KEY, "reap_service_entrypoint": "/bin/false"}
    there = ["ssh", "-F", str(ROOT / ".cache/sim/ssh_config"), NAME, f"sudo python3 -c {shlex.quote(LOOK)}"]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(new, file)
        file.flush()
        watcher = subprocess.Popen(there, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert watcher.stdin is not None
        watcher.stdin.write(OTHER_KEY + "\n")
        watcher.stdin.flush()
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "looking\n"
        said = playbook(SCENARIO, "molecule/reap_service/converge.yml", "-e", f"@{file.name}", "--diff", "-vvv")
    found = json.loads(watcher.communicate("\n", timeout=600)[0])
    assert said.startswith("failed")
    assert OTHER_KEY not in said
    assert KEY not in said
    assert found == []
    assert OTHER_KEY not in service.run("journalctl -u reap -b -o cat")
    assert "did not serve: the container ended with exit status 1" in said
    assert f"The previous one, {good}, serves again" in said
    assert service.state()["generation"] == good
    # With the new key.
    assert host.file("/etc/reap/api-key").content_string.strip() == OTHER_KEY
    assert service.answers()
    ask = f"curl -s -o /dev/null -w '%{{http_code}}' {TRUST}"
    assert service.run(f"{ask} {HEADERS} {PROXY}/v1/models") == "200"
    assert service.run(f"{ask} -H 'Authorization: Bearer {KEY}' {PROXY}/v1/models") == "401"
    assert "NOT sim-needle-32k-" in service.status()["line"]


def test_the_playbook_of_a_rollback_makes_that_official_and_loads_nothing(service: Service) -> None:
    before = service.state()["container_id"]
    assert playbook(SCENARIO, "playbooks/rollback.yml").startswith("passed")
    assert json.loads(service.run(f"cat {CONFIG}"))["entrypoint"] == "vllm"
    assert service.state()["container_id"] == before
    assert service.apply()["changed"] is False


def test_a_killed_main_process_counts_and_a_reboot_in_the_load_after_it_serves_again(service: Service) -> None:
    before = service.state()
    # Among the processes of the service it is the one that a person, or the kernel, can meet.
    service.run(f"kill -9 {before['pid']}")
    await_true(lambda: not service.run(f"docker ps -aq --no-trunc -f id={before['container_id']}"), "no old container")
    await_true(lambda: service.state()["phase"] == "loading", "a load", service.story)
    failures = json.loads(service.run("cat /run/reap/restarts.json"))["failures"]
    assert [failure["reason"] for failure in failures] == [
        "the service's main process was ended by signal KILL while serving"
    ]
    subprocess.run([sys.executable, "-m", "sim", "reboot", NAME, "--hard"], cwd=ROOT, check=True, capture_output=True)
    await_true(lambda: service.run("cat /run/reap/service.json", good=(0, 1)), "the service after the boot")
    service.await_serving()
    assert service.show("ActiveState") == "active"
    assert len(service.run("docker ps -aq").split()) == 1


def test_a_teardown_leaves_neither_service_nor_proxy(service: Service) -> None:
    assert playbook(SCENARIO, "playbooks/teardown.yml").startswith("passed")
    service.nothing_is_left()
    assert service.run("pgrep -a nginx; ss -Hltn sport = :8443", good=(0, 1)) == ""
    assert service.run("ls -d /etc/systemd/system/reap* /etc/systemd/system/*.wants/reap* /etc/reap", good=(0, 2)) == ""
