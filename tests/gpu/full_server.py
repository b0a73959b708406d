"""A whole vLLM with the K144 geometry on one CUDA GPU of 120 GB or more: unpatched, and patched with either router.

    python3 -m tests.gpu.full_server fetch                 # where packages can be had: about 1 GB below .cache/
    python3 -m tests.gpu.full_server run --out FOLDER      # on the GPU machine; needs no network

`fetch` puts the published wheels of vLLM 0.22.0 and of what it needs (full_server.txt) into one folder, for Python 3.12
on x86_64. Not among them, so to be there on the GPU machine: torch 2.11 for CUDA 13 and what comes with a PyTorch
installation (`PROVIDED`), the CUDA compiler, a C++ compiler. FlashInfer is left out (vLLM runs without it), so its
patch has nothing to do here.

`run` starts the server three times with the validated profile's own arguments and environment and only a config.json
for a model: weights are random (dummy_weights/, a vLLM plugin of this test). The patches are applied by
`reap patch apply` to a copy of the folder, as in an image.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "plugins" / "module_utils"))

from reap import patches
from reap.memory import HostMemory, advised_fit, request_from_profile
from reap.memory.config import FLASH_CONFIG
from reap.profiles import Profile, container_environment, vllm_arguments

FOLDER = REPOSITORY / ".cache" / "gpu-proof-full"
SITE_PACKAGES = FOLDER / "site-packages"
REQUIREMENTS = Path(__file__).with_name("full_server.txt")
PLUGIN = Path(__file__).with_name("dummy_weights")
PROFILE = "k144-nospec-200k"
PHASES = ("unpatched", *patches.ROUTERS)
REFUSAL = "Unsupported expert number: 144"

# What the folder does without, relative to it: other CUDA generations, static libraries, tables of other models. It is
# carried to the GPU machine.
LEFT_OUT = (
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
    "vllm/vllm-rs",
    "vllm/third_party/deep_gemm/_C.cpython-31[0134]-*.so",
    "tilelang/3rdparty/composable_kernel",
    "nvidia_cutlass_dsl/lib/*.a",
    "xgrammar/lib/*.a",
    "z3/lib/libz3.so.4.15",
    "z3_solver-*.data",
    "pycountry/locales",
    "mistral_common/data/*",
    "bin",
    "include",
    "share",
)
PROVIDED = "torch, torchvision, torchaudio, triton, transformers, numpy, numba, aiohttp, protobuf, nvidia-ml-py"

# The rest of DeepSeek V4 Flash's published config.json; memory does not depend on it.
REST_OF_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "bos_token_id": 0,
    "compress_rope_theta": 160000.0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-6,
    "hc_sinkhorn_iters": 20,
    "hidden_act": "silu",
    "index_topk": 512,
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "rope_type": "yarn",
        "type": "yarn",
    },
    "rope_theta": 10000.0,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
}
# On top of the validated environment: DeepGEMM would compile every shape at start, and FlashInfer is not here.
ENVIRONMENT = {"VLLM_DEEP_GEMM_WARMUP": "skip", "VLLM_USE_FLASHINFER_SAMPLER": "0", "PYTHONHASHSEED": "0"}

START_S, ANSWER_S, STOP_S = 540.0, 300.0, 60.0
PROMPTS, OUTPUT_TOKENS = 2, 64
GIB = 2**30


def fetch() -> None:
    """Put the wheels into the folder, less what is left out."""
    if SITE_PACKAGES.exists():
        shutil.rmtree(SITE_PACKAGES)
    tags = [f"manylinux_2_{minor}_x86_64" for minor in (35, 31, 28, 27, 24, 17)]
    platforms = [word for tag in (*tags, "manylinux2014_x86_64", "manylinux1_x86_64") for word in ("--platform", tag)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--require-hashes"]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.12", *platforms]
    command += ["--target", str(SITE_PACKAGES), "--requirement", str(REQUIREMENTS)]
    subprocess.run(command, check=True)
    for pattern in LEFT_OUT:
        for path in SITE_PACKAGES.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    size = sum(path.stat().st_size for path in SITE_PACKAGES.rglob("*") if path.is_file())
    print(f"{SITE_PACKAGES}: {size / 2**20:.0f} MiB; also wanted there: Python 3.12 with {PROVIDED}")


# The model: a config.json, and a tokenizer that has a word for each id


def profile_of(name: str) -> Profile:
    """A profile as the roles read it."""
    import yaml

    return Profile.from_mapping(_profiles(yaml)[name], name)


def _profiles(yaml: Any) -> dict[str, Any]:
    profiles: dict[str, Any] = yaml.safe_load(
        (REPOSITORY / "group_vars" / "all" / "profiles.yml").read_text(encoding="utf-8")
    )["reap_profiles"]
    return profiles


def predicted(name: str, mem_total: int) -> dict[str, Any]:
    """What memory_fit says of a profile on a machine with so many bytes of memory for the GPU."""
    import yaml

    request = request_from_profile(name, _profiles(yaml)[name], routed_experts=144)
    return advised_fit(request, HostMemory.read(total=mem_total, available=mem_total)).to_dict()


def write_model(folder: Path) -> None:
    """The K144 checkpoint without its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**FLASH_CONFIG, "n_routed_experts": 144, **REST_OF_CONFIG}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    special = {0: "<bos>", 1: "<eos>", 2: "<unk>", 3: "<think>", 4: "</think>"}
    words = {special.get(number, f"w{number}"): number for number in range(config["vocab_size"])}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": word, "special": number < 3}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for number, word in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<bos>",
                "eos_token": "<eos>",
                "unk_token": "<unk>",
                "model_max_length": config["max_position_embeddings"],
            }
        ),
        encoding="utf-8",
    )


# The server


class Server:
    """vLLM in a process group of its own."""

    def __init__(self, site_packages: Path, model: Path, work: Path, log: Path) -> None:
        self.log, self.record = log, work / "memory.jsonl"
        self.record.unlink(missing_ok=True)
        self.marker = Path(f"{self.record}.ready")
        self.marker.unlink(missing_ok=True)
        profile = profile_of(PROFILE)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.name = profile.served_model_name
        arguments = vllm_arguments(profile, model_dir=str(model), host="127.0.0.1", port=self.port)
        arguments[arguments.index("--load-format") + 1] = "dummy"
        self.arguments = arguments
        environment = {
            **os.environ,
            **container_environment(profile, cache_dir=str(work / "cache")),
            **ENVIRONMENT,
            **python_path(site_packages, PLUGIN),
            "DG_JIT_NVCC_COMPILER": shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc",
            "REAP_GPU_MEMORY_RECORD": str(self.record),
            "VLLM_NO_USAGE_STATS": "1",
        }
        self.started = time.monotonic()
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=work,
                start_new_session=True,
            )

    def wait(self) -> float | None:
        """Seconds until it was ready, None where it ended or took too long."""
        while (spent := time.monotonic() - self.started) < START_S:
            if self.process.poll() is not None:
                return None
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    self.marker.touch()
                    return spent
            except OSError:
                pass
            time.sleep(0.5)
        return None

    def stop(self) -> int | None:
        """Its exit status; what is left of its group is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def complete(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        """Stream a completion of a prompt of token ids.

        Returns:
            prompt_tokens, output_tokens, ttft_s, prefill_tok_s, decode_tok_s (None for one token), text,
            began and ended (seconds since the epoch).
        """
        body = {
            "model": self.name,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        payload = json.dumps(body)
        began, sent = time.time(), time.monotonic()
        connection.request("POST", "/v1/completions", payload, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"the server answered {answer.status}: {answer.read(2000)!r}")
        times, text, usage = [], "", None
        for event in _events(answer):
            usage = event.get("usage") or usage
            if event.get("choices"):
                times.append(time.monotonic() - sent)
                text += event["choices"][0]["text"]
        if not times or usage is None:
            raise RuntimeError("the stream ended without a token or without its usage")
        done = usage["completion_tokens"]
        spread = times[-1] - times[0]
        return {
            "prompt_tokens": usage["prompt_tokens"],
            "output_tokens": done,
            "ttft_s": round(times[0], 3),
            "prefill_tok_s": round(usage["prompt_tokens"] / times[0], 1),
            "decode_tok_s": round((done - 1) / spread, 2) if done > 1 and spread > 0 else None,
            "text": text,
            "began": began,
            "ended": time.time(),
        }

    def memory(self, since: float = 0.0) -> list[dict[str, float]]:
        """Lines of the plugin's record."""
        lines = self.record.read_text(encoding="utf-8").splitlines() if self.record.exists() else []
        return [line for line in (json.loads(text) for text in lines if text.endswith("}")) if line["at"] >= since]


def _events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in answer:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[6:])


def python_path(site_packages: Path, *more: Path) -> dict[str, str]:
    """Environment that puts a folder before the machine's own packages; .pth files do not count there."""
    folders = [site_packages, site_packages / "nvidia_cutlass_dsl" / "python_packages", *more]
    return {"PYTHONPATH": os.pathsep.join(map(str, folders))}


LOGGED = {
    "loading_gib": r"Model loading took ([\d.]+) GiB",
    "loading_s": r"Model loading took [\d.]+ GiB(?: memory)? and ([\d.]+) seconds",
    "kv_tokens": r"GPU KV cache size: ([\d,]+) tokens",
    "kv_concurrency": r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x",
    "graphs_s": r"Graph capturing finished in ([\d.]+) secs",
    "graphs_gib": r"Graph capturing finished in [\d.]+ secs, took ([\d.]+) GiB",
    "engine_s": r"init engine \(profile, create kv cache, warmup model\) took ([\d.]+) s",
}


def logged(text: str) -> dict[str, float]:
    """The figures that vLLM logs while it starts; what it did not log is missing."""
    found = {name: re.search(pattern, text) for name, pattern in LOGGED.items()}
    return {name: float(match[1].replace(",", "")) for name, match in found.items() if match}


def gpu_used() -> float:
    """GiB in use on the first GPU, of all processes."""
    return float(_nvidia_smi("memory.used")) * 2**20 / GIB


def _nvidia_smi(query: str) -> str:
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


# The phases


def unpatched(work: Path, out: Path) -> dict[str, Any]:
    """The published files must fail with the refusal."""
    server = Server(SITE_PACKAGES, work / "model", work, out / "unpatched.log")
    try:
        ready = server.wait()
        problem = None
        if ready is not None:
            try:
                server.complete(range(10, 200), 2)
                problem = "it answered a prompt"
            except (OSError, RuntimeError):
                pass
    finally:
        status = server.stop()
    text = server.log.read_text(encoding="utf-8", errors="replace")
    refused = re.search(rf"\w*Error: .*{REFUSAL}", text)
    said = refused[0] if refused else None
    if said is None and problem is None:
        problem = f"it ended with {status} and did not say {REFUSAL!r}: see {server.log.name}"
    return {"phase": "unpatched", "passed": problem is None, "problem": problem, "said": said, "logged": logged(text)}


def patched(variant: str, work: Path, out: Path) -> dict[str, Any]:
    """Apply the patches, run the router's self-test, start the server, send the long prompts."""
    result: dict[str, Any] = {"phase": variant, "passed": False, "problem": None}
    site_packages = work / variant
    shutil.rmtree(site_packages, ignore_errors=True)
    # A patched file is put in place by a rename, so the other names of the same file do not see it.
    shutil.copytree(SITE_PACKAGES, site_packages, copy_function=os.link)
    result["patches"] = _reap("patch", "apply", "--json", "--router", variant, "--site-packages", str(site_packages))
    result["selftest"] = _reap("patch", "selftest", "--json", environment=python_path(site_packages))
    profile = profile_of(PROFILE)
    draw = random.Random(144)
    server = Server(site_packages, work / "model", work, out / f"{variant}.log")
    result["arguments"] = server.arguments
    try:
        result["ready_s"] = server.wait()
        text = server.log.read_text(encoding="utf-8", errors="replace")
        result["logged"] = logged(text)
        if result["ready_s"] is None:
            result["problem"] = f"it did not get ready: see {server.log.name}"
            return result
        ready = server.memory()[-1]
        result["memory_ready"] = {
            **{name: round(ready[name] / GIB, 2) for name in ("allocated", "reserved")},
            "device": round(gpu_used(), 2),
        }
        # The last step of a long prompt has a size of its own, and both sizes compile kernels once.
        batch, long = profile.max_num_batched_tokens, profile.needle_tokens
        sizes = [batch + long % batch] + [long] * PROMPTS
        result["prompts"] = []
        for number, size in enumerate(sizes):
            answer = server.complete([draw.randrange(10, 129000) for _ in range(size)], OUTPUT_TOKENS)
            window = server.memory(answer["began"])
            before = [line for line in server.memory() if line["at"] < answer["began"]][-1]
            seen = [before, *window]
            answer["peak_allocated_gib"] = round(max(line["peak"] for line in window or [before]) / GIB, 2)
            answer["peak_reserved_gib"] = round(max(line["reserved"] for line in seen) / GIB, 2)
            answer["device_gib"] = round(gpu_used(), 2)
            answer["warm_up"] = number == 0
            result["prompts"].append(answer)
            print(f"{variant}: {json.dumps({**answer, 'text': answer['text'][:60]})}", flush=True)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        result["problem"] = f"{type(error).__name__}: {error}"
    finally:
        result["exit_status"] = server.stop()
    return result


def judge(result: dict[str, Any], prompt_tokens: int, kv_tokens: int) -> str | None:
    """What is wrong with a patched phase, or None."""
    if result["problem"]:
        return str(result["problem"])
    if not result["selftest"]["ok"]:
        return f"self-test: {result['selftest']['problem']}"
    if result["logged"].get("kv_tokens") != kv_tokens:
        return f"KV cache of {result['logged'].get('kv_tokens')} tokens, wanted {kv_tokens}"
    for answer in result["prompts"][1:]:
        if (answer["prompt_tokens"], answer["output_tokens"]) != (prompt_tokens, OUTPUT_TOKENS):
            return f"{answer['prompt_tokens']} tokens in and {answer['output_tokens']} out, wanted {prompt_tokens}"
    return None


def _reap(*arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    program = str(REPOSITORY / "plugins" / "module_utils")
    path = (environment or {}).get("PYTHONPATH")
    done = subprocess.run(
        [sys.executable, "-m", "reap", *arguments],
        env={**os.environ, "PYTHONPATH": f"{program}{os.pathsep}{path}" if path else program},
        capture_output=True,
        text=True,
        check=False,
    )
    # Libraries may print before the report.
    match = re.search(r"^\{\n.*?^\}$", done.stdout, re.MULTILINE | re.DOTALL)
    if not match:
        raise RuntimeError(f"reap {' '.join(arguments[:2])} ended with {done.returncode}: {done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(match[0])
    return report


# The report


def environment() -> dict[str, Any]:
    """What it ran on. torch is asked in a process of its own, so that no CUDA context stays on the GPU."""
    code = (
        "import json, torch, triton, transformers, vllm, platform; p = torch.cuda.get_device_properties(0);"
        "print(json.dumps({'gpu': p.name, 'capability': [p.major, p.minor], 'gpu_bytes': p.total_memory,"
        " 'torch': torch.__version__, 'cuda': torch.version.cuda, 'triton': triton.__version__,"
        " 'transformers': transformers.__version__, 'vllm': vllm.__version__, 'python': platform.python_version()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **python_path(SITE_PACKAGES)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"vLLM cannot be imported here: {done.stderr.strip()[-1500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": today, "driver": _nvidia_smi("driver_version"), **found}


def markdown(result: dict[str, Any]) -> str:
    """The report for people."""
    where, fit = result["environment"], result["predicted"]
    ledger = {term["name"]: term for term in fit["ledger"]}
    weights = sum(ledger[name]["bytes"] for name in ("weights_experts", "weights_other", "runtime_tables")) / GIB
    graphs = [ledger["cuda_graphs"][key] / GIB for key in ("low_bytes", "high_bytes")]
    phases = {phase["phase"]: phase for phase in result["phases"]}
    done = [phases[name] for name in patches.ROUTERS if name in phases and phases[name].get("prompts")]
    lines = [
        f"# A whole server with 144 experts on {where['gpu']}",
        "",
        f"{where['date']}, {where['gpu']} (compute capability {where['capability'][0]}.{where['capability'][1]}), "
        f"driver {where['driver']}, CUDA {where['cuda']}, torch {where['torch']}, triton {where['triton']}, "
        f"transformers {where['transformers']}, Python {where['python']}; the published wheel of vLLM {where['vllm']}.",
        "",
        "Made by `python3 -m tests.gpu.full_server run` (`make gpu-proof-full`): arguments and environment of profile "
        f"`{PROFILE}`, dummy weights in the full geometry, {', '.join(f'`{k}={v}`' for k, v in ENVIRONMENT.items())}.",
        "",
    ]
    for name, phase in phases.items():
        loaded = (
            f"; loading took {phase['logged']['loading_s']:.1f} s" if "loading_s" in phase.get("logged", {}) else ""
        )
        said = f"; it says `{phase['said']}`" if phase.get("said") else ""
        outcome = "as it should" if phase["passed"] else f"NOT as it should: {phase['problem']}"
        lines.append(f"- {name}: {outcome}{said}{loaded}")
    head = " | ".join(f"router {phase['phase']}" for phase in done)

    def row(name: str, wanted: str, values: Sequence[str]) -> None:
        lines.append(f"| {name} | {wanted} | {' | '.join(values)} |")

    def of(name: str, form: str) -> list[str]:
        return [format(phase["logged"][name], form) if name in phase["logged"] else "-" for phase in done]

    lines += ["", f"| | memory_fit (for a GB10) | {head} |", "|---|---:|" + "---:|" * len(done)]
    row("model loading took, GiB", f"{weights:.2f}", of("loading_gib", ".2f"))
    row("KV cache, tokens", f"{fit['kv_tokens']:,}", of("kv_tokens", ",.0f"))
    row("KV cache, requests of full length", f"{fit['kv_concurrency']:.2f}", of("kv_concurrency", ".2f"))
    row("CUDA graphs, GiB", f"{graphs[0]:.2f} to {graphs[1]:.2f}", of("graphs_gib", ".2f"))
    for key in ("allocated", "reserved", "device"):
        row(f"ready: {key}, GiB", "", [format(phase["memory_ready"][key], ".2f") for phase in done])
    whole = [
        sum(term[key] for term in fit["ledger"] if term["name"] != "host") / GIB for key in ("low_bytes", "high_bytes")
    ]
    for key in ("peak_allocated_gib", "peak_reserved_gib", "device_gib"):
        what = key.removesuffix("_gib").replace("_", " ")
        predicted_all = f"{whole[0]:.1f} to {whole[1]:.1f}" if key == "device_gib" else ""
        row(
            f"long prompt: {what}, GiB",
            predicted_all,
            [format(max(a[key] for a in p["prompts"][1:]), ".2f") for p in done],
        )
    row("loading, s", "", of("loading_s", ".1f"))
    row("ready after, s", "", [format(phase["ready_s"], ".1f") for phase in done])
    row("prompt, tokens", "", [format(phase["prompts"][-1]["prompt_tokens"], ",") for phase in done])
    for key, form in (("ttft_s", ".3f"), ("prefill_tok_s", ".0f"), ("decode_tok_s", ".2f")):
        medians = [statistics.median(answer[key] for answer in phase["prompts"][1:]) for phase in done]
        row(f"{key.replace('_tok_s', ', tok/s').replace('_s', ', s')}", "", [format(value, form) for value in medians])
    lines += [
        "",
        f"Prompts: a warm-up, then {PROMPTS} measured ones of random tokens with {OUTPUT_TOKENS} tokens of output "
        "each; their median is given. Allocated and reserved are PyTorch's, device is what nvidia-smi counts.",
        "",
        "memory_fit's last figure is the sum of its ledger without the host's own term; on a GB10 it includes what "
        "vLLM's processes take, which is not on this GPU.",
        "",
        "What this does not show: GB10's own kernels (attention, MoE and the router's are other builds there), unified "
        "memory, its speeds, FlashInfer, and what a model answers (the weights are random).",
    ]
    return "\n".join(lines) + "\n"


def run(out: Path, wanted: Sequence[str]) -> int:
    """Exit status: 0 everything holds, 1 something does not, 2 it could not run."""
    if not SITE_PACKAGES.exists():
        print(f"{SITE_PACKAGES} is missing: run `python3 -m tests.gpu.full_server fetch` first", file=sys.stderr)
        return 2
    try:
        where = environment()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"this machine cannot run the proof: {error}", file=sys.stderr)
        return 2
    if where["gpu_bytes"] < 120e9:
        print(f"{where['gpu']} has {where['gpu_bytes'] / 1e9:.0f} GB: 120 GB are needed", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    work = FOLDER / "work"
    write_model(work / "model")
    fit = predicted(PROFILE, where["gpu_bytes"])
    long = profile_of(PROFILE).needle_tokens
    for name in wanted:
        if name == "unpatched":
            result = unpatched(work, out)
        else:
            result = patched(name, work, out)
            result["problem"] = judge(result, long, fit["kv_tokens"])
            result["passed"] = result["problem"] is None
        _write(out / f"{name}.json", result)
        print(f"{name}: {result['problem'] or 'passed'}", flush=True)
    phases = [
        json.loads(path.read_text(encoding="utf-8")) for name in PHASES if (path := out / f"{name}.json").exists()
    ]
    whole = {"environment": where, "predicted": fit, "phases": phases}
    _write(out / "gpu-proof-full.json", whole)
    (out / "gpu-proof-full.md").write_text(markdown(whole), encoding="utf-8")
    print(markdown(whole))
    return 0 if all(phase["passed"] for phase in phases) else 1


def _write(path: Path, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=1).replace(f"{REPOSITORY}/", "")
    path.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu.full_server", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch", help="get the wheels, where packages can be had")
    running = commands.add_parser("run", help="run the proof, on the GPU machine")
    running.add_argument("--out", type=Path, required=True, help="folder for the report and the servers' logs")
    running.add_argument(
        "--phases", nargs="+", choices=PHASES, default=PHASES, help="only these; others stay as they are"
    )
    args = parser.parse_args()
    if args.command == "fetch":
        fetch()
        return 0
    return run(args.out.resolve(), args.phases)


if __name__ == "__main__":
    raise SystemExit(main())
