"""Custom tools of /v1/responses: both engines show them to the model as a function of one text."""

from typing import Any, Final

__all__ = ["CUSTOM_PARAMETERS", "custom_arguments"]

_INPUT: Final = "input"
CUSTOM_PARAMETERS: Final = {
    "type": "object",
    "properties": {
        _INPUT: {"type": "string", "description": "The freeform text payload for this tool."}
    },
    "required": [_INPUT],
    "additionalProperties": False,
}


def custom_arguments(payload: Any) -> dict[str, Any]:
    """The arguments of a call of such a tool, as they are shown in a later prompt."""
    return {_INPUT: payload or ""}
