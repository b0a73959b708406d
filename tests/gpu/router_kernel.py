"""The router patch against vLLM's own compiled kernel, on a CUDA GPU.

    python3 -m tests.gpu.router_kernel fetch              # where packages can be had: about 40 MB into .cache/gpu-proof
    python3 -m tests.gpu.router_kernel run --out FOLDER   # where torch sees a GPU; needs no network and no vLLM

Used are the real files of the published wheel: the kernel library and the router's source, patched by `reap patch` as
in an image. Only what that source imports from the rest of vLLM is replaced by stand-ins; the kernel's wrapper is taken
out of the real ``_custom_ops.py``.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import importlib.util
import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "plugins" / "module_utils"))

from reap import patches
from reap.patches.selftest import problem_of, reference_row

FOLDER = REPOSITORY / ".cache" / "gpu-proof"
VLLM = "0.22.0"
LIBRARY = "vllm/_moe_C.abi3.so"
CUSTOM_OPS = "vllm/_custom_ops.py"
ROUTER_PACKAGE = "vllm.model_executor.layers.fused_moe.router"
ROUTER = ROUTER_PACKAGE.replace(".", "/") + "/fused_topk_bias_router.py"

TOP_K, SCALE, VOCABULARY = 6, 2.5, 257
PRUNED, SUPPORTED = (130, 144, 160, 180), (128, 192, 256, 384)
TOKENS_TIMED = (1, 8, 512, 8192)
# The kernel computes softplus with fast-math intrinsics (__logf(1 + __expf(x))), the plain replacement does not. Where
# two biased scores are as near as the second number of a pair, fp32 may choose either; every such swap is counted.
# Measured on an H200: weights within 8e-7.
KERNEL_TOLERANCE, KERNEL_NEAR_TIE = 5e-6, 5e-6
PLAIN_TOLERANCE, PLAIN_NEAR_TIE = 1e-6 * SCALE, 4e-6
CALLS_PER_GRAPH, REPLAYS, ROUNDS = 20, 50, 7


def fetch() -> None:
    """Put the kernel library and the files that the patches touch into the cache."""
    from tests.published import fetch as published

    members = [patch.path for patch in patches.PATCHES if patch.package == "vllm"]
    source = published("vllm", VLLM, [LIBRARY, CUSTOM_OPS, "vllm/model_executor/model_loader/utils.py", *members])
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.copytree(source, FOLDER / "site-packages", ignore=shutil.ignore_patterns(".absent", "__pycache__"))
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{FOLDER}: {size / 2**20:.1f} MiB")


# The real router file with stand-ins around it


def _module(name: str, **names: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(names)
    sys.modules[name] = module
    return module


def _package(name: str) -> types.ModuleType:
    module = _module(name)
    module.__path__ = []
    return module


def kernel_wrapper(torch: Any, source: Path) -> Callable[..., None]:
    """`topk_hash_softplus_sqrt` out of the real ``_custom_ops.py``."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "topk_hash_softplus_sqrt"]
    assert len(found) == 1, "topk_hash_softplus_sqrt is not once in _custom_ops.py"
    space: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module(body=found, type_ignores=[]), str(source), "exec"), space)
    function: Callable[..., None] = space["topk_hash_softplus_sqrt"]
    return function


def load_router(site_packages: Path, kernel: Callable[..., None]) -> tuple[Any, Any]:
    """Execute the router file of a folder.

    Returns:
        Its module, and the module of the replacement (None where the folder is not patched).
    """
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        del sys.modules[name]
    parts = ROUTER_PACKAGE.split(".")
    for depth in range(1, len(parts) + 1):
        _package(".".join(parts[:depth]))
    for name in ("vllm.distributed", "vllm.distributed.eplb"):
        _package(name)
    sys.modules["vllm"]._custom_ops = _module("vllm._custom_ops", topk_hash_softplus_sqrt=kernel)  # type: ignore[attr-defined]
    sys.modules["vllm"].envs = _module("vllm.envs", VLLM_BATCH_INVARIANT=False)  # type: ignore[attr-defined]
    off = types.SimpleNamespace(is_fused_moe_enabled=lambda: False)
    _module("vllm._aiter_ops", rocm_aiter_ops=off)
    _module("vllm.platforms", current_platform=types.SimpleNamespace(is_xpu=lambda: False, is_cuda=lambda: True))
    _module("vllm.distributed.eplb.eplb_state", EplbLayerState=object)
    _module(
        "vllm.model_executor.layers.fused_moe.config",
        RoutingMethodType=object,
        get_routing_method_type=lambda **_: None,
    )
    _module(f"{ROUTER_PACKAGE}.base_router", BaseRouter=object)
    replacement = None
    beside = site_packages / ROUTER_PACKAGE.replace(".", "/") / "reap_router.py"
    if beside.exists():
        replacement = _execute(f"{ROUTER_PACKAGE}.reap_router", beside)
        sys.modules[ROUTER_PACKAGE].reap_router = replacement  # type: ignore[attr-defined]
    return _execute(f"{ROUTER_PACKAGE}.fused_topk_bias_router", site_packages / ROUTER), replacement


def _execute(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Inputs


@dataclass
class Seen:
    """What routed tokens were like beside the fp64 reference.

    Attributes:
        tokens: how many.
        weight_error: largest error of a weight, against the reference for the experts that were chosen.
        swapped: tokens with another expert than the reference's, or in another order; allowed for near ties only.
        widest_swap: largest difference of the two biased scores concerned.
    """

    tokens: int = 0
    weight_error: float = 0.0
    swapped: int = 0
    widest_swap: float = 0.0

    def add(self, weight_error: float, swaps: list[float]) -> None:
        """Count one token."""
        self.tokens += 1
        self.weight_error = max(self.weight_error, weight_error)
        self.swapped += bool(swaps)
        self.widest_swap = max(self.widest_swap, *swaps, 0.0)

    def join(self, other: Seen) -> None:
        """Count another call's tokens."""
        self.tokens += other.tokens
        self.weight_error = max(self.weight_error, other.weight_error)
        self.swapped += other.swapped
        self.widest_swap = max(self.widest_swap, other.widest_swap)


class Case:
    """Tensors of one call of `fused_topk_bias`, and the same as plain numbers."""

    def __init__(
        self,
        torch: Any,
        device: str,
        experts: int,
        tokens: int,
        hashed: bool,
        dtype: Any,
        index: Any,
        kind: str,
        seed: int,
    ) -> None:
        draw = random.Random(seed)
        self.hashed, self.tokens, self.experts = hashed, tokens, experts
        if tokens > 1024:  # for timing only
            generator = torch.Generator().manual_seed(seed)
            logits = torch.randn(tokens, experts, generator=generator) * 2
        else:
            rows = [[draw.gauss(0, 2) for _ in range(experts)] for _ in range(tokens)]
            if kind == "ties":  # few distinct values and a flat bias: the lowest id has to win
                rows = [[float(draw.randrange(3)) for _ in range(experts)] for _ in range(tokens)]
            elif kind == "zeros":  # every score is exactly 0
                rows = [[float("-inf")] * experts for _ in range(tokens)]
            elif kind == "nan":  # counts as a score of 0
                rows = [[float("nan") if draw.random() < 0.1 else value for value in row] for row in rows]
            logits = torch.tensor(rows)
        self.logits = logits.to(dtype).to(device)
        spread = 0.0 if kind in ("ties", "zeros") else 0.3
        self.bias = torch.tensor(
            [8.08 + draw.gauss(0, spread) for _ in range(experts)], dtype=torch.float32, device=device
        )
        self.table_rows = [draw.sample(range(experts), TOP_K) for _ in range(VOCABULARY)]
        self.token_ids = [draw.randrange(VOCABULARY) for _ in range(tokens)]
        self.table = torch.tensor(self.table_rows, dtype=index, device=device) if hashed else None
        self.ids_in = torch.tensor(self.token_ids, dtype=index, device=device) if hashed else None
        self.hidden = torch.zeros(tokens, 8, dtype=dtype, device=device)
        self.index = index

    def call(self, router: Any) -> tuple[Any, Any]:
        """Through the real `fused_topk_bias`."""
        weights, ids = router.fused_topk_bias(
            hidden_states=self.hidden,
            gating_output=self.logits,
            scoring_func="sqrtsoftplus",
            e_score_correction_bias=self.bias,
            topk=TOP_K,
            renormalize=True,
            indices_type=self.index,
            input_tokens=self.ids_in,
            hash_indices_table=self.table,
            routed_scaling_factor=SCALE,
        )
        return weights, ids

    def problem(self, weights: Any, ids: Any, tolerance: float, near: float) -> tuple[str | None, Seen]:
        """What differs from the fp64 reference, and what was seen up to there."""
        seen = Seen()
        if ids.dtype != self.index:
            return f"ids are {ids.dtype}, wanted {self.index}", seen
        bias = self.bias.double().cpu().tolist()
        rows, got_ids, got_weights = (
            self.logits.double().cpu().tolist(),
            ids.cpu().tolist(),
            weights.double().cpu().tolist(),
        )
        for number, row in enumerate(rows):
            table_ids = self.table_rows[self.token_ids[number]] if self.hashed else None
            said = problem_of(
                got_ids[number],
                got_weights[number],
                row,
                bias,
                table_ids,
                scale=SCALE,
                tolerance=tolerance,
                near_tie=near,
            )
            if said:
                return f"token {number}: {said}", seen
            wanted_ids, _, choice = reference_row(row, bias, table_ids, True, SCALE, TOP_K)
            right = reference_row(row, bias, got_ids[number], True, SCALE, TOP_K)[1]
            seen.add(
                max(abs(a - b) for a, b in zip(got_weights[number], right, strict=True)),
                [abs(choice[a] - choice[b]) for a, b in zip(got_ids[number], wanted_ids, strict=True) if a != b],
            )
        return None, seen


# The proof


class Proof:
    """Runs the checks and keeps what they found."""

    def __init__(self, torch: Any, device: str, kernel: Callable[..., None], site_packages: Path, work: Path) -> None:
        self.torch, self.device, self.kernel = torch, device, kernel
        self.folders = {"unpatched": site_packages}
        for variant in patches.ROUTERS:
            folder = work / variant
            shutil.copytree(site_packages, folder, ignore=shutil.ignore_patterns("*.so"))
            planned = patches.plan(patches.PATCHES, folder, variant)
            assert planned.ok, [verdict.reason for verdict in planned.verdicts if verdict.state == "failed"]
            patches.write(folder, planned.files)
            self.folders[variant] = folder
        self.checks: list[dict[str, Any]] = []
        self.seen: dict[str, Seen] = {}

    def note(self, name: str, problem: str | None, **details: Any) -> None:
        self.checks.append({"check": name, "passed": problem is None, "problem": problem, **details})
        if problem is not None:
            print(f"FAIL {name}: {problem}", flush=True)

    def case(self, experts: int, tokens: int = 64, hashed: bool = False, **options: Any) -> Case:
        torch = self.torch
        options = {"dtype": torch.float32, "index": torch.int32, "kind": "plain", "seed": experts, **options}
        return Case(torch, self.device, experts, tokens, hashed, **options)

    def unpatched_refuses(self) -> None:
        router, _ = load_router(self.folders["unpatched"], self.kernel)
        try:
            self.case(144).call(router)
            self.note("unpatched: 144 experts are refused", "the kernel took them")
        except RuntimeError as error:
            text = str(error).strip().splitlines()[0]
            problem = None if "Unsupported expert number: 144" in str(error) else text
            self.note("unpatched: 144 experts are refused", problem, said=text)

    def equals_reference(self, variant: str) -> None:
        torch = self.torch
        router, entry = load_router(self.folders[variant], self.kernel)
        for experts in (*PRUNED, *SUPPORTED):
            by_kernel = variant == "padded" or experts in SUPPORTED
            tolerance, near = (KERNEL_TOLERANCE, KERNEL_NEAR_TIE) if by_kernel else (PLAIN_TOLERANCE, PLAIN_NEAR_TIE)
            # The kernel of vLLM 0.22 says nothing about NaN; that of 0.32 and the replacement count it as a score of 0.
            kinds = ("plain", "ties", "zeros") if by_kernel else ("plain", "ties", "zeros", "nan")
            for hashed in (False, True):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    for index in (torch.int32, torch.int64):
                        for kind in kinds:
                            case = self.case(experts, hashed=hashed, dtype=dtype, index=index, kind=kind)
                            try:
                                problem, seen = case.problem(*case.call(router), tolerance, near)
                            except RuntimeError as error:
                                problem, seen = str(error).splitlines()[0], Seen()
                            how = "kernel" if experts in SUPPORTED else variant
                            self.seen.setdefault(how, Seen()).join(seen)
                            words = [
                                f"{experts} experts",
                                "hash" if hashed else "bias",
                                str(dtype)[6:],
                                str(index)[6:],
                                kind,
                            ]
                            self.note(f"{variant}: {', '.join(words)}", problem, **asdict(seen))
        refused = sorted(count for count, _ in entry._refused)
        self.note(
            f"{variant}: only unsupported counts were taken from the kernel",
            None if refused == sorted(PRUNED) else f"refused {refused}",
        )

    def captures(self, variant: str) -> None:
        torch = self.torch
        router, _ = load_router(self.folders[variant], self.kernel)
        for hashed in (False, True):
            case, other = self.case(144, hashed=hashed, seed=1), self.case(144, hashed=hashed, seed=2)
            try:
                graph, output = self.graph(lambda case=case: case.call(router), 1)
                case.logits.copy_(other.logits)
                if case.ids_in is not None:
                    case.ids_in.copy_(other.ids_in)
                    other.table = case.table
                case.bias.copy_(other.bias)
                graph.replay()
                torch.cuda.synchronize()
                weights, ids = other.call(router)
                same = torch.equal(ids, output[1]) and torch.equal(weights, output[0])
                problem = None if same else "a replay with new inputs differs from a plain call"
            except RuntimeError as error:
                problem = str(error).splitlines()[0]
            self.note(f"{variant}: capture and replay in a CUDA graph, {'hash' if hashed else 'bias'}", problem)

    def captures_without_a_call_before(self, variant: str) -> None:
        """The kernel's refusal inside a capture must not spoil the capture."""
        torch = self.torch
        router, entry = load_router(self.folders[variant], self.kernel)
        case = self.case(144, seed=3)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                weights, ids = case.call(router)
            graph.replay()
            torch.cuda.synchronize()
            problem, _ = case.problem(weights, ids, KERNEL_TOLERANCE, KERNEL_NEAR_TIE)
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
        self.note(f"{variant}: the first call of all inside a capture", problem, refused=len(entry._refused))

    def padding_outside_the_table(self) -> None:
        """What stands in a padded row of a hash layer may be no token id at all, and an index outside ends a process.

        The kernel of vLLM 0.22 knows no padding, so the replacement is called directly.
        """
        torch = self.torch
        _, entry = load_router(self.folders["torch"], self.kernel)
        case = self.case(144, hashed=True, index=torch.int64)
        padding = torch.arange(case.tokens, device=self.device) % 3 == 0
        tokens = case.ids_in.masked_fill(padding, 10**9)
        weights = torch.empty(case.tokens, TOP_K, device=self.device)
        ids = torch.empty(case.tokens, TOP_K, dtype=torch.int64, device=self.device)
        try:
            entry.replacement(
                weights, ids, None, case.logits, True, SCALE, case.bias, tokens, case.table, is_padding=padding
            )
            torch.cuda.synchronize()
            good = bool((ids[padding] == -1).all() and (weights[padding] == 0).all())
            good = good and torch.equal(ids[~padding], case.table[case.ids_in[~padding]])
            problem = None if good else "padded rows are not -1 and 0, or the others are not the table's"
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
        self.note("torch: padded rows of a hash layer with token ids outside the table", problem)

    def graph(self, call: Callable[[], Any], calls: int) -> tuple[Any, Any]:
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                output = call()
        return graph, output

    def microseconds(self, call: Callable[[], Any]) -> float:
        """Median over rounds of the time of one call inside a CUDA graph."""
        torch = self.torch
        graph, _ = self.graph(call, CALLS_PER_GRAPH)
        for _ in range(5):
            graph.replay()
        rounds = []
        for _ in range(ROUNDS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            rounds.append(begin.elapsed_time(end) * 1000 / REPLAYS / CALLS_PER_GRAPH)
        return statistics.median(rounds)

    def timings(self) -> list[dict[str, Any]]:
        table = []
        for hashed in (False, True):
            for tokens in TOKENS_TIMED:
                row: dict[str, Any] = {"mode": "hash" if hashed else "bias", "tokens": tokens}
                for name, variant, experts in (
                    ("native_192", "torch", 192),
                    ("padded", "padded", 144),
                    ("torch", "torch", 144),
                ):
                    router, _ = load_router(self.folders[variant], self.kernel)
                    case = self.case(experts, tokens=tokens, hashed=hashed)
                    row[f"{name}_us"] = round(self.microseconds(lambda case=case, router=router: case.call(router)), 2)
                row["torch_over_padded"] = round(row["torch_us"] / row["padded_us"], 2)
                table.append(row)
                print(row, flush=True)
        return table


def environment(torch: Any, library: Path) -> dict[str, Any]:
    """Date, machine and versions of a run."""
    driver = ""
    if program := shutil.which("nvidia-smi"):
        words = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    major, minor = torch.cuda.get_device_capability()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": f"{major}.{minor}",
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "vllm": VLLM,
        "kernel_library_sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
        "patch_set": {router: patches.patch_set_hash(router) for router in patches.ROUTERS},
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    where = result["environment"]
    passed = sum(check["passed"] for check in result["checks"])
    lines = [
        f"# The router patch on {where['gpu']}",
        "",
        f"{where['date']}, {where['gpu']} (compute capability {where['compute_capability']}), "
        f"driver {where['driver']}, torch {where['torch']}, CUDA {where['cuda']}; "
        f"kernel library and router of vLLM {where['vllm']}.",
        "",
        "Made by `python3 -m tests.gpu.router_kernel run` (`make gpu-proof`).",
        "",
        f"{passed} of {len(result['checks'])} checks passed. Unpatched, 144 experts: `{result['unpatched_says']}`.",
        "",
        f"Against fp64 (the weights of a token sum to {SCALE}). Another choice than the reference's passes only where "
        f"the two biased scores are within {PLAIN_NEAR_TIE:.0e} (torch) or {KERNEL_NEAR_TIE:.0e} (the kernel, padded "
        f"or not), a weight within {PLAIN_TOLERANCE:.1e} or {KERNEL_TOLERANCE:.0e}:",
        "",
        "| by | tokens | tokens with another choice | widest such difference | largest error of a weight |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {seen['tokens']} | {seen['swapped']} | {seen['widest_swap']:.1e} | "
            f"{seen['weight_error']:.1e} |"
            for name, seen in result["against_fp64"].items()
        ),
        "",
        "Microseconds per call of `fused_topk_bias` inside a CUDA graph "
        f"(median of {ROUNDS} rounds of {REPLAYS} replays of {CALLS_PER_GRAPH} calls); 144 experts unless said:",
        "",
        "| mode | tokens | native kernel, 192 experts | padded | torch | torch / padded |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['mode']} | {row['tokens']} | {row['native_192_us']} | {row['padded_us']} | {row['torch_us']} | "
        f"{row['torch_over_padded']} |"
        for row in result["timings"]
    ]
    failed = [check for check in result["checks"] if not check["passed"]]
    if failed:
        lines += ["", "Failed:", "", *(f"- {check['check']}: {check['problem']}" for check in failed)]
    return "\n".join(lines) + "\n"


def run(out: Path) -> int:
    """Exit status: 0 everything holds, 1 something does not, 2 it could not run."""
    try:
        import torch
    except ImportError:
        print("torch is not installed: run this where torch sees a CUDA GPU", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("torch sees no CUDA GPU: run this on a machine with one", file=sys.stderr)
        return 2
    site_packages = FOLDER / "site-packages"
    if not (site_packages / LIBRARY).exists():
        print(f"{site_packages} is missing: run `python3 -m tests.gpu.router_kernel fetch` first", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    torch.ops.load_library(str(site_packages / LIBRARY))
    kernel = kernel_wrapper(torch, site_packages / CUSTOM_OPS)
    with tempfile.TemporaryDirectory(prefix="gpu-proof-") as work:
        proof = Proof(torch, "cuda", kernel, site_packages, Path(work))
        proof.unpatched_refuses()
        for variant in patches.ROUTERS:
            proof.captures_without_a_call_before(variant)
            proof.equals_reference(variant)
            proof.captures(variant)
            print(
                f"{variant}: {sum(check['passed'] for check in proof.checks)} of {len(proof.checks)} checks", flush=True
            )
        timings = proof.timings()
        # Last: where it fails, the process has no GPU any more.
        proof.padding_outside_the_table()
    result = {
        "environment": environment(torch, site_packages / LIBRARY),
        "passed": all(check["passed"] for check in proof.checks),
        "unpatched_says": proof.checks[0].get("said"),
        "against_fp64": {name: asdict(seen) for name, seen in proof.seen.items()},
        "timings": timings,
        "checks": proof.checks,
    }
    (out / "gpu-proof.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "gpu-proof.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    return 0 if result["passed"] else 1


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu.router_kernel", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch", help="get the files, where packages can be had")
    running = commands.add_parser("run", help="run the proof, where torch sees a GPU")
    running.add_argument("--out", type=Path, required=True, help="folder for gpu-proof.json and gpu-proof.md")
    args = parser.parse_args()
    if args.command == "fetch":
        fetch()
        return 0
    return run(args.out)


if __name__ == "__main__":
    raise SystemExit(main())
