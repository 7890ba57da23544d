"""Normalises tool lists to what the engine gives a chat template.

SGLang (0.5.23) reads tools into typed models. Unknown fields are dropped. The known fields of a
function stay in the client's order, and missing fields follow as null, except `strict` and
`defer_loading`. The tool around a function has exactly type, function and defer_loading. The
engine rewrites types in schemas that databases use ("varchar") to those of JSON Schema.
"""

import re
from typing import Any, Final

from extproc.engines.tool_lists import kept_by_bytes
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.prompts import Tool
from extproc.tokenization.reasons import MALFORMED, UNSUPPORTED

__all__ = ["chosen_tools", "finished_tool", "function_tools", "plain_values"]

_SCHEMA_MAX_DEPTH: Final = 100

_FUNCTION_FIELDS: Final = ("description", "name", "parameters", "strict", "defer_loading")
_FIELDS_WITHOUT_NULL: Final = frozenset({"strict", "defer_loading"})
_SCHEMA_TYPES: Final = frozenset(
    {"string", "number", "integer", "boolean", "array", "object", "null"}
)
# From its function_call/utils.py.
_TYPE_ALIASES: Final = {
    **dict.fromkeys(("str", "text", "varchar", "char", "enum", "uuid", "date"), "string"),
    **dict.fromkeys(("datetime", "time", "timestamp", "binary", "blob"), "string"),
    **dict.fromkeys(("bytea", "bytes", "varbinary"), "string"),
    "bool": "boolean",
    **dict.fromkeys(("bigint", "smallint", "tinyint"), "integer"),
    **dict.fromkeys(("double", "decimal", "real", "numeric"), "number"),
    **dict.fromkeys(("arr", "tuple", "set"), "array"),
    "map": "object",
}
_TYPE_FAMILIES: Final = {
    **dict.fromkeys(("int", "uint", "long", "short", "unsigned"), "integer"),
    **dict.fromkeys(("num", "float"), "number"),
    "list": "array",
    "dict": "object",
}
_TYPE_FAMILY: Final = re.compile(rf"({'|'.join(_TYPE_FAMILIES)})(?![^0-9\[<( \t])")
_SCHEMAS_BY_NAME: Final = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)
_SCHEMA_LISTS: Final = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_SCHEMAS: Final = frozenset(
    {"items", "additionalProperties", "not", "if", "then", "else", "contains"}
    | {"propertyNames", "unevaluatedItems", "unevaluatedProperties"}
)
_INTEGER_MIN: Final = -(1 << 63)
_INTEGER_MAX: Final = (1 << 64) - 1
_CHOICES: Final = frozenset({"auto", "required", "none"})


def chosen_tools(tools: list[Tool], choice: Any) -> list[Tool] | None:
    """The tools that a template gets under a body's `tool_choice`; None if it gets no tools.

    Raises UnmappableError for a choice that the engine refuses.
    """
    if type(choice) is dict:
        function = choice.get("function")
        name = function.get("name") if type(function) is dict else None
        chosen = [tool for tool in tools if tool["function"]["name"] == name]
        if not chosen:
            raise UnmappableError(MALFORMED)
        return chosen
    if choice is not None and (type(choice) is not str or choice not in _CHOICES):
        raise UnmappableError(MALFORMED)
    if choice == "none" or not tools:
        return None
    return tools


def finished_tool(
    function: dict[str, Any],
    kind: str = "function",
    defer: Any = None,
    *,
    renames_types: bool = True,
) -> Tool:
    """The tool for a function; of the function, only the type of its name was checked before.

    The engine does not rewrite types in /v1/responses: `renames_types` is false there.
    """
    inherited = {"defer_loading": defer} if defer is not None else {}
    normal = {field: function[field] for field in function if field in _FUNCTION_FIELDS}
    for field in _FUNCTION_FIELDS:
        value = normal.setdefault(field, inherited.get(field))
        if value is None and field in inherited:
            value = normal[field] = inherited[field]
        if value is None and field in _FIELDS_WITHOUT_NULL:
            del normal[field]
        elif value is not None and field != "parameters":
            expected = bool if field in _FIELDS_WITHOUT_NULL else str
            if type(value) is not expected:
                raise UnmappableError(MALFORMED)
    read = _plain_schema if renames_types else plain_values
    normal["parameters"] = read(normal["parameters"], 0)
    return {"type": kind, "function": normal, "defer_loading": defer}


@kept_by_bytes
def function_tools(given: Any) -> list[Tool]:
    """The normalised list for a chat body's `tools`; empty for null.

    Raises UnmappableError for what the engine refuses or rewrites.
    """
    if given is None:
        return []
    if type(given) is not list:
        raise UnmappableError(MALFORMED)
    tools = []
    for tool in given:
        function = tool.get("function") if type(tool) is dict else None
        if type(function) is not dict or type(function.get("name")) is not str:
            raise UnmappableError(MALFORMED)
        kind, defer = tool.get("type", "function"), tool.get("defer_loading")
        if type(kind) is not str or (defer is not None and type(defer) is not bool):
            raise UnmappableError(MALFORMED)
        tools.append(finished_tool(function, kind, defer))
    return tools


def _plain_schema(schema: Any, depth: int) -> Any:
    """A schema as the engine rewrites it: types by their aliases, huge integers as floats.

    Only where JSON Schema has schemas are types rewritten, not in the names of properties.
    """
    if depth > _SCHEMA_MAX_DEPTH:
        raise UnmappableError(UNSUPPORTED)
    if type(schema) is list:
        return [_plain_schema(item, depth + 1) for item in schema]
    if type(schema) is not dict:
        return plain_values(schema, depth)
    plain: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "type":
            plain[key] = _plain_types(value)
        elif key in _SCHEMAS_BY_NAME and type(value) is dict:
            plain[key] = {name: _plain_schema(one, depth + 1) for name, one in value.items()}
        elif key in _SCHEMAS or (key in _SCHEMA_LISTS and type(value) is list):
            plain[key] = _plain_schema(value, depth + 1)
        else:
            plain[key] = plain_values(value, depth + 1)
    return plain


def plain_values(value: Any, depth: int = 0) -> Any:
    """A value as the engine's parser of JSON reads it: integers over 64 bits become floats."""
    if depth > _SCHEMA_MAX_DEPTH:
        raise UnmappableError(UNSUPPORTED)
    if type(value) is int and not _INTEGER_MIN <= value <= _INTEGER_MAX:
        return float(value)
    if type(value) is list:
        return [plain_values(item, depth + 1) for item in value]
    if type(value) is dict:
        return {key: plain_values(item, depth + 1) for key, item in value.items()}
    return value


def _plain_types(given: Any) -> Any:
    if type(given) is not list:
        return _plain_type(given)
    plain: list[Any] = []
    for one in map(_plain_type, given):
        if one not in plain:
            plain.append(one)
    return plain


def _plain_type(given: Any) -> Any:
    if type(given) is not str or given in _SCHEMA_TYPES:
        return given
    base = given.split("(", 1)[0].strip().lower()
    if base in _SCHEMA_TYPES:
        return base
    if base in _TYPE_ALIASES:
        return _TYPE_ALIASES[base]
    family = _TYPE_FAMILY.match(base)
    # The engine refuses what is no type after this.
    return given if family is None else _TYPE_FAMILIES[family[1]]
