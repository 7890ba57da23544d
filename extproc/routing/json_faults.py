"""Says what is wrong with a body that is not valid JSON, for the client's error.

A parser's own text never reaches a client, since it can quote the body. So the fault is found
from where the parser stopped. This costs the same for a body of any size.
"""

import re
from typing import Final

__all__ = ["json_fault"]

_NOT_A_NUMBER: Final = "the body is not valid JSON: it has NaN or Infinity"
_LONE_SURROGATE: Final = (
    "the body is not valid JSON: it has a lone surrogate, half of a UTF-16 pair"
)
_NOT_UTF8: Final = "the body is not valid JSON: it is not in UTF-8"
_NOT_JSON: Final = "the body is not valid JSON"
_CUT: Final = "the body is not valid JSON: it ends too early"

# The decoder's messages end with the offset at which it stopped.
_OFFSET: Final = re.compile(r"\(byte (\d+)\)$")
# How far the offset can be behind the beginning of what is at fault.
_BEHIND_BYTES: Final = 12
_CONSTANT: Final = re.compile(rb"-?(?:NaN|Infinity)")
# The first half of a pair without the second one.
_HALF_PAIR: Final = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")
# The first byte, and the least second byte, of a surrogate in UTF-8, which forbids them.
_SURROGATE_LEAD: Final = 0xED
_SURROGATE_SECOND_MIN: Final = 0xA0


def json_fault(body: bytes | bytearray, error: Exception) -> str:
    """A sentence for the client; `error` is what decoding `body` raised."""
    if isinstance(error, UnicodeDecodeError):
        found = body[error.start : error.start + 2]
        is_surrogate = (
            len(found) > 1 and found[0] == _SURROGATE_LEAD and found[1] >= _SURROGATE_SECOND_MIN
        )
        return _LONE_SURROGATE if is_surrogate else _NOT_UTF8
    text = str(error)
    offset = _OFFSET.search(text)
    # The decoder looks for the second half of a pair, even behind the end of the body.
    stopped = int(offset[1]) if offset else len(body)
    start = max(0, stopped - _BEHIND_BYTES)
    near = bytes(body[start : stopped + _BEHIND_BYTES])
    is_cut = offset is None or "hex escape" in text
    if "surrogate" in text or (is_cut and _HALF_PAIR.search(near)):
        return _LONE_SURROGATE
    if any(found.start() <= stopped - start <= found.end() for found in _CONSTANT.finditer(near)):
        return _NOT_A_NUMBER
    return _CUT if "truncated" in text else _NOT_JSON
