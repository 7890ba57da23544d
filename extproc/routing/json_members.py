"""Adds members to a JSON object, and removes those by which a client steers an engine.

Separate because the session, the prefill pass and the reader of requests all change bodies.
"""

from typing import Final

import msgspec
from msgspec import Raw

from extproc.steering import MEMBER_MAPS, STEERING_MEMBERS

__all__ = ["with_members", "without_steering"]

_decoder: Final = msgspec.json.Decoder(dict[str, Raw])
_encode: Final = msgspec.json.Encoder().encode


def with_members(body: bytes | bytearray, members: bytes) -> bytes:
    """The JSON object in `body` with `members` added at its end.

    Engines' parsers take the last of two members with the same name. `body` must be a JSON object.
    """
    end = body.rindex(b"}")
    head = bytes(body[:end]).rstrip(b" \t\r\n")
    comma = b"" if head.endswith(b"{") else b","
    return b"".join((head, comma, members, body[end:]))


def without_steering(body: bytes | bytearray) -> bytes | bytearray:
    """The JSON object in `body` without the members by which an engine is steered.

    It is `body` itself if it has no such member. Otherwise all other values stay as they are,
    byte by byte, and of members with one name the last one stays. Parsers differ in which of them
    they take, so a member that is repeated, or spelled with escapes, is removed each time.
    """
    members = _decoder.decode(body)
    kept = {name: value for name, value in members.items() if name not in STEERING_MEMBERS}
    changed = len(kept) < len(members)
    for name in MEMBER_MAPS:
        if name in kept:
            old = kept[name]
            kept[name] = _without_steering_inside(old)
            changed = changed or kept[name] is not old
    return _encode(kept) if changed else body


def _without_steering_inside(value: Raw) -> Raw:
    try:
        members = _decoder.decode(value)
    except msgspec.ValidationError:
        return value  # not an object, so the engine refuses it
    kept = {name: inner for name, inner in members.items() if name not in STEERING_MEMBERS}
    return Raw(_encode(kept)) if len(kept) < len(members) else value
