"""What a provision finds to do, and what it leaves alone; engine, model and systemctl are doubles (see doubles/)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reap.serve.apply import apply
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
