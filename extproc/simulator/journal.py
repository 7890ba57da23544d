"""Records requests and their outcomes, so that tests can read them from the worker."""

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

__all__ = ["Entry", "Journal", "Outcome"]

Outcome = Literal["completed", "aborted", "failed"]

_KEPT_REQUESTS = 100


class Entry(msgspec.Struct, kw_only=True):
    """One inference request as the worker saw it; `outcome` is None while it runs.

    `role` is the worker's role at arrival. `members` are the names in the body, repeated ones
    included, where the worker logs requests. Fields of disaggregation are unchecked; None stands
    for a field that was not sent.
    """

    path: str
    headers: dict[str, str]
    request_id: str | None = None
    rid: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    body_bytes: int = 0
    members: list[str] = []
    rank: int | None = None
    role: str = "null"
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    disagg_prefill_dp_rank: Any = None
    kv_transfer_params: Any = None
    outcome: Outcome | None = None


class Journal:
    """Counters over all inference requests and the last hundred of them."""

    def __init__(self) -> None:
        self.received = 0
        self.completed = 0
        self.aborted = 0
        self.failed = 0
        self.recent: deque[Entry] = deque(maxlen=_KEPT_REQUESTS)

    def open(self, path: str, headers: Mapping[str, str]) -> Entry:
        """Record a request's arrival; repeated headers are joined by commas."""
        self.received += 1
        entry = Entry(path=path, headers=_joined(headers), request_id=headers.get("x-request-id"))
        self.recent.append(entry)
        return entry

    def close(self, entry: Entry, outcome: Outcome) -> None:
        """Record its outcome; only the first call counts."""
        if entry.outcome is not None:
            return
        entry.outcome = outcome
        setattr(self, outcome, getattr(self, outcome) + 1)


def _joined(headers: Mapping[str, str]) -> dict[str, str]:
    joined: dict[str, str] = {}
    for name, value in headers.items():
        key = name.lower()
        joined[key] = f"{joined[key]}, {value}" if key in joined else value
    return joined
