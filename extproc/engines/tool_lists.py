"""Keeps the finished tool lists of chats.

Agents send the same list of tens of kilobytes with each request, so finished lists are cached by
their bytes. The sandbox of templates cannot change them. The same list gives the same objects, so
`chat_template` can cache the JSON text of a tool by its identity.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, Final, TypeAlias

import msgspec

from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.prompts import Tool
from extproc.tokenization.reasons import MALFORMED

__all__ = ["kept_by_bytes"]

_ListReader: TypeAlias = Callable[[Any], list[Tool]]

_LISTS_KEPT: Final = 32
_LIST_KEPT_MAX_BYTES: Final = 1 << 17

_decoder: Final = msgspec.json.Decoder()


def kept_by_bytes(read: _ListReader) -> Callable[[bytes], list[Tool]]:
    """Wrap a reader of decoded `tools` to take their JSON and to cache the results.

    The result raises UnmappableError as `read` does, and for text that is not JSON.
    """

    def from_json(raw: bytes) -> list[Tool]:
        try:
            given = _decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            raise UnmappableError(MALFORMED) from None
        return read(given)

    kept = lru_cache(maxsize=_LISTS_KEPT)(from_json)

    @wraps(read)
    def read_or_kept(raw: bytes) -> list[Tool]:
        return from_json(raw) if len(raw) > _LIST_KEPT_MAX_BYTES else kept(raw)

    return read_or_kept
