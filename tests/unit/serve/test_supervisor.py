"""The life of ``reap serve`` as a real process; engine and model are doubles (see doubles/)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from reap.serve.evidence import newest
from reap.serve.state import boot_id, read_json
from reap.serve.supervisor import FAILED, LATCHED, STOPPED, WRONG
from tests.support.sparse_checkpoint import write_sparse_checkpoint

from .conftest import Bench, until


def end(process) -> int:
    return process.wait(120)


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
    # Long enough for a busy machine to have started the double.
    bench.configure(timings={"start_timeout_s": 20})
    process = bench.start()
    assert end(process) == FAILED
    assert "no answer within 20 s" in bench.state()["detail"]
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
    until(lambda: any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in bench.heard()), "the word to systemd")
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
    bench.tell("run/watchdog.json", json.dumps(event))
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
    bench.tell("run/watchdog.json", json.dumps(SHED))
    process.terminate()
    assert end(process) == FAILED
    assert "the memory watchdog asked for a stop: below the floor" in bench.state()["detail"]
    bench.restarted_by_systemd(1)
    process = bench.start()
    until(lambda: bench.state()["pid"] == process.pid and bench.state()["phase"] == "serving", "serving again")
    process.kill()


def test_a_stop_by_a_person_during_a_shed_is_a_stop(bench: Bench) -> None:
    bench.image("good", stubborn=True)
    # Time to send the second signal in; the test ends it.
    bench.configure(timings={"grace_s": 600})
    process = bench.start()
    bench.await_phase("serving")
    bench.tell("run/watchdog.json", json.dumps(SHED))
    process.terminate()
    bench.await_phase("stopping")
    process.terminate()
    os.kill(bench.container_pid(), signal.SIGKILL)
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
    bench.tell("run/watchdog.json", json.dumps(SHED))
    process.terminate()
    state = bench.await_phase("serving")
    assert state["generation"] == before
    assert "the memory watchdog asked for a stop" in state["replaced"]["reason"]
    process.terminate()
    assert end(process) == STOPPED


def test_a_latched_watchdog_latches_the_service_with_its_reason(bench: Bench) -> None:
    latched = SHED | {"latched": True, "hold_until_available_kb": 10**12}
    bench.tell("run/watchdog.json", json.dumps(latched))
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
    bench.configure(timings={"drain_s": 8})
    process = bench.start()
    bench.await_phase("serving")
    process.terminate()
    until(
        lambda: any("stopping: 7 requests have" in line and "new ones are refused" in line for line in bench.heard()),
        "the drain",
    )
    assert end(process) == STOPPED


def test_a_server_that_does_not_answer_for_a_while_is_not_taken_for_one_without_requests(bench: Bench) -> None:
    bench.image("good", busy=True, starved=3)
    bench.configure(timings={"drain_s": 600})
    process = bench.start()
    bench.await_phase("serving")
    process.terminate()
    told = "stopping: 7 requests have"
    until(lambda: process.poll() is not None or any(told in line for line in bench.heard()), "the drain")
    assert process.poll() is None
    assert any("stopping: the server does not say" in line for line in bench.heard())
    process.kill()


def test_a_server_that_never_answers_does_not_hold_up_a_stop(bench: Bench) -> None:
    bench.image("good", busy=True, starved=1000)
    bench.configure(timings={"drain_s": 600})
    process = bench.start()
    bench.await_phase("serving")
    process.terminate()
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
    # Serving may last for less than a look takes.
    until(lambda: "READY=1" in bench.heard(), bench.log)
    assert end(process) == FAILED
    assert "wedged: a request waits and nothing moved" in bench.state()["detail"]
    kept = newest(bench.folder / "evidence")
    assert kept is not None
    assert kept["path"] in bench.state()["detail"]
    bundle = json.loads(Path(kept["path"]).read_text())
    assert {sample["running"] for sample in bundle["samples"]} == {1}
    assert any(line.startswith("vllm:num_requests_running") for line in bundle["metrics"])
    assert bundle["container_state"]["Pid"] == bench.started()[-1]


def test_an_engine_that_stopped_while_idle_is_found(bench: Bench) -> None:
    """Its metrics show no request then: only asking tells."""
    bench.image("good", deaf=True)
    bench.configure(timings={"stall_s": 1})
    process = bench.start()
    until(lambda: "READY=1" in bench.heard(), bench.log)
    assert end(process) == FAILED
    assert "wedged: a request waits and nothing moved" in bench.state()["detail"]


def test_an_idle_engine_that_answers_is_left_alone(bench: Bench) -> None:
    # An answer of the double may take a busy machine seconds.
    bench.configure(timings={"stall_s": 5})
    process = bench.start()
    bench.await_phase("serving")
    before = bench.answered()
    until(lambda: bench.answered() >= before + 2, bench.log)
    assert process.poll() is None
    process.terminate()
    assert end(process) == STOPPED


@pytest.mark.parametrize("moving", ["busy", "prefilling"])
def test_an_engine_that_moves_is_left_alone(bench: Bench, moving: str) -> None:
    """A prompt of 200,000 tokens is read for longer than the stall: until then only the KV cache in use grows."""
    bench.image("good", **{moving: True})
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


def failures(bench: Bench) -> list[str]:
    record = read_json(bench.run_dir / "restarts.json") or {"failures": []}
    return [failure["reason"] for failure in record["failures"]]


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        (("signal", "killed", "KILL"), "was ended by signal KILL while serving"),
        (("core-dump", "dumped", "SEGV"), "was ended by signal SEGV while serving"),
        (("oom-kill", "killed", "KILL"), "was killed by the kernel, which was out of memory while serving"),
        (("watchdog", "killed", "ABRT"), "was ended by systemd, which saw no sign of life in time while serving"),
    ],
)
def test_a_main_process_that_is_killed_each_time_ends_in_the_latch(
    bench: Bench, ending: tuple[str, str, str], told: str
) -> None:
    bench.configure(timings={"restart_limit": 1})
    process = bench.start()
    bench.await_phase("serving")
    process.kill()
    process.wait()
    bench.clean_up(*ending)
    assert bench.state()["phase"] == "absent"
    assert told in bench.state()["detail"]
    assert not (bench.engine / "container.json").exists()
    bench.restarted_by_systemd(1)
    assert end(bench.start()) == LATCHED
    assert "latched after 1 failures, the last: the service's main process" in bench.state()["detail"]


def test_a_start_that_systemd_ends_for_its_length_counts_and_forgives_nothing(bench: Bench) -> None:
    """systemd sends the signal of a stop then."""
    bench.image("good", exit=1)
    assert end(bench.start()) == FAILED
    bench.clean_up("exit-code", "exited", "1")
    assert len(failures(bench)) == 1
    bench.image("good", never_ready=True)
    bench.restarted_by_systemd(1)
    process = bench.start()
    until(lambda: bench.state()["pid"] == process.pid and bench.state()["phase"] == "loading", "the load")
    process.terminate()
    assert end(process) == STOPPED
    bench.clean_up("timeout", "exited", "0")
    assert len(failures(bench)) == 2
    assert "no sign of life in time" in failures(bench)[1]


def test_a_stop_counts_as_no_failure(bench: Bench) -> None:
    process = bench.start()
    bench.await_phase("serving")
    process.terminate()
    assert end(process) == STOPPED
    bench.clean_up("success", "exited", "0")
    assert failures(bench) == []
    assert bench.state()["detail"] == "stopped"


def test_a_failure_of_the_program_itself_counts(bench: Bench) -> None:
    bench.state_dir.write_text("a folder was wanted here")
    assert end(bench.start()) == FAILED
    assert "the program failed: FileExistsError" in bench.state()["detail"]
    assert "Traceback" in bench.log()
    assert len(failures(bench)) == 1


@pytest.mark.parametrize(("job", "back"), [("", False), ("0", False), ("4711", True)])
def test_only_a_stop_of_the_engine_is_noted_for_its_return(bench: Bench, job: str, back: bool) -> None:
    note = bench.run_dir / "back-with-engine"
    process = bench.start()
    bench.await_phase("serving")
    process.terminate()
    end(process)
    bench.tell("engine/engine-job", job)
    bench.clean_up("success", "exited", "0")
    assert note.exists() is back
    process = bench.start()
    until(lambda: bench.state()["pid"] == process.pid and bench.state()["phase"] == "serving", "serving again")
    assert not note.exists()


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


def test_where_the_generation_before_fails_too_both_reasons_are_told(bench: Bench) -> None:
    before = bench.configure()
    process = bench.start()
    bench.await_phase("serving")
    process.terminate()
    end(process)
    bench.image("good", exit=7, log=["OSError: the disk went away"])
    bench.image("broken", exit=1, log=["ImportError: libcudart.so.13: cannot open shared object file"])
    after = bench.configure(image="broken")
    assert end(bench.start()) == FAILED
    detail = bench.state()["detail"]
    assert f"generation {after} failed: the container ended with exit status 1" in detail
    assert f"libcudart.so.13: cannot open shared object file; the previous one, {before}, failed too:" in detail
    assert "exit status 7" in detail
    assert "the disk went away" in detail
    assert len(failures(bench)) == 1
    commands = (bench.engine / "commands.log").read_text().splitlines()
    assert sum('"broken"' in line for line in commands) == 1


def test_a_generation_that_comes_back_brings_the_watchdogs_settings_that_it_served_under(bench: Bench) -> None:
    first = bench.watchdog()
    settings = bench.folder / "watchdog.toml"
    settings.write_text("floor_kb = 6291456\n")
    bench.configure(watchdog_required=True)
    process = bench.start()
    bench.await_phase("serving")
    process.terminate()
    end(process)
    # As a provision of a larger model does: the watchdog first, then what it is to guard.
    settings.write_text("floor_kb = 8388608\n")
    bench.image("broken", exit=1)
    bench.configure(image="broken", watchdog_required=True)
    second = bench.watchdog()
    (bench.run_dir / "watchdog.json").rename(bench.folder / "of-the-second")
    bench.tell("run/watchdog.json", json.dumps({"boot_id": boot_id(), "pid": first}))
    restart = bench.engine / "restart-watchdog"
    restart.write_text(f"#!/bin/sh\nmv {bench.folder}/of-the-second {bench.run_dir}/watchdog.json\n")
    restart.chmod(0o755)
    process = bench.start()
    bench.await_phase("serving")
    assert settings.read_text() == "floor_kb = 6291456\n"
    assert bench.log().count("the watchdog guards by the settings of") == 1
    assert json.loads((bench.run_dir / "watchdog.json").read_text())["pid"] == second
    process.terminate()
    assert end(process) == STOPPED


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
    bench.tell("run/watchdog.json", json.dumps({"kills": 1, "hold_until_available_kb": 10**12}))
    bench.configure(timings={"memory_wait_s": 30})
    process = bench.start()
    until(lambda: any("waiting for memory" in line for line in bench.heard()), "the wait")
    assert not (bench.engine / "commands.log").exists()
    bench.tell("run/watchdog.json", json.dumps({"kills": 1, "hold_until_available_kb": None}))
    bench.await_phase("serving")
    process.terminate()
    assert end(process) == STOPPED


def test_a_living_watchdog_decides_itself_when_its_hold_ends(bench: Bench) -> None:
    """One reading above what it asks for is not memory that has come back to stay."""
    bench.watchdog(hold_until_available_kb=1)
    assert end(bench.start()) == FAILED
    assert "the watchdog asks for 1 kB before the next start" in bench.state()["detail"]
    assert not (bench.engine / "commands.log").exists()


@pytest.mark.parametrize("found", ["none ever ran", "it is gone", "its number belongs to another program now"])
def test_without_a_watchdog_no_load_begins(bench: Bench, found: str) -> None:
    bench.configure(watchdog_required=True)
    if found == "it is gone":
        bench.watchdog()
        gone = bench.processes.pop()
        gone.kill()
        gone.wait()
    elif found != "none ever ran":
        # A number that another process has now: it is not the watchdog's.
        other = subprocess.Popen(["sleep", "600"], text=True)
        bench.processes.append(other)
        bench.tell("run/watchdog.json", json.dumps({"boot_id": boot_id(), "pid": other.pid}))
    assert end(bench.start()) == FAILED
    assert "no memory watchdog guards this host" in bench.state()["detail"]
    assert "systemctl start reap-watchdog.service" in bench.state()["detail"]
    assert not (bench.engine / "commands.log").exists()


def test_a_watchdog_that_comes_a_moment_later_is_waited_for(bench: Bench) -> None:
    bench.configure(watchdog_required=True, timings={"memory_wait_s": 60})
    process = bench.start()
    until(lambda: any("waiting for the watchdog" in line for line in bench.heard()), "the wait")
    bench.watchdog()
    bench.await_phase("serving")
    process.terminate()
    assert end(process) == STOPPED


@pytest.mark.parametrize("wanted", [True, False])
def test_the_page_cache_is_dropped_before_the_load(bench: Bench, wanted: bool) -> None:
    bench.configure(drop_page_cache=wanted)
    process = bench.start()
    bench.await_phase("serving")
    dropped = bench.folder / "drop_caches"
    assert dropped.exists() is wanted
    if wanted:
        assert dropped.read_text() == "3\n"
        assert dropped.stat().st_mtime_ns < (bench.engine / "commands.log").stat().st_mtime_ns
    process.terminate()
    assert end(process) == STOPPED


def test_memory_that_does_not_come_back_ends_the_start(bench: Bench) -> None:
    bench.tell("run/watchdog.json", json.dumps({"hold_until_available_kb": 10**12}))
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
