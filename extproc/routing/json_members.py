"""Adds members to a JSON object, and removes those by which a client steers an engine.

Separate because the session, the prefill pass and the reader of requests all change bodies. The
rest of a body stays as it is, byte by byte.
"""

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
from msgspec import Raw

from extproc.errors import bad_request
from extproc.steering import MEMBER_MAPS, SteeringMembers, present_members

__all__ = ["with_members", "without_steering"]

# Each pass over a body removes one member of each name, so only repeated names need many. The
# bytes that all passes read bound the time on the event loop.
_PASSES_MIN: Final = 3
_PASSES_MAX: Final = 32
_READ_MAX_BYTES: Final = 8 * 1024 * 1024

_BLANKS: Final = b" \t\r\n"
_decoder: Final = msgspec.json.Decoder(SteeringMembers)


def with_members(body: bytes | bytearray, members: bytes) -> bytes:
    """The JSON object in `body` with `members` added at its end.

    Engines' parsers take the last of two members with the same name. `body` must be a JSON object.
    """
    end = body.rindex(b"}")
    head = bytes(body[:end]).rstrip(_BLANKS)
    comma = b"" if head.endswith(b"{") else b","
    return b"".join((head, comma, members, body[end:]))


def without_steering(body: bytes | bytearray) -> bytes | bytearray:
    """The JSON object in `body` without the members by which an engine is steered.

    It is `body` itself if it has no such member. Parsers differ in which of two members with the
    same name they take, so a member that is repeated, or spelled with escapes, is removed each
    time. Raises RouterError 400 where it is repeated too often to be removed in good time.
    """
    rest, removed, maps = _without(body)
    clean = {name: _without_inside(value) for name, value in maps.items()}
    if removed == len(maps) and clean == maps:
        return body
    if not clean:
        return rest
    return with_members(
        rest, b",".join(b'"%b":%b' % (name.encode(), clean[name]) for name in clean)
    )


def _without_inside(value: bytes) -> bytes:
    """The value of one of MEMBER_MAPS without the members by which an engine is steered."""
    if not value.startswith(b"{"):
        return value  # not an object, so the engine refuses it
    rest, removed, _ = _without(value)
    return bytes(rest) if removed else value


def _without(body: bytes | bytearray) -> tuple[bytes | bytearray, int, dict[str, bytes]]:
    """Return the object without all members of the table, and how many were removed.

    The third part are the removed MEMBER_MAPS by name; of repeated ones the last.
    """
    rest, removed = body, 0
    maps: dict[str, bytes] = {}
    passes = max(_PASSES_MIN, min(_PASSES_MAX, _READ_MAX_BYTES // len(body)))
    for _ in range(passes):
        found = present_members(_decoder.decode(rest))
        if not found:
            return rest, removed, maps
        for name in MEMBER_MAPS:
            if name in found:
                maps.setdefault(name, bytes(found[name]))
        removed += len(found)
        rest = _cut(rest, list(found.values()))
    raise bad_request("the body repeats a member that is not for clients")


def _cut(body: bytes | bytearray, values: Sequence[Raw]) -> bytes:
    """The object without the members that have these values, which are views of `body`."""
    view = memoryview(body)
    kept, position = [], 0
    for start, end in _runs(body, values):
        after = _skip(body, end, 1)
        if body[after] == ord(","):
            end = after + 1
        else:
            before = _skip(body, start - 1, -1)
            if body[before] == ord(","):
                start = before
        kept.append(view[position:start])
        position = end
    kept.append(view[position:])
    return b"".join(kept)


def _runs(body: bytes | bytearray, values: Sequence[Raw]) -> list[tuple[int, int]]:
    """Where the members are, neighbours in one; from the quote of the name to the value's end."""
    base = _address(body)
    runs: list[tuple[int, int]] = []
    for value_start, value in sorted((_address(value) - base, value) for value in values):
        end = value_start + len(memoryview(value))
        quote = _skip(body, _skip(body, value_start - 1, -1) - 1, -1)
        # The names have no quotes in them, in any spelling.
        start = body.rindex(b'"', 0, quote)
        if runs:
            comma = _skip(body, runs[-1][1], 1)
            if _skip(body, comma + 1, 1) == start:
                start = runs.pop()[0]
        runs.append((start, end))
    return runs


def _skip(body: bytes | bytearray, position: int, step: int) -> int:
    """The next position from this one on, in this direction, that has no blank."""
    while body[position] in _BLANKS:
        position += step
    return position


def _address(data: bytes | bytearray | Raw) -> int:
    return int(np.frombuffer(data, np.uint8).__array_interface__["data"][0])
