"""The JSON Schema of the configuration: editors complete and check a file with it.

Separate from loading because it says less: what spans several sections, such as equal ports, is
checked by `config.rules` alone. The schema never refuses what the loader accepts.
"""

from typing import Any, Final

import msgspec

from extproc.config.schema import Config

__all__ = ["json_schema", "json_schema_text"]

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Every key with its type, bounds, default and description; unknown keys are refused."""
    return {
        "$schema": _DIALECT,
        "title": "extproc configuration",
        "description": "Configuration of the LLM request router behind Envoy.",
        **msgspec.json.schema(Config),
    }


def json_schema_text() -> str:
    """The schema as a file, with the keys of each section in the order of the documentation."""
    return msgspec.json.format(msgspec.json.encode(json_schema()), indent=2).decode() + "\n"
