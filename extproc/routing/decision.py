"""A routing decision as plain data: everything the reply, the log and the debug headers say."""

from msgspec import Struct

__all__ = ["Decision"]


class Decision(Struct, frozen=True, kw_only=True):
    """Where a request goes and why.

    `destinations` are `ip:port`, the chosen worker first, then those to try when it refuses
    the connection. `timeout_ms` bounds the whole response in milliseconds, 0 = no bound
    (streams). `cached_tokens` and `total_tokens` are the confirmed overlap, where known, and
    `body_members` JSON members, `"name":value`, that the body must get for the engine.

    `decode_order` is set instead of destinations where a second pass picks the decode worker:
    what that pass has to know, as a header's value, and `attempts` how often it may be made.
    """

    model: str
    policy: str
    reason: str
    worker_url: str
    destinations: tuple[str, ...]
    timeout_ms: int
    cached_tokens: int = 0
    total_tokens: int = 0
    body_members: bytes = b""
    decode_order: str = ""
    attempts: int = 1
