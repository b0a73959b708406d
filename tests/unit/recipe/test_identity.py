"""Which hosts the recipe takes for a Spark."""

from __future__ import annotations

from typing import Any

import pytest

from reap.identity import host_problems, parse_meminfo, parse_os_release

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
    "model_begun": False,
    "model_free": 100_000_000_000,
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
        ({"model_free": 93_900_000_000}, "93.9 GB are free", "free space"),
    ],
)
def test_each_difference_is_one_sentence_with_what_was_found_and_a_remedy(
    change: dict[str, Any], found: str, remedy: str
) -> None:
    problems = host_problems({**SPARK, **change}, EXPECT)
    assert len(problems) == 1
    assert found in problems[0]
    assert remedy in problems[0]


def test_a_model_that_is_there_in_part_is_left_to_the_fetch_which_knows_what_is_missing() -> None:
    assert host_problems({**SPARK, "model_begun": True, "model_free": 1}, EXPECT) == []


def test_an_empty_expectation_is_not_checked() -> None:
    elsewhere = {**SPARK, "architecture": "x86_64", "product": "", "dgx_name": "", "gpu_names": [], "mem_total_kb": 1}
    empty = {"architecture": "", "products": [], "gpu": "", "mem_total_min_kb": 0, "mem_total_max_kb": 0, "os": []}
    assert host_problems(elsewhere, empty) == []


def test_release_files_and_meminfo_are_read() -> None:
    text = '# comment\nDGX_NAME="DGX Spark"\nbroken line\nVERSION_ID=24.04\n'
    assert parse_os_release(text) == {"DGX_NAME": "DGX Spark", "VERSION_ID": "24.04"}
    assert parse_meminfo("MemTotal:  5 kB\nHugePages_Total:   0\nodd\n") == {"MemTotal": 5, "HugePages_Total": 0}
