"""Members added to a JSON object without touching the rest of its bytes."""

__all__ = ["with_members"]


def with_members(body: bytes | bytearray, members: bytes) -> bytes:
    """A JSON object with members added behind its own; all other bytes stay as they are.

    At the end, since of a name given twice every parser in use takes the last: what a client
    has put there under the same name does not count. `body` must be known to be an object.
    """
    end = body.rindex(b"}")
    head = bytes(body[:end]).rstrip(b" \t\r\n")
    comma = b"" if head.endswith(b"{") else b","
    return b"".join((head, comma, members, body[end:]))
