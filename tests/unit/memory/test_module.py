"""The module as Ansible runs it: its own process, built by the project's ansible.cfg, and in check mode as well."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.sparse_checkpoint import write_sparse_checkpoint

ROOT = Path(__file__).resolve().parents[3]
UTILS = ROOT / "plugins/module_utils"
K144 = {
    "profile": "k144-nospec-200k",
    "routed_experts": 144,
    "kv_cache_memory": "14G",
    "max_model_len": 200000,
    "max_num_batched_tokens": 8192,
    "watchdog_min_available_kb": 8388608,
    "mem_total_kb": 120 * 2**20,
}


def ansible(arguments, check=False):
    """One run of `ansible` on localhost; the module's own result."""
    program = Path(sys.executable).with_name("ansible")
    command = [
        program,
        "localhost",
        "-i",
        "localhost,",
        "-c",
        "local",
        "-e",
        f"ansible_python_interpreter={sys.executable}",
    ]
    command += ["-m", "memory_fit", "-a", json.dumps(arguments), *(["--check"] if check else [])]
    env = {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.minimal",
        "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout[done.stdout.index("=> {") + 3 :])


def tree(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def test_check_apply_check_apply(tmp_path):
    """Four passes: always the same answer, never a change, and nothing touched."""
    folder = write_sparse_checkpoint(tmp_path / "model", 144).folder
    arguments = {**K144, "model_dir": str(folder), "expected_routed_experts": 144}
    before = tree(tmp_path)
    results = []
    for check in (True, False, True, False):
        code, result = ansible(arguments, check=check)
        assert code == 0, result
        assert result["changed"] is False
        results.append({key: value for key, value in result.items() if key != "invocation"})
    assert results[0] == results[1] == results[2] == results[3]
    assert tree(tmp_path) == before
    assert results[0]["verdict"] == "tight"
    assert results[0]["fits"] is True
    assert results[0]["weights_from"] == "headers"
    assert results[0]["kv_tokens"] == 762036
    assert results[0]["kv_min_bytes"] == 4351197312
    assert sum(term["bytes"] for term in results[0]["ledger"]) + 8 * 2**30 + results[0]["headroom_bytes"] == 120 * 2**30


def test_a_refusal_fails_the_task_with_what_to_do():
    code, result = ansible({**K144, "mtp": True})
    assert code != 0
    assert "short by" in result["msg"]
    assert "5G would free 9.00 GiB" in result["msg"]
    assert result["verdict"] == "refuse"
    assert len(result["ledger"]) == 7


@pytest.fixture
def module(monkeypatch, capsys):
    """The module's main() in this process, with arguments as AnsiballZ would hand them over."""
    import ansible.module_utils

    # What the configured module_utils path does for a module that is sent to a host.
    monkeypatch.setattr(ansible.module_utils, "__path__", [*ansible.module_utils.__path__, str(UTILS)])
    from ansible.module_utils import basic

    spec = importlib.util.spec_from_file_location("memory_fit_module", ROOT / "plugins/modules/memory_fit.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)

    def call(**arguments):
        monkeypatch.setattr(basic, "_ANSIBLE_ARGS", json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode())
        if hasattr(basic, "_ANSIBLE_PROFILE"):
            monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy")
        with pytest.raises(SystemExit) as left:
            loaded.main()
        return left.value.code, json.loads(capsys.readouterr().out)

    call.loaded = loaded
    return call


def test_enforce_false_says_no_and_does_not_fail(module):
    code, result = module(**{**K144, "mtp": True}, enforce=False)
    assert code == 0
    assert result["verdict"] == "refuse"
    assert result["fits"] is False
    assert result["message"].startswith("refuse: ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_cache_memory": "14X"}, "14X"),
        ({"kv_cache_memory": "0"}, "kv_cache_memory is 0"),
        ({"kv_cache_memory": "-1G"}, "-1G"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"max_model_len": -200000}, "max_model_len is -200000"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"routed_experts": 0}, "routed_experts is 0"),
        ({"watchdog_min_available_kb": -1}, "watchdog_min_available_kb is -1"),
        ({"watchdog_min_available_kb": "8G"}, "watchdog_min_available_kb"),
        ({"mem_total_kb": 0}, "mem_total_kb is 0"),
        ({"mem_total_kb": -1}, "mem_total_kb is -1"),
        ({"mem_available_kb": 2**40}, "MemAvailable"),
        ({"routed_experts": None}, "one of the following is required"),
        ({"engine": "tpu"}, "engine"),
        ({"question": "start"}, "MemAvailable is not known"),
        ({"profiles": {"broken": {"hardware": "spark"}}}, "profile broken"),
        ({"profiles": {"broken": {"hardware": "toaster"}}}, "profile broken: hardware is 'toaster'"),
        ({"kv_cache_memroy": "14G"}, "Unsupported parameters"),
    ],
)
def test_bad_arguments_fail_with_a_message(module, change, words):
    code, result = module(**{key: value for key, value in {**K144, **change}.items() if value is not None})
    assert code == 1
    assert result["failed"] is True
    assert words in result["msg"]
    assert "exception" not in result


def test_a_damaged_checkpoint_fails_with_a_message(module, tmp_path):
    checkpoint = write_sparse_checkpoint(tmp_path, 144)
    (tmp_path / checkpoint.files[20]).unlink()
    code, result = module(**{**K144, "model_dir": str(tmp_path)})
    assert code == 1
    assert f"missing, the first {checkpoint.files[20]}" in result["msg"]


def test_the_documentation_names_the_same_options_and_results(module, monkeypatch):
    loaded = module.loaded
    seen = []

    class Seen(loaded.AnsibleModule):
        def __init__(self, *positional, **named):
            super().__init__(*positional, **named)
            seen.append(dict(self.params))

    monkeypatch.setattr(loaded, "AnsibleModule", Seen)
    options = yaml.safe_load(loaded.DOCUMENTATION)["options"]
    _, result = module(**K144, mem_available_kb=117 * 2**20)
    arguments = seen[0]
    assert set(options) == set(arguments)
    for name, option in options.items():
        if "default" in option:
            assert arguments[name] == option["default"], name
    assert set(yaml.safe_load(loaded.RETURN)) == set(result) - {"changed", "invocation", "warnings"}
    for task in yaml.safe_load(loaded.EXAMPLES):
        assert set(task["memory_fit"]) <= set(options)
    attributes = yaml.safe_load(loaded.DOCUMENTATION)["attributes"]
    assert attributes["check_mode"]["support"] == "full"
