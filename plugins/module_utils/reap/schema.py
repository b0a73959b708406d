"""Check a mapping against the fields of a dataclass, and say in one line all that is wrong with it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def shown(value: object) -> str:
    """A value as an error shows it: as written, with its type."""
    return f"{value!r} ({type(value).__name__})"


def mapping_faults(cls: type, data: object, special: Iterable[str] = ()) -> list[str]:
    """Compare a mapping with the fields of a dataclass: unknown keys, missing keys, wrong types.

    Args:
        cls: a dataclass whose annotations are texts (``from __future__ import annotations``) of the forms bool, int,
            float, str, ``dict[...]``, ``tuple[str, ...]`` (a list in the data), each perhaps ``| None``. A field with
            a default may be missing.
        data: what was read.
        special: names of fields whose values the caller checks itself.

    Returns:
        One phrase per fault, each naming key, found and wanted; empty when the mapping can be used.
    """
    if not isinstance(data, Mapping):
        return [f"found {shown(data)}, wanted a mapping"]
    known = {field.name: field for field in dataclasses.fields(cls)}
    faults = [f"unknown key {key!r}{_nearest(str(key), known)}" for key in data if key not in known]
    for name, field in known.items():
        if name in data:
            fault = None if name in special else _type_fault(name, str(field.type), data[name])
            faults += [fault] if fault else []
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            faults.append(f"missing key {name!r}")
    return faults


def _nearest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _type_fault(name: str, kind: str, value: Any) -> str | None:
    if kind.endswith("| None") and value is None:
        return None
    if kind.startswith("bool"):
        fits, wanted = isinstance(value, bool), "true or false"
    elif kind.startswith("int"):
        fits, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif kind.startswith("float"):
        fits, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    elif kind.startswith("dict"):
        fits, wanted = isinstance(value, Mapping), "a mapping"
    elif kind.startswith("tuple"):
        fits = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)
        wanted = "a list of texts"
    else:
        fits, wanted = isinstance(value, str) and bool(value.strip()), "a text that is not empty"
    if fits:
        return None
    return f"{name} is {shown(value)}, wanted {wanted}{', or null' if kind.endswith('| None') else ''}"
