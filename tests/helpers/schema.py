"""JSON Schemas of types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

_SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema of a type, as `fl_app.util.schema.problem` takes types."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, UnionType):
        if all(each in _SCALARS for each in arguments):
            return {"type": [_SCALARS[each] for each in arguments]}
        return {"anyOf": [schema_of(each) for each in arguments]}
    if is_dataclass(kind) or is_typeddict(kind):
        return _of_fields(kind)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": schema_of(arguments[1])}
    assert isinstance(origin, type) and issubclass(origin, Sequence), kind
    return {"type": "array", "items": schema_of(arguments[0])}


def _of_fields(kind: Any) -> dict[str, Any]:
    if is_dataclass(kind):
        needed = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    else:
        needed = sorted(kind.__required_keys__)
    properties = {name: schema_of(each) for name, each in get_type_hints(kind).items()}
    return {"type": "object", "required": needed, "properties": properties}
