"""Normalises tool lists to what vLLM (0.32) gives a chat template.

A tool has its type and its function; a function has its name, description and parameters, in this
order, and `strict` and `defer_loading` where they are set. Further fields are dropped, and schemas
are passed on as they are.
"""

from typing import Any

from extproc.engines.tool_lists import kept_by_bytes
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.prompts import Tool
from extproc.tokenization.reasons import MALFORMED

__all__ = ["function_tools", "tool_of"]


def tool_of(function: dict[str, Any], defer: Any = None) -> Tool:
    """The tool for a function; raises UnmappableError for one that the engine refuses."""
    name, description = function.get("name"), function.get("description")
    parameters, strict = function.get("parameters"), function.get("strict")
    deferred = function.get("defer_loading")
    if (
        type(name) is not str
        or (description is not None and type(description) is not str)
        or (parameters is not None and type(parameters) is not dict)
        or (strict is not None and type(strict) is not bool)
        or (deferred is not None and type(deferred) is not bool)
        or (defer is not None and type(defer) is not bool)
    ):
        raise UnmappableError(MALFORMED)
    normal: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    if strict is not None:
        normal["strict"] = strict
    if deferred is None:
        deferred = defer
    if deferred is not None:
        normal["defer_loading"] = deferred
    tool: Tool = {"type": "function", "function": normal}
    if defer is not None:
        tool["defer_loading"] = defer
    return tool


@kept_by_bytes
def function_tools(given: Any) -> list[Tool]:
    """The normalised list for a chat body's `tools`; raises UnmappableError."""
    if given is None:
        return []
    if type(given) is not list or not given:
        raise UnmappableError(MALFORMED)
    tools = []
    for tool in given:
        function = tool.get("function") if type(tool) is dict else None
        if type(function) is not dict or tool.get("type", "function") != "function":
            raise UnmappableError(MALFORMED)
        tools.append(tool_of(function, tool.get("defer_loading")))
    return tools
