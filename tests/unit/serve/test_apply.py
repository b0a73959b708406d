"""What a provision finds to do, and what it leaves alone; engine, model and systemctl are doubles (see doubles/)."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from reap.serve.apply import Outcome, apply, rollback
from reap.serve.config import ServiceConfig
from reap.serve.generations import Generations

from .conftest import Bench

UNIT = (
    "LoadState=loaded\nActiveState=active\nUnitFileState=enabled\nNeedDaemonReload=no\nFragmentPath=\nResult=success\n"
)


@pytest.fixture
def served(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A host whose service serves what is wanted."""
    for name, value in bench.environment().items():
        monkeypatch.setenv(name, value)
    bench.tell("engine/unit", UNIT)
    process = bench.start()
    bench.await_phase("serving")
    yield bench
    process.terminate()
    process.wait(120)


def test_what_serves_is_left_alone(served: Bench) -> None:
    outcome = apply(served.config_path)
    assert (outcome.changed, outcome.error) == (False, None)


def test_an_image_made_anew_under_its_name_is_taken(served: Bench) -> None:
    served.image("good", id="sha256:1")
    outcome = apply(served.config_path, check=True)
    assert outcome.changed
    assert outcome.msg == "image good was made anew"


def test_without_a_watchdog_what_serves_goes_on(served: Bench) -> None:
    served.configure(watchdog_required=True, ulimits={"stack": "1"})
    outcome = apply(served.config_path)
    assert outcome.changed is False
    assert str(outcome.error).startswith("nothing was changed: no memory watchdog guards this host")
    assert served.state()["phase"] == "serving"


def test_a_doubted_generation_has_to_prove_itself_again(bench: Bench) -> None:
    record = Generations(bench.state_dir)
    config = ServiceConfig.read(bench.config_path)
    record.serves(config)
    record.doubt(config.generation)
    record.doubt(config.generation)
    assert record.good == []


def test_a_generation_that_is_asked_for_again_has_to_prove_itself_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It served once; should it not come up any more, the one that served last is the way back."""
    for name, value in bench.environment().items():
        monkeypatch.setenv(name, value)
    bench.tell("engine/unit", UNIT.replace("=active", "=inactive"))
    record = Generations(bench.state_dir)
    first = ServiceConfig.read(bench.config_path)
    record.serves(first)
    bench.image("other")
    second = bench.configure(image="other")
    record.serves(ServiceConfig.read(bench.config_path))
    bench.configure()
    monkeypatch.setattr("reap.serve.apply._result", lambda *_arguments: None)
    apply(bench.config_path)
    assert record.good == [second]


def test_a_record_that_cannot_be_written_ends_no_model(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said: list[str] = []
    record = Generations(bench.state_dir, said.append)
    config = ServiceConfig.read(bench.config_path)
    monkeypatch.setattr("reap.serve.generations.write_json", full)
    monkeypatch.setattr("reap.serve.generations.write_text", full)
    record.serves(config)
    assert record.good == [config.generation]
    assert "No space left" in said[0]
    with pytest.raises(OSError, match="No space left"):
        record.begin("another")
    with pytest.raises(OSError, match="No space left"):
        Generations(bench.state_dir).serves(config)


def test_what_another_process_wrote_later_holds_over_what_could_not_be_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    record = Generations(bench.state_dir, [].append)
    config = ServiceConfig.read(bench.config_path)
    with monkeypatch.context() as patched:
        patched.setattr("reap.serve.generations.write_json", full)
        record.serves(config)
    Generations(bench.state_dir).failed(config.generation, "the verification failed")
    assert record.good == []
    assert record.failure(config.generation) == "the verification failed"


def test_a_record_is_written_when_it_changes_and_only_then(bench: Bench) -> None:
    record = Generations(bench.state_dir)
    config = ServiceConfig.read(bench.config_path)
    record.serves(config)
    files = sorted(bench.state_dir.rglob("*.json"))
    before = [path.stat().st_ino for path in files]
    record.serves(config)
    assert [path.stat().st_ino for path in files] == before


@pytest.mark.parametrize("forget", [False, True])
def test_a_generation_that_failed_its_verification_is_none_to_go_back_to(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, forget: bool
) -> None:
    for name, value in bench.environment().items():
        monkeypatch.setenv(name, value)
    bench.tell("engine/unit", UNIT.replace("=active", "=inactive"))
    record = Generations(bench.state_dir)
    record.serves(ServiceConfig.read(bench.config_path))
    bench.image("other")
    left = bench.configure(image="other")
    record.serves(ServiceConfig.read(bench.config_path))

    def served(config: ServiceConfig, *_arguments: object) -> Outcome:
        record.serves(config)
        return Outcome(True, config.generation, config.endpoint, "serves")

    monkeypatch.setattr("reap.serve.apply._result", served)
    rollback(bench.config_path, forget=forget)
    assert (left in record.good) is not forget
