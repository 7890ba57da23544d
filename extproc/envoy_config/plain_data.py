"""Reads and extends plain data of YAML that may have any form, and names what has a wrong one."""

import json
from typing import Any

from extproc.errors import ConfigError

__all__ = ["dicts_in", "list_in", "mapping_in", "own_copy"]


def own_copy(data: object) -> Any:
    """A copy in which no part is at two places, as the aliases of YAML make them.

    Raises ConfigError for what is not plain data.
    """
    try:
        return json.loads(json.dumps(data))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError([f"--merge-into: not plain data: {error}"]) from None


def dicts_in(parent: object, key: str) -> list[dict[str, Any]]:
    """The mappings in a list of `parent`; empty where there is no such list."""
    found = parent.get(key) if isinstance(parent, dict) else None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def mapping_in(parent: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping at `key`, which is made if it is missing; raises ConfigError for another form."""
    if parent.get(key) is None:
        parent[key] = {}
    found = parent[key]
    if not isinstance(found, dict):
        raise ConfigError([f"--merge-into: `{key}`: expected a mapping of keys"])
    return found


def list_in(parent: dict[str, Any], key: str) -> list[Any]:
    """The list at `key`, as `mapping_in`."""
    if parent.get(key) is None:
        parent[key] = []
    found = parent[key]
    if not isinstance(found, list):
        raise ConfigError([f"--merge-into: `{key}`: expected a list"])
    return found
