"""/etc/reap/service.json: everything ``reap serve`` needs to know, checked, and the name of what it makes."""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ReapError
from ..profiles import Profile, container_environment, vllm_arguments
from ..schema import mapping_faults, shown

CONTAINER_NAME = "reap-model"


@dataclass(frozen=True)
class Timings:
    """How long things may take, in seconds, and how often they may fail.

    A change of these starts no new generation: the running process reads them again when it needs them.
    """

    start_timeout_s: int = 1800
    """From the container's start to its first answer."""
    memory_wait_s: int = 300
    """How long a start waits for memory that a killed model gives back late (over 60 s were seen)."""
    drain_s: int = 60
    """How long a stop lets running requests go on."""
    grace_s: int = 20
    """From SIGTERM to the kill of everything in the container."""
    restart_limit: int = 5
    """So many failures within ``restart_window_s`` latch the service."""
    restart_window_s: int = 14400
    backoff_s: int = 5
    """Wait before the first restart; doubled at each further failure up to ``backoff_max_s``."""
    backoff_max_s: int = 300
    stall_s: int = 300
    """A request waits and nothing moves in the metrics for so long: the engine is wedged. A quiet engine is asked for
    a few tokens as often. 0 switches the check off."""

    def backoff(self, failures: int) -> int:
        """Seconds to wait before a start that follows so many failures in the window."""
        return 0 if failures == 0 else int(min(self.backoff_max_s, self.backoff_s * 2 ** (failures - 1)))


@dataclass(frozen=True)
class ServiceConfig:
    """The content of service.json. Paths are the host's; the container sees model and caches under the same paths."""

    profile: str
    served_model_name: str
    image: str
    model_dir: str
    cache_dir: str
    host: str
    port: int
    entrypoint: str
    arguments: tuple[str, ...]
    """What follows the entry point: ``serve``, the model's folder, the flags."""
    environment: dict[str, str]
    gpus: str | None
    """For ``docker run --gpus``; null runs without a GPU."""
    ipc: str
    ulimits: dict[str, str]
    shm_size: str | None
    api_key_file: str
    """Used where it exists."""
    api_key_required: bool
    """Refuse to serve without the file."""
    drop_page_cache: bool
    state_dir: str
    run_dir: str
    fit: dict[str, Any] | None
    """Input of the memory gate; null starts without asking."""
    timings: Timings = field(default_factory=Timings)
    evidence_dir: str = "/var/lib/reap/evidence/service"
    """Where what was seen of a wedged engine is kept."""
    watchdog_required: bool = True
    """Begin no load on a host that no memory watchdog guards."""
    watchdog_settings: str = "/etc/reap/watchdog.toml"
    """The watchdog's settings: kept with a generation that serves, and given back with it."""

    @classmethod
    def from_mapping(cls, data: object, where: str) -> ServiceConfig:
        """Check what was read.

        Raises:
            ReapError: one line naming ``where`` and everything that is unknown, missing or of a wrong type.
        """
        faults = mapping_faults(cls, data, special=("timings",))
        timings: object = data.get("timings", {}) if isinstance(data, Mapping) else {}
        faults += [f"timings: {fault}" for fault in mapping_faults(Timings, timings)]
        if not faults:
            assert isinstance(data, Mapping)
            faults = _value_faults(data)
        if faults:
            raise ReapError(f"{where}: {'; '.join(faults)}")
        assert isinstance(data, Mapping)
        assert isinstance(timings, Mapping)
        values = {**data, "arguments": tuple(data["arguments"]), "timings": Timings(**timings)}
        return cls(**values)

    @classmethod
    def read(cls, path: Path) -> ServiceConfig:
        """Read and check the file.

        Raises:
            ReapError: no such file, no JSON, or wrong content.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ReapError(f"{path}: {error.strerror}; provision this host to write it") from error
        except ValueError as error:
            raise ReapError(f"{path}: not JSON ({error}); provision this host to write it anew") from error
        return cls.from_mapping(data, str(path))

    def to_mapping(self) -> dict[str, Any]:
        """The content as it is written."""
        return dataclasses.asdict(self) | {"arguments": list(self.arguments)}

    @property
    def generation(self) -> str:
        """Name of what this configuration makes: the profile and a hash of all that shapes the container.

        Times and the memory gate's input are left out: a new drain time is no reason to load a model again.
        """
        aside = ("timings", "fit", "api_key_required", "evidence_dir", "watchdog_required", "watchdog_settings")
        shaping = {key: value for key, value in self.to_mapping().items() if key not in aside}
        text = json.dumps(shaping, sort_keys=True, separators=(",", ":"))
        return f"{self.profile}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def endpoint(self) -> str:
        """Where the model answers on this host, as a URL without a path."""
        address = ipaddress.ip_address(self.host)
        if address.is_unspecified:
            address = ipaddress.ip_address("::1" if address.version == 6 else "127.0.0.1")
        return f"http://{f'[{address}]' if address.version == 6 else address}:{self.port}"


def _value_faults(data: Mapping[str, Any]) -> list[str]:
    faults = []
    if not 1 <= data["port"] <= 65535:
        faults.append(f"port is {data['port']}, wanted 1 to 65535")
    try:
        ipaddress.ip_address(data["host"])
    except ValueError:
        faults.append(f"host is {data['host']!r}, wanted an IP address such as 127.0.0.1")
    paths = ("model_dir", "cache_dir", "state_dir", "run_dir", "api_key_file", "evidence_dir", "watchdog_settings")
    for key in paths:
        if not data.get(key, "/").startswith("/"):
            faults.append(f"{key} is {data[key]!r}, wanted an absolute path")
    for key in ("environment", "ulimits"):
        wrong = [name for name, value in data[key].items() if not isinstance(value, str)]
        if wrong:
            faults.append(f"{key} {', '.join(wrong)}: wanted texts")
    for name, value in data.get("timings", {}).items():
        if value < (1 if name in ("start_timeout_s", "restart_limit") else 0):
            faults.append(f"timings: {name} is {value}, wanted more")
    return faults


def service_settings(settings: object) -> dict[str, Any]:
    """Make the content of service.json from what role reap_service was told.

    Args:
        settings: the fields of :class:`ServiceConfig` except ``served_model_name``, ``arguments``, ``environment`` and
            ``fit``, which follow from ``profile_data`` (one entry of ``reap_profiles``), ``fit_enforce`` (false
            prints the memory gate's refusal without obeying it) and ``fit_floor_kb`` (the watchdog's floor in kB, where
            it is not the profile's).

    Returns:
        The checked content, ready to be written as JSON.

    Raises:
        ReapError: one line with every fault of the profile or of the settings.
    """
    if not isinstance(settings, Mapping):
        raise ReapError(f"settings of reap_service: found {shown(settings)}, wanted a mapping")
    given = dict(settings)
    name = str(given.get("profile", "profile"))
    profile = Profile.from_mapping(given.pop("profile_data", None), name)
    enforce = given.pop("fit_enforce", True)
    floor_kb = given.pop("fit_floor_kb", profile.watchdog_min_available_kb)
    model_dir, cache_dir = str(given.get("model_dir", "")), str(given.get("cache_dir", ""))
    # A mistake here is found below, with all the others.
    host, port = str(given.get("host", "")), given.get("port", 1)
    made = {
        **given,
        "served_model_name": profile.served_model_name,
        "arguments": ["serve", *vllm_arguments(profile, model_dir=model_dir, host=host, port=port)],
        "environment": container_environment(profile, cache_dir=cache_dir),
        "fit": {
            "profile": name,
            "model_dir": model_dir,
            "kv_cache_memory": profile.kv_cache_memory,
            "max_model_len": profile.max_model_len,
            "max_num_batched_tokens": profile.max_num_batched_tokens,
            "max_num_seqs": profile.max_num_seqs,
            "mtp": profile.speculative is not None,
            "watchdog_min_available_kb": floor_kb,
            "engine": "cpu" if profile.hardware == "sim" else "gb10",
            "expected_routed_experts": profile.model_expect.get("n_routed_experts"),
            "enforce": enforce,
        },
    }
    return ServiceConfig.from_mapping(made, "settings of reap_service").to_mapping()
