"""The set of patches: what each changes, where, and how it is proven. docs/patches.md argues the choices."""

from __future__ import annotations

import ast
import textwrap

from .core import Edit, Patch, ShapeError, Source, Tree, only
from .proofs import (
    cutedsl_proof,
    finds_the_library,
    functions,
    hygiene_proof,
    library_proof,
    router_proof,
)

CUTEDSL_SWITCH = "REAP_DISABLE_CUTEDSL"

_ROUTER_FOLDER = "vllm/model_executor/layers/fused_moe/router"
_ROUTER_FUNCTION = "vllm_topk_softplus_sqrt"
_KERNEL = "topk_hash_softplus_sqrt"
# Arguments of the kernel's wrapper in vLLM 0.20.0 to 0.33.0; those that came later are always passed by name.
_KERNEL_ARGUMENTS = (
    "topk_weights",
    "topk_indices",
    "token_expert_indices",
    "gating_output",
    "renormalize",
    "routed_scaling_factor",
    "e_score_correction_bias",
    "input_tokens",
    "hash_indices_table",
)
_KERNEL_LATER = {"is_padding", "bias_vl", "image_sentinel_lo"}


def _dotted(node: ast.expr) -> str:
    return ast.unparse(node)


def _router_edits(source: Source, mark: str) -> list[Edit]:
    import_ops = only(
        [
            node
            for node in source.tree.body
            if isinstance(node, ast.Import)
            and [(one.name, one.asname) for one in node.names] == [("vllm._custom_ops", "ops")]
        ],
        "`import vllm._custom_ops as ops`",
    )
    function = only(functions(source).get(_ROUTER_FUNCTION, []), f"function {_ROUTER_FUNCTION}")
    everywhere = [node for node in ast.walk(source.tree) if isinstance(node, ast.Attribute) and node.attr == _KERNEL]
    only(everywhere, f"use of {_KERNEL} in the file")
    call = only(
        [node for node in ast.walk(function) if isinstance(node, ast.Call) and _dotted(node.func) == f"ops.{_KERNEL}"],
        f"call of ops.{_KERNEL} in {_ROUTER_FUNCTION}",
    )
    given = tuple(_dotted(argument) for argument in call.args)
    if given != _KERNEL_ARGUMENTS:
        raise ShapeError(f"ops.{_KERNEL}({', '.join(_KERNEL_ARGUMENTS)}); found ({', '.join(given)})")
    later = {keyword.arg for keyword in call.keywords}
    if not later <= _KERNEL_LATER:
        raise ShapeError(
            f"no argument of ops.{_KERNEL} that the replacement does not know; found "
            f"{sorted(map(str, later - _KERNEL_LATER))}"
        )
    end = source.end(import_ops)
    return [
        Edit(
            end, end, f"\nfrom vllm.model_executor.layers.fused_moe.router import reap_router as _reap_router  {mark}"
        ),
        Edit(source.start(call.func), source.end(call.func), f"_reap_router.{_KERNEL}"),
    ]


_MXFP4_CLASS, _AFTER_LOADING = "Mxfp4MoEMethod", "process_weights_after_loading"


def _hygiene_edits(source: Source, mark: str) -> list[Edit]:
    only(
        [
            node
            for node in source.tree.body
            if isinstance(node, ast.Import) and [one.name for one in node.names] == ["torch"]
        ],
        "`import torch`",
    )
    method = only(functions(source, _MXFP4_CLASS).get(_AFTER_LOADING, []), f"method {_MXFP4_CLASS}.{_AFTER_LOADING}")
    setups = [
        node for node in ast.walk(method) if isinstance(node, ast.Call) and _dotted(node.func) == "self._setup_kernel"
    ]
    setup: ast.Call = only(setups, f"call of self._setup_kernel in {_MXFP4_CLASS}.{_AFTER_LOADING}")
    last = method.body[-1]
    if not (isinstance(last, ast.Expr) and last.value is setup):
        raise ShapeError(f"self._setup_kernel(...) as the last statement of {_MXFP4_CLASS}.{_AFTER_LOADING}")
    local = {
        target.id
        for node in ast.walk(method)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    names = [_dotted(argument) for argument in setup.args if _dotted(argument) in local]
    if len(names) < 4 or len(names) != len(local):
        raise ShapeError(f"the weights and scales as local variables handed to self._setup_kernel; found {names}")
    body = textwrap.indent(
        textwrap.dedent(
            f"""
            {mark}
            # What is left of the weights before their repacking goes back to the machine before the next layer's turn.
            del {", ".join(names)}
            import gc

            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.empty_cache()"""
        ),
        " " * last.col_offset,
    )
    end = source.end(last)
    return [Edit(end, end, body)]


def _hygiene_fixed(tree: Tree) -> str | None:
    loader = "vllm/model_executor/model_loader/utils.py"
    if not tree.has(loader):
        return None
    release = "release_device_memory_under_pressure"
    for function in functions(tree.source(loader)).get(_AFTER_LOADING, []):
        for loop in (node for node in ast.walk(function) if isinstance(node, ast.For)):
            called = {_dotted(node.func) for node in ast.walk(loop) if isinstance(node, ast.Call)}
            if release in called and f"quant_method.{_AFTER_LOADING}" in called:
                return f"the loader calls {release} after each layer"
    return None


def _cutedsl_edits(source: Source, mark: str) -> list[Edit]:
    only(
        [
            node
            for node in source.tree.body
            if isinstance(node, ast.Import) and [one.name for one in node.names] == ["os"]
        ],
        "`import os`",
    )
    function = only(functions(source).get("has_cutedsl", []), "function has_cutedsl")
    if function.args.args or not function.body:
        raise ShapeError("has_cutedsl without arguments")
    documented = ast.get_docstring(function) is not None
    if len(function.body) < 1 + documented:
        raise ShapeError("has_cutedsl with a body")
    first = function.body[documented]
    start = source.start(first)
    indent = " " * first.col_offset
    condition = f'os.environ.get("{CUTEDSL_SWITCH}", "") not in ("", "0")'
    text = f"{mark}\n{indent}if {condition}:\n{indent}    return False\n{indent}"
    return [Edit(start, start, text)]


def _cutedsl_unneeded(tree: Tree) -> str | None:
    source = tree.source("vllm/utils/import_utils.py")
    strings = {node.value for node in ast.walk(source.tree) if isinstance(node, ast.Constant)}
    # A renamed function would still ask for the module.
    if not any(isinstance(value, str) and ("cutlass" in value or "cutedsl" in value) for value in strings):
        return "this release does not look for cute-dsl"
    return None


def _library_edits(source: Source, mark: str) -> list[Edit]:
    function = only(functions(source).get("find_loaded_library", []), "function find_loaded_library")
    tests = [
        node
        for loop in ast.walk(function)
        if isinstance(loop, ast.For)
        for node in ast.walk(loop)
        if isinstance(node, ast.If) and _dotted(node.test) == "lib_name in line"
    ]
    test = only(tests, "`if lib_name in line:` in a loop of find_loaded_library")
    start, indent = source.start(test), " " * test.col_offset
    condition = 'line.rstrip().rpartition("/")[2].startswith((lib_name + ".", lib_name + "-"))'
    return [
        Edit(start, start, f"{mark}: the file's own name, not a stub whose name or folder holds it\n{indent}"),
        Edit(source.start(test.test), source.end(test.test), condition),
    ]


def _finds(tree: Tree, path: str) -> str | None:
    if finds_the_library(tree.source(path)) is None:
        return "find_loaded_library matches the file's own name"
    return None


PATCHES: tuple[Patch, ...] = (
    Patch(
        id="router-fallback",
        title="expert counts that the fused router kernel refuses are routed",
        package="vllm",
        path=f"{_ROUTER_FOLDER}/fused_topk_bias_router.py",
        upstream="not fixed in vLLM 0.33.0 (issue 51521, pull request 50982)",
        edits=_router_edits,
        proof=router_proof(_ROUTER_FUNCTION, _KERNEL_ARGUMENTS, "_reap_router", _KERNEL),
        adds={f"{_ROUTER_FOLDER}/reap_router.py": "router.py"},
    ),
    Patch(
        id="mxfp4-hygiene",
        title="memory of unpacked MXFP4 weights goes back after each layer",
        package="vllm",
        path="vllm/model_executor/layers/quantization/mxfp4.py",
        upstream="fixed in vLLM 0.24.0 (pull request 45179)",
        edits=_hygiene_edits,
        proof=hygiene_proof(_MXFP4_CLASS, _AFTER_LOADING),
        fixed=_hygiene_fixed,
    ),
    Patch(
        id="cutedsl-switch",
        title=f"{CUTEDSL_SWITCH}=1 turns the cute-dsl kernels off",
        package="vllm",
        path="vllm/utils/import_utils.py",
        upstream="no switch in vLLM 0.33.0",
        edits=_cutedsl_edits,
        proof=cutedsl_proof(CUTEDSL_SWITCH),
        unneeded=_cutedsl_unneeded,
    ),
    Patch(
        id="flashinfer-libcudart",
        title="FlashInfer finds the CUDA runtime, not a stub of it",
        package="flashinfer",
        path="flashinfer/comm/cuda_ipc.py",
        upstream="fixed in flashinfer-python 0.7.1 (pull request 5198)",
        edits=_library_edits,
        proof=library_proof,
        fixed=lambda tree: _finds(tree, "flashinfer/comm/cuda_ipc.py"),
        optional=True,
    ),
    Patch(
        id="vllm-libcudart",
        title="vLLM finds the CUDA runtime, not a stub of it",
        package="vllm",
        path="vllm/utils/system_utils.py",
        upstream="fixed in vLLM 0.26.0 (pull request 47586)",
        edits=_library_edits,
        proof=library_proof,
        fixed=lambda tree: _finds(tree, "vllm/utils/system_utils.py"),
    ),
)
