"""Run one function of a published file against stand-ins, without importing the package.

A proof looks at what a function does, not at how it is written; so a release that fixed a defect in its own way is
told from one that did not, and an edit is proven before it is written.
"""

from __future__ import annotations

import ast
import builtins
import gc
import io
import weakref
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from .core import ShapeError, Source, only

# One line of /proc/self/maps per library (proc_pid_maps(5)): address range, access, offset, device, inode, path.
_REAL = "7f0000100000-7f0000200000 r-xp 00000000 08:01 11 /usr/local/lib/python3.12/nvidia/cu13/lib/libcudart.so.13"
_STUB = "7f0000300000-7f0000400000 r-xp 00000000 08:01 12 /usr/local/lib/python3.12/tilelang/lib/libcudart_stub.so"
_FOLDER = "7f0000500000-7f0000600000 r-xp 00000000 08:01 13 /opt/libcudart.d/libother.so.1"
_HASHED = "7f0000700000-7f0000800000 r-xp 00000000 08:01 14 /srv/libcudart-d0da41ae.so.11.0"
_ANONYMOUS = "7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]"
PROCESS_MAPS: dict[str, tuple[list[str], str | None]] = {
    "stub first": ([_STUB, _REAL], _REAL),
    "stub last": ([_REAL, _STUB], _REAL),
    "stub alone": ([_STUB, _ANONYMOUS], None),
    "name in a folder first": ([_FOLDER, _HASHED], _HASHED),
    "real alone": ([_ANONYMOUS, _REAL], _REAL),
    "nothing": ([_ANONYMOUS], None),
}


class _Anything:
    """Stands for whatever a function imports: every attribute and call of it is false and again anything."""

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **kwargs: object) -> _Anything:
        return self

    def __bool__(self) -> bool:
        return False


# fmt: off
_SAFE = (
    "AssertionError", "AttributeError", "Exception", "ImportError", "KeyError", "OSError", "RuntimeError",
    "StopIteration", "TypeError", "ValueError", "all", "any", "bool", "bytes", "dict", "enumerate", "float",
    "getattr", "hasattr", "int", "isinstance", "len", "list", "max", "min", "next", "range", "repr", "set",
    "sorted", "staticmethod", "str", "sum", "tuple", "zip",
)
# fmt: on


def functions(source: Source, owner: str | None = None) -> dict[str, list[ast.FunctionDef]]:
    """Functions of the module (or of one class of it) by name."""
    body = source.tree.body
    if owner is not None:
        body = only(
            [node for node in body if isinstance(node, ast.ClassDef) and node.name == owner], f"class {owner}"
        ).body
    found: dict[str, list[ast.FunctionDef]] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
    return found


def load(
    source: Source,
    name: str,
    names: Mapping[str, Any],
    modules: Mapping[str, Any] | None = None,
    owner: str | None = None,
) -> Callable[..., Any]:
    """Compile one function and its neighbours of the same file, with stand-ins for everything else.

    Args:
        names: module-level names the function may use.
        modules: what its own import statements get; everything else is a stand-in that is false.
        owner: the class it is a method of.

    Raises:
        ShapeError: there is no such function, or more than one.
    """
    only(functions(source, owner).get(name, []), f"function {name}")
    nodes: list[ast.stmt] = [
        ast.ImportFrom(module="__future__", names=[ast.alias(name="annotations")], level=0),
        *(ast.parse(ast.unparse(node)).body[0] for node in _all_functions(source, owner)),
    ]
    for node in nodes[1:]:
        assert isinstance(node, ast.FunctionDef)
        node.decorator_list = []
        node.args.defaults = [ast.Constant(value=None) for _ in node.args.defaults]
        node.args.kw_defaults = [None if one is None else ast.Constant(value=None) for one in node.args.kw_defaults]
    module = ast.fix_missing_locations(ast.Module(body=nodes, type_ignores=[]))

    def imported(module_name: str, *_: object) -> object:
        return (modules or {}).get(module_name, _Anything())

    safe = {one: getattr(builtins, one) for one in _SAFE}
    space: dict[str, Any] = {"__builtins__": {**safe, "__import__": imported}}
    exec(compile(module, name, "exec", dont_inherit=True), space)
    function: Callable[..., Any] = space[name]
    # Last, so that a stand-in wins over a neighbour of the same name.
    space.update(names)
    return function


def _all_functions(source: Source, owner: str | None) -> list[ast.FunctionDef]:
    return [node for nodes in functions(source, owner).values() for node in nodes]


def finds_the_library(source: Source) -> str | None:
    """Why ``find_loaded_library`` of the file is wrong, or None where it tells the library from its stubs."""
    import re

    for label, (lines, wanted) in PROCESS_MAPS.items():
        text = "".join(line + "\n" for line in lines)

        def fake_open(path: str, *_: object, text: str = text, **__: object) -> io.StringIO:
            if path != "/proc/self/maps":
                raise OSError(path)
            return io.StringIO(text)

        find = load(source, "find_loaded_library", {"open": fake_open, "re": re})
        expected = None if wanted is None else wanted[wanted.index("/") :]
        try:
            found = find("libcudart")
        except Exception as error:  # the published function asserts where it picked the stub
            return f"{label}: {type(error).__name__}: {error}"
        if found != expected:
            return f"{label}: found {found}, wanted {expected}"
    return None


def library_proof(source: Source) -> None:
    """The edited function tells libcudart from a stub, wherever the stub is mapped."""
    if problem := finds_the_library(source):
        raise ShapeError(f"a find_loaded_library that can be mended; {problem}")


def cutedsl_proof(variable: str) -> Callable[[Source], None]:
    """has_cutedsl answers no while the variable is set, and what it answered before while it is not."""

    def proof(source: Source) -> None:
        for value, installed, wanted in (
            (None, True, True),
            (None, False, False),
            ("1", True, False),
            ("0", True, True),
        ):
            environment = {} if value is None else {variable: value}
            answer = load(
                source,
                "has_cutedsl",
                {
                    "_has_module": lambda name, installed=installed: installed,
                    "os": SimpleNamespace(environ=environment),
                },
            )()
            if answer is not wanted:
                raise ShapeError(f"a has_cutedsl that {variable}={value!r} switches; it answers {answer!r}")

    return proof


def hygiene_proof(owner: str, method: str) -> Callable[[Source], None]:
    """Memory is given back after the kernel is set up, with no reference to the tensors before it left."""

    class Tensor:
        pass

    def proof(source: Source) -> None:
        layer = SimpleNamespace(
            **{name: Tensor() for name in ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale")}
        )
        before = [weakref.ref(value) for value in vars(layer).values()]
        events: list[str] = []

        def setup(given: Any, *tensors: object) -> None:
            events.append("setup")
            for name in vars(given):
                setattr(given, name, Tensor())

        def empty_cache() -> None:
            events.append("released" if not any(one() for one in before) else "released too early")

        cuda = SimpleNamespace(is_available=lambda: True, synchronize=lambda: None, empty_cache=empty_cache)
        run = load(source, method, {"torch": SimpleNamespace(cuda=cuda), **_enums()}, {"gc": gc}, owner)
        run(SimpleNamespace(mxfp4_backend="MARLIN", _setup_kernel=setup), layer)
        if events != ["setup", "released"]:
            raise ShapeError(f"{owner}.{method} that releases memory after its setup; it did {events}")

    return proof


def _enums() -> dict[str, Any]:
    return {"Mxfp4MoeBackend": SimpleNamespace(NONE="NONE"), "is_weights_pre_processed": lambda: False}


def router_proof(function: str, arguments: tuple[str, ...], alias: str, method: str) -> Callable[[Source], None]:
    """The wrapper hands every one of its tensors to the replacement's entry, in the kernel's order."""

    def proof(source: Source) -> None:
        calls: list[tuple[Any, ...]] = []
        entry = SimpleNamespace(**{method: lambda *given, **later: calls.append((given, later))})
        definition = only(functions(source).get(function, []), f"function {function}")
        own = [argument.arg for argument in (*definition.args.args, *definition.args.kwonlyargs)]
        tokens = {name: f"<{name}>" for name in own}
        tokens["topk_indices"] = SimpleNamespace(shape=(1, 6))  # type: ignore[assignment]
        names = {alias: entry, "envs": _Anything(), "is_forward_context_available": _Anything()}
        load(source, function, names)(**tokens)
        given, later = only(calls, f"one call of {alias}.{method} in {function}")
        if tuple(given) != tuple(tokens[name] for name in arguments):
            raise ShapeError(f"{function} handing over {', '.join(arguments)}; it hands over {given}")
        for name in set(later) - {"is_padding"}:
            if later[name] != tokens[name]:
                raise ShapeError(f"{function} handing over its own {name}; it hands over {later[name]}")

    return proof
