"""What the roles install exists for a Spark: aarch64, Python 3.12. Nothing is emulated and nothing is installed.

The package indexes are asked once for each lock and each list of packages; the answer is kept under .cache/packages/.
"""

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from sim import images
from sim.common import run
from tests.aarch64.run import recap_of
from tests.aarch64.stages import steepest_fall, want_in_order
from tests.aarch64.want import Failed

ROOT = Path(__file__).resolve().parents[3]
CACHE = ROOT / ".cache" / "packages"
LOCK = ROOT / "roles/model_fetch/files/requirements.txt"
# What DGX OS 7 (glibc 2.39) accepts, as pip names it.
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in (39, 35, 34, 31, 28, 17)] + ["manylinux2014_aarch64", "any"]
# Of NVIDIA's own repository, which DGX OS comes with; a Spark has it installed.
NVIDIA = {"nvidia-container-toolkit"}


def asked_before(kind, text):
    return CACHE / f"aarch64-{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def wheels(requirements, folder):
    """Names of the wheels that pip takes for a Spark, each with a hash of the lock."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    chosen = ["--only-binary", ":all:", *platforms, "--implementation", "cp", "--python-version", "3.12"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *chosen]
    done = subprocess.run(
        [*command, "--dest", str(folder), "--requirement", str(requirements)],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]
    return sorted(path.name for path in folder.iterdir())


def test_every_wheel_of_the_downloader_exists_for_aarch64(tmp_path):
    kept = asked_before("wheels", LOCK.read_text() + str(PLATFORMS))
    if not kept.exists():
        names = wheels(LOCK, tmp_path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("".join(f"{name}\n" for name in names))
    names = kept.read_text().split()
    assert any(name.startswith("huggingface_hub-") for name in names)
    for name in names:
        platform = name.removesuffix(".whl").rpartition("-")[2]
        assert platform == "any" or "aarch64" in platform, name


def test_a_wheel_that_is_not_in_the_lock_is_refused(tmp_path):
    """The check above can fail: another version's hash, and no wheel for the platform."""
    wrong = tmp_path / "requirements.txt"
    wrong.write_text(f"packaging==26.3 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(AssertionError, match="DO NOT MATCH"):
        wheels(wrong, tmp_path / "out")


def defaults():
    """The defaults of all roles."""
    data = {}
    for path in sorted(ROOT.glob("roles/*/defaults/main.yml")):
        data |= yaml.safe_load(path.read_text()) or {}
    return data


# Names of packages that pip installs; every other one is the distribution's.
OF_PIP = {"runtime_image_cutlass_package"}


def packages():
    """The distribution packages that the roles' defaults name, in whatever role."""
    found = set()
    for key, value in defaults().items():
        if key.endswith(("_package", "_packages")) and not key.endswith("site_packages") and key not in OF_PIP:
            found |= {value} if isinstance(value, str) else set(value)
    return sorted(found)


def test_the_packages_of_every_role_are_asked_for():
    assert {"docker.io", "nginx", "openssl", "python3-venv", "rsync"} <= set(packages())
    assert not any(" " in name or "=" in name for name in packages()), "a package of pip belongs to OF_PIP"


def resolved(requirement, folder):
    """Names of the wheels that pip would install for a Spark with all that they need; only their metadata is read."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    chosen = ["--only-binary", ":all:", *platforms, "--implementation", "cp", "--python-version", "3.12"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", *chosen]
    report = folder / "report.json"
    done = subprocess.run(
        [*command, "--target", str(folder / "target"), "--report", str(report), requirement],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]
    return sorted(one["download_info"]["url"].rpartition("/")[2] for one in json.loads(report.read_text())["install"])


def test_the_cutlass_layer_has_wheels_for_aarch64(tmp_path):
    requirement = defaults()["runtime_image_cutlass_package"]
    kept = asked_before("cutlass", requirement + str(PLATFORMS))
    if not kept.exists():
        names = resolved(requirement, tmp_path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("".join(f"{name}\n" for name in names))
    names = kept.read_text().split()
    compiled = [name for name in names if name.startswith("nvidia_cutlass_dsl_libs")]
    assert compiled
    assert all("-cp312-" in name and name.endswith("aarch64.whl") for name in compiled), compiled


def test_every_distribution_package_exists_for_arm64(tmp_path):
    codename, sources = images.machine_sources()
    wanted = [name for name in packages() if name not in NVIDIA]
    kept = asked_before("packages", f"{codename} {sources} {wanted}")
    if not kept.exists():
        found = apt_candidates(wanted, sources, tmp_path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("".join(f"{name} {version}\n" for name, version in found.items()))
    found = dict(line.split() for line in kept.read_text().splitlines())
    assert set(found) == set(wanted)
    assert "(none)" not in found.values(), found


def apt_candidates(names, sources, folder):
    """The version of each package that apt would install on an arm64 machine, `(none)` where there is none."""
    for path in ("lists/partial", "cache/archives/partial", "parts"):
        (folder / path).mkdir(parents=True)
    (folder / "sources.list").write_text(sources)
    (folder / "status").touch()
    settings = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::Etc::SourceList": folder / "sources.list",
        "Dir::Etc::SourceParts": folder / "parts", "Dir::State::Lists": folder / "lists",
        "Dir::State::status": folder / "status", "Dir::Cache": folder / "cache", "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }  # fmt: skip
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    run(["apt-get", *options, "-qq", "update"])
    text = run(["apt-cache", *options, "policy", *names]).stdout
    found, name = {}, ""
    for line in text.splitlines():
        if not line.startswith(" "):
            name = line.rstrip(":")
        elif line.strip().startswith("Candidate:"):
            found[name] = line.split()[1]
    return found


# What the emulated run decides with.


def test_the_recap_is_read_for_each_host():
    text = (
        "a-1   : ok=3  changed=2    unreachable=0    failed=0    skipped=1\nb : ok=0 changed=0 unreachable=1 failed=1 x"
    )
    assert recap_of(text) == {
        "a-1": {"changed": 2, "unreachable": 0, "failed": 0},
        "b": {"changed": 0, "unreachable": 1, "failed": 1},
    }


def event(name, phase="serving"):
    return {"event": name, "phase": phase}


def test_events_have_to_come_in_their_order():
    found = [event("kill"), event("warn"), event("killed"), event("phase", "loading"), event("phase")]
    want_in_order(found, ["kill", "killed", "phase loading", "phase serving"])
    with pytest.raises(Failed, match="in this order"):
        want_in_order(found, ["killed", "kill"])
    with pytest.raises(Failed, match="release"):
        want_in_order(found, ["kill", "release"])


def test_the_steepest_fall_is_that_of_a_window():
    slow = [(float(second), 100 - 2 * second) for second in range(20)]
    assert steepest_fall(slow, 5.0) == 10
    assert steepest_fall([(0.0, 100), (0.5, 40), (10.0, 90), (11.0, 80)], 5.0) == 60
    assert steepest_fall([(0.0, 1), (1.0, 100)], 5.0) == 0


@pytest.fixture
def strategy(monkeypatch):
    """The quicker strategy, with a DOUBLE of mitogen: it is installed only for a run that asks for it."""
    fake = {
        name: types.ModuleType(f"ansible_mitogen.{name}")
        for name in ("loaders", "module_finder", "planner", "strategy")
    }
    fake["loaders"].strategy_loader = types.SimpleNamespace(get=lambda *_, **__: type("Linear", (), {}))
    fake["module_finder"].scan = lambda *_: []
    fake["planner"].json = json
    fake["strategy"].StrategyMixin = type("StrategyMixin", (), {})
    package = types.ModuleType("ansible_mitogen")
    monkeypatch.setitem(sys.modules, "ansible_mitogen", package)
    for name, module in fake.items():
        setattr(package, name, module)
        monkeypatch.setitem(sys.modules, f"ansible_mitogen.{name}", module)
    spec = importlib.util.spec_from_file_location("reap_mitogen", ROOT / "tests/aarch64/strategy/reap_mitogen.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("plugins/modules/*.py")))
def test_the_quicker_strategy_hands_over_what_a_module_imports(name, strategy, tmp_path):
    """The module is imported from nothing but the files that would be sent."""
    root = ROOT / "plugins/module_utils/reap"
    source = ROOT / f"plugins/modules/{name}.py"
    absolute = re.findall(r"^from (ansible\.module_utils\.reap[\w.]*) import", source.read_text(), re.MULTILINE)
    # What mitogen finds by itself: absolute imports, each with its packages.
    words = [part.split(".") for part in absolute]
    known = {".".join(part[:length]) for part in words for length in range(3, len(part) + 1)}
    starts = [strategy.find(part, root) for part in sorted(known)]
    parts = strategy.with_relative_imports([part for part in starts if part])
    for part, path, _ in parts:
        sent = tmp_path / Path(path).relative_to(root.parent)
        sent.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, sent)
        # Mitogen imports a part by its package, which has to be sent too.
        assert part == strategy.PACKAGE or part.rpartition(".")[0] in [one[0] for one in parts]
    names = [part.removeprefix("ansible.module_utils.") for part in absolute]
    done = subprocess.run(
        [sys.executable, "-S", "-c", "".join(f"import {part}\n" for part in names)],
        env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
