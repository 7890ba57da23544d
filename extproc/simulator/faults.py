"""Faults on demand: makes a worker misbehave, for one request or for many.

One request: the header `x-simulator-fault: die-after-tokens=3, reset`, comma-separated
names with JSON scalars as values, a bare name meaning true. The whole worker: a JSON object
with the same names (underscores) posted to `/simulator/faults`, which replaces whatever was
set before. A request's own header wins over the worker's faults and is not counted there.
"""

from typing import Annotated, Any

import msgspec

__all__ = ["FAULT_HEADER", "NO_FAULT", "FaultBoard", "RequestFault", "WorkerFaults", "parse_header"]

FAULT_HEADER = "x-simulator-fault"

_Status = Annotated[int, msgspec.Meta(ge=200, le=599)]
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class RequestFault(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The faults of one request, in the order in which they are applied.

    * `hang`: true never answers; a number waits that many seconds first.
    * `die_before_headers`: the TCP connection is closed without an answer.
    * `status`: this status with an error envelope; `retry_after` (seconds) adds the header
      and means 503 when it comes alone.
    * `slow_token`: seconds per token instead of the worker's pace.
    * `die_after_tokens`, `error_after_tokens`, `stall_after_tokens`: after so many tokens
      break the TCP connection, send an error event, or send nothing more. Without streaming
      the client has received nothing by then: it gets no answer, a 500, or waits for ever.
    * `response_headers`: the answer has these headers; only in a request's own header.
    * `reset`: connections die with a TCP reset, as behind a failed host, instead of a FIN.
    """

    hang: bool | _Seconds = False
    die_before_headers: bool = False
    status: _Status | None = None
    retry_after: _Seconds | None = None
    slow_token: _Seconds | None = None
    die_after_tokens: _Count | None = None
    error_after_tokens: _Count | None = None
    stall_after_tokens: _Count | None = None
    reset: bool = False
    response_headers: dict[str, str] = {}

    @property
    def answer_status(self) -> int | None:
        """The status of an immediate error answer; None without one."""
        if self.status is None and self.retry_after is not None:
            return 503
        return self.status


NO_FAULT = RequestFault()


class WorkerFaults(RequestFault, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Faults of every request or of the next `count`, and of the paths that a router probes.

    The faults of probes stay until they are cleared, whatever `count` says. Faults of KV events
    apply to every rank:

    * `kv_drop_batches`: the next batches are not sent, a gap that replay can fill.
    * `kv_wrong_token_counts`: the next stored events carry one token too few.
    * `kv_garbage_frames`: sends that many unreadable messages at once.
    * `kv_unknown_removals`: sends at once a batch that removes that many unknown hashes.
    """

    count: Annotated[int, msgspec.Meta(ge=1)] | None = None
    health_status: _Status | None = None
    health_hang: bool | _Seconds = False
    server_info_status: _Status | None = None
    server_info_hang: bool | _Seconds = False
    models_status: _Status | None = None
    models_hang: bool | _Seconds = False
    kv_drop_batches: _Count = 0
    kv_wrong_token_counts: _Count = 0
    kv_garbage_frames: _Count = 0
    kv_unknown_removals: _Count = 0

    def probe(self, name: str) -> RequestFault:
        """The fault of `health`, `server_info` or `models`."""
        return RequestFault(
            status=getattr(self, f"{name}_status"), hang=getattr(self, f"{name}_hang")
        )


def parse_header(value: str) -> RequestFault:
    """The fault that a request names; raises ValueError for unknown names and values."""
    fields: dict[str, Any] = {}
    for item in value.split(","):
        name, equals, scalar = item.strip().partition("=")
        fields[name.replace("-", "_")] = msgspec.json.decode(scalar) if equals else True
    return msgspec.convert(fields, RequestFault)


class FaultBoard:
    """The worker's present faults and the number of requests that they still affect."""

    def __init__(self) -> None:
        self._faults = WorkerFaults()
        self._left: int | None = None

    @property
    def faults(self) -> WorkerFaults:
        return self._faults

    def set(self, faults: WorkerFaults) -> None:
        self._faults = faults
        self._left = faults.count

    def clear(self) -> None:
        self.set(WorkerFaults())

    def take(self) -> RequestFault:
        """The fault of a request that has just arrived; counts the request."""
        if self._left == 0:
            return NO_FAULT
        if self._left is not None:
            self._left -= 1
        return self._faults
