"""Profiles as data: what a wrong one is told, and what each right one makes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from reap.errors import ReapError
from reap.fetch.plan import config_problems
from reap.profiles import Profile, container_environment, vllm_arguments

PROFILES: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).resolve().parents[3] / "group_vars/all/profiles.yml").read_text(encoding="utf-8")
)["reap_profiles"]
# Written down from the command that served each profile on spark-2822, one flag a line.
VALIDATED = """
--trust-remote-code
--tensor-parallel-size 1
--pipeline-parallel-size 1
--kv-cache-dtype fp8
--block-size 256
--max-model-len 200000
--max-num-seqs 1
--gpu-memory-utilization 0.88
--distributed-executor-backend mp
--tokenizer-mode deepseek_v4
--load-format safetensors
--disable-uvicorn-access-log
--enable-prefix-caching
--tool-call-parser deepseek_v4
--enable-auto-tool-choice
--reasoning-parser deepseek_v4
--default-chat-template-kwargs {"thinking":true}
--compilation-config {"cudagraph_mode":"FULL_AND_PIECEWISE","custom_ops":["all"]}
""".strip().splitlines()
OWN = {
    "k144-nospec-200k": ["--kv-cache-memory-bytes 14G", "--max-num-batched-tokens 8192",
                         "--served-model-name DeepSeek-V4-Flash-Spark-Mini"],
    "k160-mtp2-200k": ["--kv-cache-memory-bytes 6G", "--max-num-batched-tokens 4096",
                       "--served-model-name DeepSeek-V4-Flash-Spark",
                       '--speculative-config {"method":"deepseek_mtp","num_speculative_tokens":2}'],
    "k160-nospec-200k": ["--kv-cache-memory-bytes 8G", "--max-num-batched-tokens 4096",
                         "--served-model-name DeepSeek-V4-Flash-Spark"],
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, data in PROFILES.items() if data["hardware"] == "spark"])
def test_a_profile_for_a_spark_says_which_checkpoint_it_means(name: str, tmp_path: Path) -> None:
    """Another number of experts, layers or positions, or another kind of weights: refused before 94 GB are fetched."""
    expect = PROFILES[name]["model_expect"]
    published = {
        "model_type": "deepseek_v4",
        "num_hidden_layers": 43,
        "max_position_embeddings": 1048576,
        "n_routed_experts": {"0xSero/DeepSeek-V4-Flash-162B": 144, "0xSero/DeepSeek-V4-Flash-180B": 160}[
            PROFILES[name]["model_repo"]
        ],
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps(published))
    assert config_problems(config, expect) == []
    for key in published:
        config.write_text(json.dumps({**published, key: None}))
        assert len(config_problems(config, expect)) == 1, key


def arguments(data: dict[str, Any], name: str = "p") -> list[str]:
    return vllm_arguments(Profile.from_mapping(data, name), model_dir="/models/x", host="127.0.0.1", port=8000)


def flags(words: list[str]) -> set[str]:
    """Flags with their values, as a person writes them."""
    joined: list[str] = []
    for word in words[1:]:
        if word.startswith("--"):
            joined.append(word)
        else:
            joined[-1] += f" {word}"
    return set(joined)


@pytest.fixture
def data() -> dict[str, Any]:
    return copy.deepcopy(PROFILES["k144-nospec-200k"])


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_validated_profile_makes_the_command_that_served_it(name: str) -> None:
    made = arguments(PROFILES[name], name)
    reasoning = (
        '--reasoning-config {"reasoning_parser":"deepseek_v4","reasoning_start_str":"<think>",'
        '"reasoning_end_str":"</think>"}'
    )
    assert made[0] == "/models/x"
    assert flags(made) == {*VALIDATED, *OWN[name], reasoning, "--host 127.0.0.1", "--port 8000"}


def test_every_profile_of_the_recipe_is_well_formed() -> None:
    for name, entry in PROFILES.items():
        assert Profile.from_mapping(entry, name).served_model_name


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("max_model_len", "200K", "max_model_len is '200K' (str), wanted a whole number"),
        ("max_model_len", True, "max_model_len is True (bool), wanted a whole number"),
        ("max_num_seqs", 0, "max_num_seqs is 0, wanted 1 or more"),
        ("watchdog_min_available_kb", "8G", "watchdog_min_available_kb is '8G' (str), wanted a whole number"),
        ("kv_cache_memory", "14 GB", "kv_cache_memory is '14 GB' (str), wanted a size such as 14G"),
        ("gpu_memory_utilization", 88, "gpu_memory_utilization is 88, wanted more than 0, at most 1"),
        ("thinking", "yes", "thinking is 'yes' (str), wanted true or false"),
        ("served_model_name", " ", "served_model_name is ' ' (str), wanted a text that is not empty"),
        ("speculative", "mtp", "speculative is 'mtp' (str), wanted a mapping, or null"),
        ("hardware", "h200", "hardware is 'h200', wanted spark or sim"),
        ("environment", {"HF_TOKEN": "x"}, "HF_TOKEN: a secret never goes into a profile"),
        ("environment", {"A B": "x"}, "environment has 'A B', wanted a variable's name"),
        ("vllm_extra_args", {"api-key": "x"}, "'api-key': a secret never goes on a command line"),
        ("vllm_extra_args", {"--max_len": 1}, "wanted a flag's name without leading dashes"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_wanted(data: dict[str, Any], key: str, value: Any, told: str) -> None:
    data[key] = value
    with pytest.raises(ReapError) as error:
        Profile.from_mapping(data, "mine")
    assert str(error.value).startswith("profile mine: ")
    assert told in str(error.value)


def test_every_fault_is_in_one_error(data: dict[str, Any]) -> None:
    del data["needle_tokens"]
    data["max_model_length"] = data.pop("max_model_len")
    with pytest.raises(ReapError) as error:
        Profile.from_mapping(data, "mine")
    for part in ("unknown key 'max_model_length' (did you mean 'max_model_len'?)", "missing key 'needle_tokens'"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, "k144", [1]])
def test_something_that_is_no_mapping_is_told(value: object) -> None:
    with pytest.raises(ReapError, match="wanted a mapping"):
        Profile.from_mapping(value, "mine")


@pytest.mark.parametrize("size", ["6g", "6G", 6442450944])
def test_sizes_are_handed_through_as_written(data: dict[str, Any], size: str | int) -> None:
    data["kv_cache_memory"] = size
    assert f"--kv-cache-memory-bytes {size}" in flags(arguments(data))


def test_extra_arguments_add_replace_and_remove(data: dict[str, Any]) -> None:
    data["vllm_extra_args"] = {
        "enforce-eager": True,
        "enable-prefix-caching": False,
        "block-size": 128,
        "tool-call-parser": None,
        "override-generation-config": {"top_p": 0.9},
    }
    made = flags(arguments(data))
    assert {"--enforce-eager", "--no-enable-prefix-caching", "--block-size 128"} <= made
    assert '--override-generation-config {"top_p":0.9}' in made
    assert not any(flag.startswith("--tool-call-parser") for flag in made)
    assert "--enable-prefix-caching" not in made


def test_the_thinking_switch_reaches_the_chat_template(data: dict[str, Any]) -> None:
    data["thinking"] = False
    made = arguments(data)
    assert json.loads(made[made.index("--default-chat-template-kwargs") + 1]) == {"thinking": False}


@pytest.mark.parametrize("port", [0, 65536, "http", True])
def test_a_port_out_of_range_is_told(data: dict[str, Any], port: Any) -> None:
    with pytest.raises(ReapError, match="wanted a number from 1 to 65535"):
        vllm_arguments(Profile.from_mapping(data), model_dir="/m", host="127.0.0.1", port=port)


def test_the_environment_is_the_validated_one_offline_with_caches(data: dict[str, Any]) -> None:
    made = container_environment(Profile.from_mapping(data), cache_dir="/cache/")
    assert made["VLLM_ENABLE_DEEPSEEK_V4_SPARSE_MLA_WARMUP"] == "0"
    assert made["VLLM_TRITON_MLA_SPARSE_ALLOW_CUDAGRAPH"] == "1"
    assert made["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert made["HF_HUB_OFFLINE"] == "1"
    assert made["TRITON_CACHE_DIR"] == "/cache/triton"
    assert list(made) == sorted(made)


def test_a_profile_changes_its_environment(data: dict[str, Any]) -> None:
    data["environment"] = {"NCCL_DEBUG": None, "VLLM_LOGGING_LEVEL": "DEBUG", "A_FLAG": True}
    made = container_environment(Profile.from_mapping(data), cache_dir="/c")
    assert "NCCL_DEBUG" not in made
    assert made["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert made["A_FLAG"] == "1"
