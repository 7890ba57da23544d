"""A routing decision as plain data: all that the reply, the log and the debug headers show.

It is separate from the lease so that replies are built, and tested, without one.
"""

from msgspec import Struct

from extproc.workers.worker import Role

__all__ = ["Decision"]


class Decision(Struct, frozen=True, kw_only=True):
    """Where a request goes and why.

    `destinations` are `ip:port`, the chosen worker first, then those to try when it refuses
    the connection. `timeout_ms` bounds the whole response in milliseconds; 0 means no bound, for
    streams. `first_byte_timeout_ms` bounds the time to the response headers of each attempt; 0
    means no other bound. `cached_tokens` of `total_tokens` are confirmed to be held by the chosen
    rank; both are 0 where that is not known. `predicted_tokens` are those that it will hold once it
    has computed what it was sent before. `body_members` are JSON members, `"name":value`, that the
    engine must find in the body, and `rank_header` is the data-parallel rank for an engine that
    reads it from a header. With `retry_busy` the gateway may try the next destination
    after a 503 or 429, too.

    `decode_order` is set instead of `destinations` where a second pass picks the decode worker.
    It is the value of the header from which that pass learns what it must know. `attempts` is
    how many decode workers may be tried.

    `role` is that of all `destinations`. `adapter` is the LoRA adapter that the request
    names, where workers list it. `fallback_overlaps` are cached and total tokens of those
    destinations after the first one, as far as they are known.
    """

    model: str
    policy: str
    reason: str
    worker_url: str
    destinations: tuple[str, ...]
    timeout_ms: int
    cached_tokens: int = 0
    total_tokens: int = 0
    predicted_tokens: int = 0
    body_members: bytes = b""
    rank_header: int | None = None
    retry_busy: bool = False
    first_byte_timeout_ms: int = 0
    decode_order: str = ""
    fallback_overlaps: tuple[tuple[int, int], ...] = ()
    attempts: int = 1
    role: Role = "plain"
    adapter: str | None = None
