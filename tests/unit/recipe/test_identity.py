"""Which hosts the recipe takes for a Spark."""

from __future__ import annotations

from typing import Any

import pytest

from reap.identity import host_problems, parse_meminfo, parse_os_release

GB = 10**9
SPARK = {
    "architecture": "aarch64",
    "product": "NVIDIA_DGX_Spark",
    "dgx_name": "DGX Spark",
    "gpu_names": ["NVIDIA GB10"],
    "gpu_error": None,
    "mem_total_kb": 125_829_120,
    "os_id": "ubuntu",
    "os_version": "24.04",
    "init": "systemd",
    "root": True,
    "port_taken": False,
    "disks": {
        "model": {"path": "/var/lib/reap/models/x", "device": 1, "free": 170 * GB, "present": 0, "whole": False},
        "image": {"path": "/var/lib/docker", "device": 1, "free": 170 * GB, "present": 0, "whole": False},
    },
}
EXPECT = {
    "architecture": "aarch64",
    "products": ["NVIDIA_DGX_Spark", "DGX Spark"],
    "gpu": "NVIDIA GB10",
    "mem_total_min_kb": 124_466_000,
    "mem_total_max_kb": 128_660_000,
    "os": ["ubuntu 24.04"],
    "port": 8000,
    "model_bytes": 94_000_000_000,
    "image_bytes": 60_000_000_000,
    "reserve_bytes": 10_000_000_000,
}


def test_a_spark_is_accepted() -> None:
    assert host_problems(SPARK, EXPECT) == []


def test_another_makers_board_is_accepted_by_its_release_file() -> None:
    assert host_problems({**SPARK, "product": "GX10"}, EXPECT) == []


@pytest.mark.parametrize("gib", [119.7, 120.5, 121.7])
def test_every_known_memory_size_is_accepted(gib: float) -> None:
    assert host_problems({**SPARK, "mem_total_kb": int(gib * 1024 * 1024)}, EXPECT) == []


@pytest.mark.parametrize(
    ("change", "found", "remedy"),
    [
        ({"architecture": "x86_64"}, "x86_64", "inventory"),
        ({"product": "G4DN", "dgx_name": ""}, "G4DN", "spark_host_expect_products"),
        ({"gpu_names": [], "gpu_error": "nvidia-smi is not installed"}, "nvidia-smi is not installed", "driver"),
        ({"gpu_names": ["NVIDIA H200"]}, "NVIDIA H200", "driver"),
        ({"mem_total_kb": 24_000_000}, "22.9 GiB", "BIOS"),
        ({"os_version": "22.04"}, "ubuntu 22.04", "DGX OS 7"),
        ({"init": "sh"}, "sh", "systemd"),
        ({"root": False}, "root", "sudo"),
        ({"port_taken": True}, "port 8000 is in use", "reap_port"),
    ],
)
def test_each_difference_is_one_sentence_with_what_was_found_and_a_remedy(
    change: dict[str, Any], found: str, remedy: str
) -> None:
    problems = host_problems({**SPARK, **change}, EXPECT)
    assert len(problems) == 1
    assert found in problems[0]
    assert remedy in problems[0]


def disks(model: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    """The host with other disks; 170 GB free, nothing there and one filesystem unless said otherwise."""
    found = SPARK["disks"]
    return {**SPARK, "disks": {"model": {**found["model"], **model}, "image": {**found["image"], **image}}}


FREE = 163_900_000_000
# What is still to be downloaded: 94 GB of model, 60 GB of image; 10 GB stay free. And what the one sentence must name.
ROOM: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "both, on one disk": (
        {"free": FREE},
        {"free": FREE},
        [
            "163.9 GB are free; wanted 164.0 GB",
            "94.0 GB for the model in /var/lib/reap/models/x",
            "10.0 GB that stay free",
            "60.0 GB for the runtime image, packed and unpacked, in /var/lib/docker",
            "set reap_models_dir or the engine's data-root to another disk",
        ],
    ),
    "the model alone": ({"free": FREE - 60 * GB}, {"whole": True}, ["103.9 GB are free; wanted 104.0 GB"]),
    "the image alone": ({"whole": True, "free": FREE - 104 * GB}, {}, ["59.9 GB are free; wanted 60.0 GB"]),
    "the rest of a model, and the image": (
        {"present": 90 * GB, "free": FREE - 90 * GB},
        {},
        ["73.9 GB are free; wanted 74.0 GB", "4.0 GB for the model"],
    ),
    "another disk for the model": ({"device": 2, "free": FREE - 60 * GB}, {}, ["103.9 GB are free; wanted 104.0 GB"]),
    "another disk for the image": ({}, {"device": 2, "free": FREE - 104 * GB}, ["59.9 GB are free; wanted 60.0 GB"]),
}


@pytest.mark.parametrize("what", ROOM)
def test_what_is_still_missing_on_a_disk_is_added_up(what: str) -> None:
    model, image, words = ROOM[what]
    problems = host_problems(disks(model, image), EXPECT)
    assert len(problems) == 1
    for word in words:
        assert word in problems[0]
    # A hundred million bytes more and there is room.
    free = 100_000_000
    enough = [{**one, "free": one["free"] + free} if "free" in one else one for one in (model, image)]
    assert host_problems(disks(*enough), EXPECT) == []


def test_two_disks_are_judged_each_by_itself() -> None:
    assert host_problems(disks({"free": 104_000_000_000}, {"device": 2, "free": 60_000_000_000}), EXPECT) == []
    assert len(host_problems(disks({"free": 1}, {"device": 2, "free": 1}), EXPECT)) == 2


def test_what_is_there_needs_no_room() -> None:
    there = {"free": 0, "whole": True}
    assert host_problems(disks(there, there), EXPECT) == []
    # The profile's figure may be larger than the files are.
    part = {"free": 0, "present": 94 * GB}
    assert host_problems(disks(part, there), EXPECT) == []


def test_an_empty_expectation_is_not_checked() -> None:
    elsewhere = {**SPARK, "architecture": "x86_64", "product": "", "dgx_name": "", "gpu_names": [], "mem_total_kb": 1}
    empty = {"architecture": "", "products": [], "gpu": "", "mem_total_min_kb": 0, "mem_total_max_kb": 0, "os": []}
    assert host_problems(elsewhere, empty) == []


def test_release_files_and_meminfo_are_read() -> None:
    text = '# comment\nDGX_NAME="DGX Spark"\nbroken line\nVERSION_ID=24.04\n'
    assert parse_os_release(text) == {"DGX_NAME": "DGX Spark", "VERSION_ID": "24.04"}
    assert parse_meminfo("MemTotal:  5 kB\nHugePages_Total:   0\nodd\n") == {"MemTotal": 5, "HugePages_Total": 0}
