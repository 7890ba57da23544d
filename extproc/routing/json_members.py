"""Adds members to a JSON object without changing the rest of its bytes.

Separate because both the session and the prefill pass extend bodies.
"""

__all__ = ["with_members"]


def with_members(body: bytes | bytearray, members: bytes) -> bytes:
    """The JSON object in `body` with `members` added at its end.

    Engines' parsers take the last of two members with the same name, so a client's own member of
    that name has no effect. `body` must be a JSON object.
    """
    end = body.rindex(b"}")
    head = bytes(body[:end]).rstrip(b" \t\r\n")
    comma = b"" if head.endswith(b"{") else b","
    return b"".join((head, comma, members, body[end:]))
