"""The parts of the service that decide or measure, one by one."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import pytest

from reap.cli import status
from reap.errors import ReapError
from reap.serve import cgroups, shm
from reap.serve.config import ServiceConfig, Timings, service_settings
from reap.serve.docker import run_command
from reap.serve.failure import Failure, Restarts
from reap.serve.generations import KEPT, Generations
from reap.serve.host import mem_available_kb, port_taken, read_key
from reap.serve.notify import Notifier
from reap.serve.probe import parse_metrics
from reap.serve.progress import LoadProgress
from reap.serve.proxy import write_key
from reap.serve.state import boot_id, write_text

from .conftest import Bench, until


@pytest.fixture
def config(bench: Bench) -> ServiceConfig:
    return ServiceConfig.from_mapping(service_settings(bench.settings()), "test")


# ---- configuration and generation ------------------------------------------------------------------------------------


def test_a_generation_is_named_by_what_shapes_the_container(bench: Bench) -> None:
    first = bench.configure()
    assert bench.configure() == first
    assert bench.configure(timings={"drain_s": 7}) == first
    assert bench.configure(api_key_required=True) == first
    assert bench.configure(image="other") != first
    assert bench.configure(ulimits={"stack": "1"}) != first


def test_the_file_survives_its_own_round_trip(config: ServiceConfig) -> None:
    again = ServiceConfig.from_mapping(json.loads(json.dumps(config.to_mapping())), "test")
    assert again == config


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"port": 0}, "wanted a number from 1 to 65535"),
        ({"host": "localhost"}, "host is 'localhost', wanted an IP address"),
        ({"model_dir": "models"}, "model_dir is 'models', wanted an absolute path"),
        ({"gpu": "all"}, "unknown key 'gpu' (did you mean 'gpus'?)"),
        ({"ulimits": {"stack": 1}}, "ulimits stack: wanted texts"),
        ({"drop_page_cache": "yes"}, "drop_page_cache is 'yes' (str), wanted true or false"),
        ({"timings": {"drain": 1}}, "timings: unknown key 'drain' (did you mean 'drain_s'?)"),
        ({"timings": {"restart_limit": 0}}, "timings: restart_limit is 0, wanted more"),
    ],
)
def test_wrong_settings_are_told_in_one_line(bench: Bench, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ReapError) as error:
        service_settings(bench.settings(**change))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "told"), [(None, "No such file"), ("{", "not JSON"), ("[]", "wanted a mapping")])
def test_a_file_that_cannot_be_read_is_told_with_its_remedy(tmp_path: Path, text: str | None, told: str) -> None:
    if text is not None:
        (tmp_path / "service.json").write_text(text)
    with pytest.raises(ReapError, match=told):
        ServiceConfig.read(tmp_path / "service.json")


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:"),
                                           ("::1", "http://[::1]:"), ("::", "http://[::1]:")])  # fmt: skip
def test_the_endpoint_is_one_this_host_can_ask(bench: Bench, host: str, url: str) -> None:
    bench.configure(host=host)
    assert ServiceConfig.read(bench.config_path).endpoint == f"{url}{bench.port}"


def test_the_backoff_doubles_up_to_its_limit() -> None:
    timings = Timings(backoff_s=5, backoff_max_s=60)
    assert [timings.backoff(failures) for failures in range(6)] == [0, 5, 10, 20, 40, 60]


# ---- the container's command -----------------------------------------------------------------------------------------


def test_the_container_is_run_in_the_foreground_and_never_pulled(bench: Bench) -> None:
    bench.configure(gpus="all", ulimits={"memlock": "-1", "stack": "67108864"})
    config = ServiceConfig.read(bench.config_path)
    words = run_command(config, Path("/run/reap/model.env"), Path("/run/reap/gate"), ["PYTHONPATH=/in/image"])
    text = " ".join(words)
    assert words[:2] == ["docker", "run"]
    for part in (
        "--rm", "--pull never", "--network host", "--ipc host", "--gpus all", "--ulimit memlock=-1",
        "--ulimit stack=67108864", "--env-file /run/reap/model.env", "--env HF_HUB_OFFLINE=1",
        f"source={config.model_dir},target={config.model_dir},readonly",
        f"--entrypoint vllm good serve {config.model_dir} --served-model-name",
        "--env PYTHONPATH=/opt/reap-gate:/in/image", "source=/run/reap/gate,target=/opt/reap-gate,readonly",
        "--middleware reap_gate.Gate",
    ):  # fmt: skip
        assert part in text
    assert "--detach" not in words
    assert "--restart" not in words


def test_without_a_gpu_none_is_asked_for(config: ServiceConfig) -> None:
    assert "--gpus" not in run_command(config, None, Path("/run/reap/gate"))
    assert "--env-file" not in run_command(config, None, Path("/run/reap/gate"))


# ---- the key as the proxy reads it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["simple", 'a"b\\\\c$d;{}', "x.*+?()[]|^z"])
def test_the_proxys_expression_matches_the_key_and_nothing_else(tmp_path: Path, key: str) -> None:
    path = tmp_path / "key.conf"
    assert write_key(path, key) is True
    assert write_key(path, key) is False
    assert path.stat().st_mode & 0o777 == 0o600
    expression = re.search(r'"~(.*)" 1;', path.read_text())[1].replace("\\z", "\\Z")
    assert re.search(expression, f"Bearer {key}")
    assert re.search(expression, f"bearer {key}")
    for other in (f"Bearer {key}x", f"Bearer {key[:-1]}", f"xBearer {key}", f"Bearer {key.upper()}", "Bearer ", ""):
        assert not re.search(expression, other)
    path.chmod(0o644)
    assert write_key(path, key) is True


# ---- what the log says -----------------------------------------------------------------------------------------------

# Lines of vLLM 0.32 (CPU, the simulated Spark) and of 0.22 (one H200, the K144 geometry).
LOG = [
    ("Loading safetensors checkpoint shards:   0% Completed | 0/46 [00:00<?, ?it/s]", ("weights", 0, 46)),
    ("Loading safetensors checkpoint shards:  50% Completed | 23/46 [01:40<01:41,  4.4s/it]", ("weights", 23, 46)),
    ("(Worker pid=9) INFO [gpu_model_runner.py:5150] Model loading took 86.12 GiB memory and 203.5 seconds",
     ("graphs", 0, None)),
    ("(EngineCore pid=2) INFO [kv_cache_utils.py:2327] GPU KV cache size: 762,036 tokens, Maximum concurrency",
     ("graphs", 0, None)),
    ("Capturing CUDA graphs (decode, FULL):  50%|█████     | 1/2 [00:00<00:00,  9.2it/s]", ("graphs", 1, 2)),
    ("INFO [gpu_model_runner.py:6582] Graph capturing finished in 20 secs, took 1.15 GiB", ("warmup", 0, None)),
    # A late line of an earlier step does not go back.
    ("Loading safetensors checkpoint shards: 100% Completed | 46/46 [03:20<00:00,  4.4s/it]", ("warmup", 0, None)),
    ("(EngineCore pid=2) INFO [core.py:402] init engine (profile, create kv cache, warmup model) took 2.67 s",
     ("warmup", 0, 1)),
]  # fmt: skip


def test_progress_follows_the_log() -> None:
    load = LoadProgress()
    for line, wanted in LOG:
        load.read(line)
        assert (load.step, load.done, load.total) == wanted, line
    assert load.facts == {
        "weights_gib": 86.12, "weights_s": 203.5, "kv_cache_tokens": 762036, "graphs_s": 20, "graphs_gib": 1.15,
    }  # fmt: skip


def test_the_error_kept_is_the_telling_one() -> None:
    load = LoadProgress()
    load.read("(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.")
    load.read("(EngineCore pid=7) ERROR [core.py:1] RuntimeError: Unsupported expert number: 144")
    load.read("torch.OutOfMemoryError: CUDA out of memory")
    assert load.error == "RuntimeError: Unsupported expert number: 144"


# ---- metrics ---------------------------------------------------------------------------------------------------------

METRICS = """# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="m"} 1.863e+05
vllm:generation_tokens_total{engine="0",model_name="m"} 64.0
vllm:generation_tokens_created{engine="0",model_name="m"} 1.7e+09
"""


def test_activity_is_read_from_the_metrics() -> None:
    activity = parse_metrics(METRICS)
    assert activity is not None
    assert (activity.running, activity.waiting, activity.tokens) == (1, 2, 186364)
    assert activity.busy
    # A long prompt moves nothing but the cache in use until it is read whole.
    later = parse_metrics(METRICS.replace("0.25", "0.5"))
    assert later is not None
    assert later.position != activity.position


@pytest.mark.parametrize("text", ["", "<html>", "vllm:num_requests_running 1.0\n"])
def test_what_is_no_metrics_is_no_activity(text: str) -> None:
    assert parse_metrics(text) is None


# ---- generations -----------------------------------------------------------------------------------------------------


def make(bench: Bench, **changes: Any) -> ServiceConfig:
    bench.configure(**changes)
    return ServiceConfig.read(bench.config_path)


def test_the_previous_generation_is_the_newest_other_that_served(bench: Bench) -> None:
    record = Generations(bench.state_dir)
    first, second, third = (make(bench, image=name) for name in ("a", "b", "c"))
    assert record.previous(third.generation) is None
    record.serves(first)
    record.serves(second)
    assert record.previous(third.generation) == second
    assert record.previous(second.generation) == first
    record.serves(first)
    assert record.good == [first.generation, second.generation]


def test_old_generations_are_forgotten(bench: Bench) -> None:
    record = Generations(bench.state_dir)
    for number in range(KEPT + 3):
        record.serves(make(bench, image=f"i{number}"))
    assert len(record.good) == KEPT
    assert len(list((bench.state_dir / "generations").iterdir())) == KEPT


def test_a_generation_whose_loads_never_end_is_given_up(bench: Bench) -> None:
    record = Generations(bench.state_dir)
    for _ in range(2):
        record.begin("new")
        assert record.failure("new") is None
    record.begin("new")
    assert "never ended" in str(record.failure("new"))
    record.forgive("new")
    assert record.failure("new") is None


def test_a_stopped_load_does_not_count(bench: Bench) -> None:
    record = Generations(bench.state_dir)
    for _ in range(5):
        record.begin("new")
        record.undone("new")
    record.begin("new")
    assert record.failure("new") is None


def test_failures_outside_the_window_are_forgotten(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path / "restarts.json")
    assert restarts.add("one", 100) == 1
    assert restarts.add("two", 100) == 2
    assert restarts.recent(0) == []
    restarts.clear()
    assert restarts.recent(100) == []


# ---- the host --------------------------------------------------------------------------------------------------------


def test_a_port_in_use_names_its_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        told = port_taken("127.0.0.1", port)
    assert f"in use by process {os.getpid()}" in str(told)
    assert port_taken("127.0.0.1", port) is None


def test_an_address_of_another_host_is_told() -> None:
    assert "choose another reap_bind_address" in str(port_taken("192.0.2.1", 8000))


def test_a_key_is_read_only_from_a_closed_file(tmp_path: Path) -> None:
    path = tmp_path / "api-key"
    assert read_key(path, required=False) is None
    with pytest.raises(Failure, match="missing and a key is required"):
        read_key(path, required=True)
    write_text(path, "two words\n", 0o600)
    with pytest.raises(Failure, match="printable ASCII"):
        read_key(path, required=False)
    write_text(path, "k3y\n", 0o600)
    assert read_key(path, required=True) == "k3y"
    path.chmod(0o640)
    with pytest.raises(Failure, match="has mode 0640, wanted 0600"):
        read_key(path, required=True)


def test_available_memory_is_a_plausible_number_of_kb() -> None:
    assert 10_000 < mem_available_kb() < 10**10


def test_the_service_manager_hears_the_status_once(bench: Bench) -> None:
    notifier = Notifier(str(bench.folder / "notify"))
    notifier.status("loading")
    notifier.status("loading")
    notifier.status("two\nlines")
    notifier.extend(60)
    notifier.extend(60)
    notifier.send("READY=1")
    until(lambda: "READY=1" in bench.heard(), "READY=1")
    assert bench.heard() == ["STATUS=loading", "STATUS=two lines", "EXTEND_TIMEOUT_USEC=60000000", "READY=1"]


def test_without_a_service_manager_nothing_is_sent() -> None:
    Notifier("").send("READY=1")
    Notifier("/nonexistent/notify").send("READY=1")


# ---- control groups and shared memory --------------------------------------------------------------------------------


def test_a_cgroup_of_both_versions_is_found(tmp_path: Path) -> None:
    for folder in ("v2/box", "memory/box", "cpu/box"):
        (tmp_path / folder).mkdir(parents=True)
    proc = tmp_path / "proc"
    (proc / "7").mkdir(parents=True)
    (proc / "self").mkdir()
    (proc / "7/cgroup").write_text("9:memory:/box\n8:cpu,cpuacct:/box\n7:name=systemd:/gone\n0::/box\n")
    (proc / "self/mountinfo").write_text(
        f"1 0 0:1 / {tmp_path}/v2 rw - cgroup2 cgroup2 rw\n"
        f"2 0 0:2 / {tmp_path}/memory rw shared:1 - cgroup cgroup rw,memory\n"
        f"3 0 0:3 / {tmp_path}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    )
    found = cgroups.of_process(7, proc)
    assert found["v2"] == f"{tmp_path}/v2/box"
    assert found["v1"] == {
        "memory": f"{tmp_path}/memory/box",
        "cpu": f"{tmp_path}/cpu/box",
        "cpuacct": f"{tmp_path}/cpu/box",
    }


def test_the_root_of_a_hierarchy_is_never_a_container() -> None:
    assert cgroups._folder(("/", "/sys/fs/cgroup"), "/") is None


def test_everything_in_a_cgroup_is_killed_and_never_this_process(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "600"])
    box = tmp_path / "box"
    (box / "inner").mkdir(parents=True)
    (box / "cgroup.procs").write_text("")
    (box / "inner/cgroup.procs").write_text(f"{child.pid}\n")
    # A plain file keeps naming the process: what counts is that it got the signal.
    assert not cgroups.kill({"v2": str(box), "v1": {}}, timeout_s=0.1)
    assert child.wait(60) == -9
    (box / "cgroup.procs").write_text(f"{os.getpid()}\n")
    assert not cgroups.kill({"v2": str(box), "v1": {}}, timeout_s=0.1)


MODELS = ("psm_9f8e7d6c", "sem.mp-0671wvju", "VLLM_OBJECT_STORAGE_SHM_BUFFER_1", "torch_7_91_0", "nccl-aB3x9Z",
          "cuda.shm.0.1f.1")  # fmt: skip


def test_shared_memory_of_the_model_is_known_by_its_inode_and_name(tmp_path: Path) -> None:
    folder, proc = tmp_path / "shm", tmp_path / "proc"
    folder.mkdir()
    (proc / "7").mkdir(parents=True)
    rows = ["7f03-7f04 rw-p 00000000 00:00 0", "7f05-7f06 r-xp 00000000 08:01 42   /usr/lib/libc.so.6"]
    for name in (*MODELS, "somebodys-own", "psm_of_another"):
        (folder / name).touch()
        stat = (folder / name).stat()
        device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}"
        shown = "sem.aYyyC0 (deleted)" if name.startswith("sem.") else name
        inode = stat.st_ino if name != "psm_of_another" else 1
        rows.append(f"7f01-7f02 rw-s 00000000 {device} {inode}       /dev/shm/{shown}")
    (proc / "7/maps").write_text("\n".join(rows) + "\n")
    assert shm.mapped([7], folder, proc) == set(MODELS)
    assert shm.remove([*MODELS, "psm_gone"], folder, proc) == []
    (proc / "7/maps").unlink()
    assert shm.remove([*MODELS, "psm_gone"], folder, proc) == sorted(MODELS)
    assert sorted(path.name for path in folder.iterdir()) == ["psm_of_another", "somebodys-own"]


def test_a_semaphore_that_a_killed_process_left_is_removed() -> None:
    """vLLM spawns its processes: its semaphores keep their names until somebody removes them."""
    script = (
        "import multiprocessing as m; from multiprocessing import resource_tracker as r; "
        "lock = m.get_context('spawn').Lock(); r.unregister(lock._semlock.name, 'semaphore'); "
        "print(lock._semlock.name[1:], flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    name = f"sem.{child.stdout.readline().strip()}"
    assert name in shm.mapped([child.pid])
    assert shm.remove([name]) == []
    child.kill()
    child.wait()
    assert shm.remove([name]) == [name]


def test_only_segments_that_nobody_maps_are_removed() -> None:
    script = (
        "from multiprocessing import shared_memory as s, resource_tracker as r; "
        "m = s.SharedMemory(create=True, size=64); "
        "r.unregister(m._name, 'shared_memory'); print(m.name, flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    name = child.stdout.readline().strip()
    assert name in shm.mapped([child.pid])
    assert shm.remove([name]) == []
    child.kill()
    child.wait()
    assert shm.remove([name, "psm_never_there"]) == [name]
    with pytest.raises(FileNotFoundError):
        shared_memory.SharedMemory(name)


# ---- status ----------------------------------------------------------------------------------------------------------


def test_status_of_a_host_that_never_served(tmp_path: Path) -> None:
    found = status.collect(tmp_path, tmp_path)
    assert found["phase"] == "absent"
    assert "has not run since the last boot" in status.one_line(found)
    assert "never verified" in status.one_line(found)


def test_status_tells_what_serves_and_how_it_was_verified(tmp_path: Path) -> None:
    state = {"phase": "serving", "boot_id": boot_id(), "pid": os.getpid(), "profile": "p", "served_model_name": "M",
             "endpoint": "http://127.0.0.1:8000", "since_unix": 0.0, "detail": "d"}  # fmt: skip
    (tmp_path / "service.json").write_text(json.dumps(state))
    (tmp_path / "20260101T000000Z-p").mkdir()
    (tmp_path / "20260101T000000Z-p/report.json").write_text(json.dumps({"verdict": "passed"}))
    line = status.one_line(status.collect(tmp_path, tmp_path))
    assert "M (p) on http://127.0.0.1:8000" in line
    assert "NO WATCHDOG RUNS: systemctl start reap-watchdog" in line
    assert "last verification passed" in line


def test_a_state_whose_writer_is_gone_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "service.json").write_text(json.dumps({"phase": "serving", "boot_id": "another", "pid": 1}))
    found = status.collect(tmp_path, tmp_path)
    assert found["phase"] == "absent"
    assert "it was serving" in found["detail"]
