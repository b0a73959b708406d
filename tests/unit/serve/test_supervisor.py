"""The life of ``reap serve`` as a real process; engine and model are doubles (see doubles/)."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from reap.serve.evidence import newest
from reap.serve.supervisor import FAILED, LATCHED, STOPPED, WRONG
from tests.support.sparse_checkpoint import write_sparse_checkpoint

from .conftest import Bench, until


def end(process) -> int:
    return process.wait(30)


def test_ready_is_said_after_the_model_answered_and_not_before(bench: Bench) -> None:
    bench.image("good", log=["Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00, 2it/s]"])
    process = bench.start()
    state = bench.await_phase("serving")
    until(lambda: "READY=1" in bench.heard(), "READY=1")
    assert state["generation"] == bench.configure()
    assert state["container_pid"] == bench.container_pid()
    assert state["endpoint"] == f"http://127.0.0.1:{bench.port}"
    process.terminate()
    assert end(process) == STOPPED


def test_a_server_that_is_healthy_and_does_not_answer_is_never_ready(bench: Bench) -> None:
    bench.image("good", answers=False)
    process = bench.start()
    assert end(process) == FAILED
    assert "READY=1" not in bench.heard()
    assert "does not answer as it should" in bench.state()["detail"]


def test_a_load_that_takes_too_long_ends_with_its_last_line(bench: Bench) -> None:
    bench.image("good", never_ready=True, log=["(EngineCore pid=7) INFO Using backend CPU"])
    bench.configure(timings={"start_timeout_s": 1})
    process = bench.start()
    assert end(process) == FAILED
    assert "no answer within 1 s" in bench.state()["detail"]
    assert "Using backend CPU" in bench.state()["detail"]
    assert not (bench.engine / "container.json").exists()


def test_the_progress_of_a_load_is_published(bench: Bench) -> None:
    bench.image("good", never_ready=True, log=["Loading safetensors checkpoint shards:  40% Completed | 2/5 [00:00<"])
    process = bench.start()
    until(lambda: (bench.state().get("progress") or {}).get("done") == 2, "2 of 5 shards")
    step = until(
        lambda: (p := bench.run_dir / "progress/model_load.json").exists() and json.loads(p.read_text()), "file"
    )
    assert step["state"] == "running"
    assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in bench.heard())
    process.terminate()
    assert end(process) == STOPPED
    assert bench.state()["phase"] == "absent"


def test_a_killed_container_is_a_failure_that_says_so(bench: Bench) -> None:
    process = bench.start()
    bench.await_phase("serving")
    os.kill(bench.container_pid(), signal.SIGKILL)
    assert end(process) == FAILED
    assert "killed by signal 9 while serving" in bench.state()["detail"]


def test_the_error_of_a_failed_load_is_told(bench: Bench) -> None:
    lines = [
        "(EngineCore pid=9) ERROR RuntimeError: Unsupported expert number: 144",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    bench.image("good", exit=1, log=lines)
    process = bench.start()
    assert end(process) == FAILED
    assert (
        "exit status 1 while loading weights: RuntimeError: Unsupported expert number: 144" in bench.state()["detail"]
    )


def test_a_kill_by_the_watchdog_is_named(bench: Bench) -> None:
    process = bench.start()
    bench.await_phase("serving")
    event = {"kills": 1, "last_event": {"reason": "4096 kB available, floor 8388608 kB"}}
    (bench.run_dir / "watchdog.json").write_text(json.dumps(event))
    os.kill(bench.container_pid(), signal.SIGKILL)
    assert end(process) == FAILED
    assert "watchdog stopped the model: 4096 kB available" in bench.state()["detail"]


SHED = {"kills": 0, "sheds": 1, "last_event": {"event": "shed", "reason": "below the floor of 8.00 GiB"}}


def test_a_shed_by_the_watchdog_is_a_failure_and_gives_no_time(bench: Bench) -> None:
    """Memory cannot wait for running requests, and nobody asked for a service that stays away."""
    bench.image("good", busy=True)
    bench.configure(timings={"drain_s": 600})
    process = bench.start()
    bench.await_phase("serving")
    (bench.run_dir / "watchdog.json").write_text(json.dumps(SHED))
    process.terminate()
    assert end(process) == FAILED
    assert "the memory watchdog asked for a stop: below the floor" in bench.state()["detail"]
    bench.restarted_by_systemd(1)
    process = bench.start()
    until(lambda: bench.state()["pid"] == process.pid and bench.state()["phase"] == "serving", "serving again")
    process.kill()


def test_a_stop_by_a_person_during_a_shed_is_a_stop(bench: Bench) -> None:
    bench.image("good", stubborn=True)
    process = bench.start()
    bench.await_phase("serving")
    (bench.run_dir / "watchdog.json").write_text(json.dumps(SHED))
    process.terminate()
    bench.await_phase("stopping")
    process.terminate()
    assert end(process) == STOPPED


def test_a_shed_in_the_load_of_a_new_generation_brings_the_one_before_back(bench: Bench) -> None:
    before = bench.configure()
    process = bench.start()
    bench.await_phase("serving")
    process.terminate()
    end(process)
    bench.image("larger", never_ready=True)
    after = bench.configure(image="larger")
    process = bench.start()
    until(lambda: bench.state()["generation"] == after and bench.state()["phase"] == "loading", "the load")
    (bench.run_dir / "watchdog.json").write_text(json.dumps(SHED))
    process.terminate()
    state = bench.await_phase("serving")
    assert state["generation"] == before
    assert "the memory watchdog asked for a stop" in state["replaced"]["reason"]
    process.terminate()
    assert end(process) == STOPPED


def test_a_latched_watchdog_latches_the_service_with_its_reason(bench: Bench) -> None:
    latched = SHED | {"latched": True, "hold_until_available_kb": 10**12}
    (bench.run_dir / "watchdog.json").write_text(json.dumps(latched))
    bench.configure(timings={"memory_wait_s": 600})
    assert end(bench.start()) == LATCHED
    assert "latched because the memory watchdog allows no start: below the floor" in bench.state()["detail"]
    assert "reap watch --lift" in bench.state()["detail"]
    assert not (bench.engine / "commands.log").exists()


def test_a_model_that_ignores_the_stop_is_killed_after_the_grace(bench: Bench) -> None:
    bench.image("good", stubborn=True)
    process = bench.start()
    bench.await_phase("serving")
    pid = bench.container_pid()
    process.terminate()
    assert end(process) == STOPPED
    assert not Path(f"/proc/{pid}").exists()
    assert "STOPPING=1" in bench.heard()


def test_running_requests_get_their_time_and_no_more(bench: Bench) -> None:
    bench.image("good", busy=True)
    bench.configure(timings={"drain_s": 1})
    process = bench.start()
    bench.await_phase("serving")
    process.terminate()
    until(
        lambda: any("stopping: 7 requests have" in line and "new ones are refused" in line for line in bench.heard()),
        "the drain",
    )
    assert end(process) == STOPPED


def test_the_door_is_open_again_after_a_stop(bench: Bench) -> None:
    process = bench.start()
    bench.await_phase("serving")
    process.terminate()
    assert end(process) == STOPPED
    assert (bench.run_dir / "gate/shut").exists()
    process = bench.start()
    until(lambda: "READY=1" in bench.heard()[-5:] and bench.state()["phase"] == "serving", "serving again")
    assert not (bench.run_dir / "gate/shut").exists()
    process.terminate()
    assert end(process) == STOPPED


def test_a_wedged_engine_is_found(bench: Bench) -> None:
    bench.image("good", wedged=True)
    bench.configure(timings={"stall_s": 1})
    process = bench.start()
    bench.await_phase("serving")
    pid = bench.container_pid()
    assert end(process) == FAILED
    assert "wedged: a request waits and nothing moved" in bench.state()["detail"]
    kept = newest(bench.folder / "evidence")
    assert kept is not None
    assert kept["path"] in bench.state()["detail"]
    bundle = json.loads(Path(kept["path"]).read_text())
    assert [sample["running"] for sample in bundle["samples"]][-3:] == [1, 1, 1]
    assert any(line.startswith("vllm:num_requests_running") for line in bundle["metrics"])
    assert bundle["container_state"]["Pid"] == pid


def test_an_engine_that_stopped_while_idle_is_found(bench: Bench) -> None:
    """Its metrics show no request then: only asking tells."""
    bench.image("good", deaf=True)
    bench.configure(timings={"stall_s": 1})
    process = bench.start()
    bench.await_phase("serving")
    assert end(process) == FAILED
    assert "wedged: a request waits and nothing moved" in bench.state()["detail"]


def test_an_idle_engine_that_answers_is_left_alone(bench: Bench) -> None:
    bench.configure(timings={"stall_s": 1})
    process = bench.start()
    bench.await_phase("serving")
    with pytest.raises(AssertionError, match="not within"):
        until(lambda: process.poll() is not None, "an end", 4)
    process.terminate()
    assert end(process) == STOPPED


def test_a_busy_engine_that_moves_is_left_alone(bench: Bench) -> None:
    bench.image("good", busy=True)
    bench.configure(timings={"stall_s": 1, "drain_s": 0})
    process = bench.start()
    bench.await_phase("serving")
    with pytest.raises(AssertionError, match="not within"):
        until(lambda: process.poll() is not None, "an end", 3)
    process.terminate()
    assert end(process) == STOPPED


def test_failures_in_a_row_end_in_the_latch_with_the_reason(bench: Bench) -> None:
    bench.image("good", exit=3, log=["ValueError: no such quantization"])
    bench.configure(timings={"restart_limit": 3})
    statuses = []
    for times in range(4):
        bench.restarted_by_systemd(times)
        statuses.append(end(bench.start()))
    assert statuses == [FAILED, FAILED, LATCHED, LATCHED]
    assert "latched after 3 failures, the last: the container ended with exit status 3" in bench.state()["detail"]
    assert "no such quantization" in bench.state()["detail"]
    # A person starts it: the count begins anew.
    bench.restarted_by_systemd(0)
    assert end(bench.start()) == FAILED


def test_the_wait_before_a_restart_grows(bench: Bench) -> None:
    bench.image("good", exit=1)
    bench.configure(timings={"backoff_s": 30})
    assert end(bench.start()) == FAILED
    bench.restarted_by_systemd(1)
    process = bench.start()
    until(lambda: "restart 1 of 4 in" in str(bench.state().get("detail")), "the backoff")
    process.terminate()
    assert end(process) == STOPPED


def test_a_new_generation_that_fails_gives_way_to_the_one_before(bench: Bench) -> None:
    before = bench.configure()
    process = bench.start()
    bench.await_phase("serving")
    process.terminate()
    end(process)

    bench.image("broken", exit=1, log=["ImportError: libcudart.so.13: cannot open shared object file"])
    after = bench.configure(image="broken")
    process = bench.start()
    state = bench.await_phase("serving")
    assert state["generation"] == before
    assert state["replaced"]["generation"] == after
    assert "libcudart" in state["replaced"]["reason"]
    process.terminate()
    end(process)

    # The next start does not try it again by itself.
    process = bench.start()
    assert bench.await_phase("serving")["generation"] == before
    commands = (bench.engine / "commands.log").read_text().splitlines()
    assert sum('"broken"' in line for line in commands) == 1
    process.terminate()
    end(process)


def test_a_generation_that_served_is_not_given_up_for_a_crash(bench: Bench) -> None:
    name = bench.configure()
    process = bench.start()
    bench.await_phase("serving")
    os.kill(bench.container_pid(), signal.SIGKILL)
    end(process)
    bench.restarted_by_systemd(1)
    process = bench.start()
    assert bench.await_phase("serving")["generation"] == name
    process.terminate()
    end(process)


def test_the_key_reaches_the_model_and_no_command_line(bench: Bench) -> None:
    bench.key_file.write_text("s3cret-key\n")
    bench.key_file.chmod(0o600)
    process = bench.start()
    bench.await_phase("serving")
    environment = Path(f"/proc/{bench.container_pid()}/environ").read_bytes()
    assert b"VLLM_API_KEY=s3cret-key" in environment
    assert "s3cret-key" not in (bench.engine / "commands.log").read_text()
    assert "s3cret-key" not in bench.log()
    assert "s3cret-key" not in json.dumps(bench.state())
    assert not (bench.run_dir / "model.env").exists()
    process.terminate()
    end(process)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("image", "image gone is not on this host"),
        ("checkpoint", "no checkpoint in"),
        ("key missing", "is missing and a key is required"),
        ("key readable", "has mode 0644, wanted 0600"),
    ],
)
def test_what_cannot_work_is_not_tried_again(bench: Bench, fault: str, told: str) -> None:
    if fault == "image":
        bench.configure(image="gone")
    elif fault == "checkpoint":
        (bench.folder / "model/config.json").unlink()
    elif fault == "key missing":
        bench.configure(api_key_required=True)
    else:
        bench.key_file.write_text("k\n")
        bench.key_file.chmod(0o644)
    assert end(bench.start()) == WRONG
    assert told in bench.state()["detail"]
    assert not (bench.engine / "commands.log").exists()


def test_a_taken_port_names_who_has_it(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", bench.port)):
        assert end(bench.start()) == FAILED
    assert f"port {bench.port} on 127.0.0.1 is in use by process {os.getpid()}" in bench.state()["detail"]


def test_memory_that_the_watchdog_holds_back_is_waited_for(bench: Bench) -> None:
    hold = bench.run_dir / "watchdog.json"
    hold.write_text(json.dumps({"kills": 1, "hold_until_available_kb": 10**12}))
    bench.configure(timings={"memory_wait_s": 30})
    process = bench.start()
    until(lambda: any("waiting for memory" in line for line in bench.heard()), "the wait")
    assert not (bench.engine / "commands.log").exists()
    hold.write_text(json.dumps({"kills": 1, "hold_until_available_kb": None}))
    bench.await_phase("serving")
    process.terminate()
    assert end(process) == STOPPED


def test_memory_that_does_not_come_back_ends_the_start(bench: Bench) -> None:
    (bench.run_dir / "watchdog.json").write_text(json.dumps({"hold_until_available_kb": 10**12}))
    assert end(bench.start()) == FAILED
    assert "memory gate" in bench.state()["detail"]
    assert not (bench.engine / "commands.log").exists()


def test_a_start_that_cannot_fit_leaves_its_ledger_in_the_journal(bench: Bench) -> None:
    model_dir = bench.folder / "sparse"
    write_sparse_checkpoint(model_dir, routed_experts=144)
    content = json.loads(bench.config_path.read_text())
    content["fit"] = {
        "profile": "too large for any host",
        "model_dir": str(model_dir),
        "kv_cache_memory": "100T",
        "max_model_len": 200000,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 1,
        "mtp": False,
        "watchdog_min_available_kb": 8388608,
        "engine": "gb10",
        "expected_routed_experts": 144,
    }
    bench.config_path.write_text(json.dumps(content))
    outcome = end(bench.start())
    assert outcome == FAILED, bench.log()
    assert "KV cache" in bench.log()
    assert "floor of the watchdog" in bench.log()
    assert not (bench.engine / "commands.log").exists()


def test_a_container_left_by_a_killed_supervisor_is_removed(bench: Bench) -> None:
    process = bench.start()
    bench.await_phase("serving")
    left = bench.container_pid()
    process.kill()
    process.wait()
    process = bench.start()
    until(lambda: bench.state()["pid"] == process.pid and bench.state()["phase"] == "serving", "serving again")
    assert bench.container_pid() != left
    process.terminate()
    assert end(process) == STOPPED


def test_an_engine_that_is_away_is_no_fault_of_the_generation(bench: Bench) -> None:
    process = bench.start()
    bench.await_phase("serving")
    (bench.engine / "down").touch()
    os.kill(bench.container_pid(), signal.SIGKILL)
    assert end(process) == FAILED
    process = bench.start()
    until(lambda: any("waiting for the container engine" in line for line in bench.heard()), "the wait")
    (bench.engine / "down").unlink()
    bench.await_phase("serving")
    process.terminate()
    assert end(process) == STOPPED
