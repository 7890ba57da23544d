"""Normalises tool lists to what the engine gives a chat template.

SGLang (0.5.23) reads tools into typed models. Unknown fields are dropped. The known fields of a
function stay in the client's order, and missing fields follow as null, except `strict` and
`defer_loading`. The tool around a function has exactly type, function and defer_loading. The
engine rewrites JSON schema types that databases use ("varchar"); such tools are not supported.
"""

from typing import Any, Final

from extproc.engines.tool_lists import kept_by_bytes
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.prompts import Tool
from extproc.tokenization.reasons import MALFORMED, UNSUPPORTED

__all__ = ["chosen_tools", "finished_tool", "function_tools"]

_SCHEMA_MAX_DEPTH: Final = 100

_FUNCTION_FIELDS: Final = ("description", "name", "parameters", "strict", "defer_loading")
_FIELDS_WITHOUT_NULL: Final = frozenset({"strict", "defer_loading"})
_SCHEMA_TYPES: Final = frozenset(
    {"string", "number", "integer", "boolean", "array", "object", "null"}
)
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


def finished_tool(function: dict[str, Any], kind: str = "function", defer: Any = None) -> Tool:
    """The tool for a function; of the function, only the type of its name was checked before."""
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
    _check_schema(normal["parameters"], 0)
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


def _check_schema(schema: Any, depth: int) -> None:
    """Raise UnmappableError if the engine rewrites the types of a schema.

    Every `type` that is a string or a list is checked. It may be the name of a property instead;
    then the only loss is the tokens of a rare request.
    """
    if depth > _SCHEMA_MAX_DEPTH:
        raise UnmappableError(UNSUPPORTED)
    if type(schema) is list:
        for item in schema:
            _check_schema(item, depth + 1)
    elif type(schema) is dict:
        kind = schema.get("type")
        if type(kind) is str:
            if kind not in _SCHEMA_TYPES:
                raise UnmappableError(UNSUPPORTED)
        elif type(kind) is list and not all(
            type(one) is str and one in _SCHEMA_TYPES for one in kind
        ):
            raise UnmappableError(UNSUPPORTED)
        for value in schema.values():
            if type(value) is dict or type(value) is list:
                _check_schema(value, depth + 1)
