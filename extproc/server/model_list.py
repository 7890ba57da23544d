"""Answers `/v1/models`: the configured models, and the adapters that their workers list.

Separate from the sessions, which all send the same answer: it is made again only when a name has
come or gone.
"""

from collections.abc import Sequence
from heapq import nsmallest
from typing import Any, Final

import msgspec

from extproc.workers.model_names import ModelNames

__all__ = ["ModelList"]

# Adapters that are shown; all others can be used, too.
_ADAPTERS_SHOWN: Final = 1000
# Of configured models; clients of SGLang expect it.
_OWNER: Final = "sglang"


class ModelList:
    """The answer for these configured models."""

    def __init__(self, models: Sequence[str], names: ModelNames) -> None:
        self._models = models
        self._names = names
        self._version = -1
        self._body = b""

    def __call__(self) -> bytes:
        """The body of the answer now."""
        if self._version != self._names.version:
            self._version = self._names.version
            adapters = nsmallest(
                _ADAPTERS_SHOWN,
                [(one.adapter or "", one.model) for one in self._names.adapters()],
            )
            cards = [_card(model) for model in self._models]
            cards += [_card(adapter, parent=model) for adapter, model in adapters]
            self._body = msgspec.json.encode({"object": "list", "data": cards})
        return self._body


def _card(name: str, **more: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": _OWNER, **more}
