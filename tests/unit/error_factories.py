"""Calls every function of `extproc.errors` that makes a reply to a client."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Final, get_type_hints

from extproc import errors
from extproc.errors import RouterError

__all__ = ["error_factories"]

_ARGUMENTS: Final[dict[Any, object]] = {str: "x", int: 400, bytes: b"x"}


def error_factories() -> list[Callable[[], RouterError]]:
    """Each function with an argument for each parameter that has no default."""
    found: list[Callable[[], RouterError]] = []
    for _, function in inspect.getmembers(errors, inspect.isfunction):
        hints = get_type_hints(function)
        if hints.get("return") is not RouterError:
            continue
        arguments = {
            name: _ARGUMENTS[hints[name]]
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.default is parameter.empty
        }
        found.append(partial(function, **arguments))
    return found
