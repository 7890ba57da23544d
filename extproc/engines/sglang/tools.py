"""Normalises tool lists to what the engine gives a chat template.

SGLang (0.5.23) reads tools into typed models. Unknown fields are dropped. The known fields of a
function stay in the client's order, and missing fields follow as null, except `strict` and
`defer_loading`. The tool around a function has exactly type, function and defer_loading. The
types of schemas are rewritten, see `schema_types`.
"""

from typing import Any, Final

from extproc.engines.sglang.schema_types import rewritten_schema
from extproc.engines.tool_lists import kept_by_bytes
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.prompts import Tool
from extproc.tokenization.reasons import MALFORMED

__all__ = ["chosen_tools", "finished_tool", "function_tools"]


_FUNCTION_FIELDS: Final = ("description", "name", "parameters", "strict", "defer_loading")
_FIELDS_WITHOUT_NULL: Final = frozenset({"strict", "defer_loading"})
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
    function: dict[str, Any], kind: str = "function", defer: Any = None, *, rewrites: bool = True
) -> Tool:
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
    if rewrites:
        normal["parameters"] = rewritten_schema(normal["parameters"])
    return {"type": kind, "function": normal, "defer_loading": defer}


@kept_by_bytes
def function_tools(given: Any) -> list[Tool]:
    """The normalised list for a chat body's `tools`; empty for null.

    Raises UnmappableError for what the engine refuses.
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
