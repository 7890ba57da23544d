"""Rewrites types of JSON schemas as SGLang (0.5.23) does before a template sees them.

Schemas that are made from databases and programs have types such as "varchar" and "int32". The
engine replaces them by the types of JSON Schema; other words stay, and it refuses them later. Its
JSON parser takes integers over 64 bits for floats.
"""

from typing import Any, Final

from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.reasons import UNSUPPORTED

__all__ = ["plain_value", "rewritten_schema"]

_STANDARD: Final = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})
_WORDS: Final = {
    "string": (
        "str", "text", "varchar", "char", "enum", "uuid", "date", "datetime", "time", "timestamp",
        "binary", "blob", "bytea", "bytes", "varbinary",
    ),
    "boolean": ("bool",),
    "integer": ("bigint", "smallint", "tinyint"),
    "number": ("double", "decimal", "real", "numeric"),
    "array": ("arr", "tuple", "set"),
    "object": ("map",),
}  # fmt: skip
_MEANT: Final = {word: meant for meant, words in _WORDS.items() for word in words}
# These also begin longer words: int32, list[str].
_BEGINNINGS: Final = {
    **dict.fromkeys(("int", "uint", "long", "short", "unsigned"), "integer"),
    **dict.fromkeys(("num", "float"), "number"),
    "list": "array",
    "dict": "object",
}
_AFTER_BEGINNING: Final = "0123456789[<( \t"
# Members of a schema with further schemas: by name, in a list, or one or several.
_NAMED: Final = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)
_LISTED: Final = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_SCHEMAS: Final = frozenset(
    {
        "items",
        "additionalProperties",
        "not",
        "if",
        "then",
        "else",
        "contains",
        "propertyNames",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)
_DEPTH_MAX: Final = 100
_UINT64_MAX: Final = (1 << 64) - 1
_INT64_MIN: Final = -(1 << 63)


def rewritten_schema(schema: Any, depth: int = 0) -> Any:
    """The schema with other types; the same object if nothing changes.

    Raises UnmappableError for a schema that is nested too deep.
    """
    if depth > _DEPTH_MAX:
        raise UnmappableError(UNSUPPORTED, "tools")
    if type(schema) is list:
        return _kept(schema, [rewritten_schema(one, depth + 1) for one in schema])
    if type(schema) is not dict:
        return _number(schema)
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "type" and type(value) is str:
            found[name] = _type(value)
        elif name == "type" and type(value) is list:
            found[name] = _types(value)
        elif name in _NAMED and type(value) is dict:
            named = {key: rewritten_schema(one, depth + 1) for key, one in value.items()}
            found[name] = _kept(value, named)
        elif (name in _LISTED and type(value) is list) or name in _SCHEMAS:
            found[name] = rewritten_schema(value, depth + 1)
        else:
            found[name] = plain_value(value, depth + 1)
    return _kept(schema, found)


def plain_value(value: Any, depth: int = 0) -> Any:
    """A value in which only large integers change."""
    if depth > _DEPTH_MAX:
        raise UnmappableError(UNSUPPORTED, "tools")
    if type(value) is list:
        return _kept(value, [plain_value(one, depth + 1) for one in value])
    if type(value) is dict:
        return _kept(value, {name: plain_value(one, depth + 1) for name, one in value.items()})
    return _number(value)


def _number(value: Any) -> Any:
    if type(value) is int and not _INT64_MIN <= value <= _UINT64_MAX:
        return float(value)
    return value


def _kept(before: Any, after: Any) -> Any:
    """`before` where its members are the same objects, so that a list of tools stays small."""
    pairs = zip(before, after, strict=True)
    if type(before) is dict:
        pairs = zip(before.values(), after.values(), strict=True)
    return before if all(one is other for one, other in pairs) else after


def _type(given: str) -> str:
    if given in _STANDARD:
        return given
    base = given.partition("(")[0].strip().lower()
    if base in _STANDARD:
        return base
    if base in _MEANT:
        return _MEANT[base]
    for beginning, meant in _BEGINNINGS.items():
        rest = base.removeprefix(beginning)
        if rest != base and (not rest or rest[0] in _AFTER_BEGINNING):
            return meant
    return given


def _types(given: list[Any]) -> list[Any]:
    found: list[Any] = []
    for one in given:
        meant = _type(one) if type(one) is str else one
        if meant not in found:
            found.append(meant)
    return _kept(given, found) if len(found) == len(given) else found
