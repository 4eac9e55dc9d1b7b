"""Whether what was read from a file has the types that it should have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from fl_app.util.text import printable

_LARGEST = 2**64  # of a whole number: Flower's node ids are below it
LARGEST_FLOAT = 1e100
"""Of a number with a point: its square, and sums of it, are finite."""
_DEEPEST = 8  # levels of what a schema leaves open
_SHOWN = 40  # characters of a wrong value


def problem(value: object, kind: Any, where: str = "") -> str:
    """Return what is wrong with a value that was read from JSON, or nothing.

    Parameters
    ----------
    value : object
    kind : type
        What it should be: a scalar, ``Any``, ``Literal``, a union, a ``Mapping`` with str as
        keys, a ``Sequence``, a ``TypedDict``, or a dataclass for an object with its fields;
        those with a default may be missing. Numbers are finite, and no bool is one.
    where : str
        The value's name, for the words.
    """
    if _fits(value, _scalars(kind)):
        return ""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _plain(value, where, _DEEPEST)
    if origin is Literal:
        allowed = ", ".join(map(str, arguments))
        return "" if value in arguments else _wrong(value, f"one of {allowed}", where)
    if origin in (Union, UnionType):
        return _of_union(value, arguments, where)
    if is_dataclass(kind) or is_typeddict(kind):
        return _of_fields(value, kind, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _of_mapping(value, arguments[1], where)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return _of_sequence(value, arguments[0], where)
    return _of_scalar(value, kind, where)


@lru_cache
def _scalars(kind: Any) -> frozenset[type]:
    """Return the types of a kind's values, where all of them are scalars."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if not set(kinds) <= {NoneType, int, float, str, bool}:
        return frozenset()
    return frozenset(kinds) | ({int} if float in kinds else set())


def _fits(value: object, kinds: frozenset[type]) -> bool:
    """Say quickly whether a value is a scalar of one of these types, and no huge number."""
    return (
        type(value) in kinds
        and (not isinstance(value, int | float) or -LARGEST_FLOAT <= value <= LARGEST_FLOAT)
        and (type(value) is not int or abs(value) <= _LARGEST)
    )


def _of_union(value: object, kinds: Sequence[Any], where: str) -> str:
    found = [problem(value, kind, where) for kind in kinds]
    if "" in found:
        return ""
    if isinstance(value, dict | list | tuple):
        # It is meant to be the one kind of it that there is: say what is wrong inside.
        inside = [words for kind, words in zip(kinds, found, strict=True) if not _is_scalar(kind)]
        if inside:
            return inside[0]
    return _wrong(value, " or ".join(map(_name, kinds)), where)


def _is_scalar(kind: Any) -> bool:
    return kind in (NoneType, int, float, str, bool) or get_origin(kind) is Literal


def _of_fields(value: object, kind: Any, where: str) -> str:
    if not isinstance(value, Mapping):
        return _wrong(value, "an object", where)
    required, hints = _fields(kind)
    for name in required:
        if name not in value:
            return f"{_inside(where, name)} is missing"
    for name, inner in value.items():
        if name in hints and (words := _problem_inside(inner, hints[name], where, name)):
            return words
    return ""


@lru_cache
def _fields(kind: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the names that have to be there, and the types of all."""
    hints = get_type_hints(kind)
    if is_typeddict(kind):
        return tuple(sorted(kind.__required_keys__)), hints
    needed: list[Field[Any]] = [
        field for field in fields(kind) if field.default is field.default_factory is MISSING
    ]
    return tuple(field.name for field in needed), hints


def _of_mapping(value: object, inner: Any, where: str) -> str:
    if not isinstance(value, Mapping):
        return _wrong(value, "an object", where)
    found = (_problem_inside(each, inner, where, name) for name, each in value.items())
    return next(filter(None, found), "")


def _problem_inside(value: object, kind: Any, where: str, name: object) -> str:
    """Return `problem` of what is inside another; the place is put in words where it is needed."""
    return problem(value, kind) and problem(value, kind, _inside(where, str(name)))


def _of_sequence(value: object, inner: Any, where: str) -> str:
    if not isinstance(value, list | tuple):
        return _wrong(value, "a list", where)
    kinds = _scalars(inner)
    if all(_fits(each, kinds) for each in value):  # long lists are of numbers
        return ""
    found = (problem(each, inner, f"{where}[{place}]") for place, each in enumerate(value))
    return next(filter(None, found), "")


def _of_scalar(value: object, kind: Any, where: str) -> str:
    if kind in (None, NoneType):
        return "" if value is None else _wrong(value, "null", where)
    if kind is float and type(value) is int:
        kind = int
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not right:
        return _wrong(value, _name(kind), where)
    if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
        return _wrong(value, f"a finite number, up to {LARGEST_FLOAT:g}", where)
    if isinstance(value, int) and abs(value) > _LARGEST:
        return f"{where} is a number beyond 2^64"
    return ""


def _plain(value: object, where: str, levels: int) -> str:
    """Return what is wrong with a value that may be anything that JSON can hold."""
    if value is None or isinstance(value, str | bool):
        return ""
    if isinstance(value, int | float):
        return _of_scalar(value, float, where)
    if not levels:
        return f"{where} is nested too deeply"
    if isinstance(value, Mapping):
        found = (
            _plain(each, "", levels - 1) and _plain(each, _inside(where, str(name)), levels - 1)
            for name, each in value.items()
        )
        return next(filter(None, found), "")
    if isinstance(value, list | tuple):
        found = (_plain(each, where, levels - 1) for each in value)
        return next(filter(None, found), "")
    return _wrong(value, "what JSON can hold", where)


def _inside(where: str, name: str) -> str:
    return printable(f"{where}.{name}" if where else name)


def _name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    if kind in (None, NoneType):
        return "null"
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    return names.get(kind, "a list" if get_origin(kind) in (Sequence, list, tuple) else "an object")


def _wrong(value: object, allowed: str, where: str) -> str:
    shown = printable(repr(value)[: _SHOWN + 1])
    shown = shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."
    return f"{where or 'it'} is {shown}; allowed: {allowed}"
