"""The protocol of discovery: a stream of events about workers."""

from collections.abc import AsyncIterator
from typing import Protocol

from msgspec import Struct

from extproc.workers.worker import Role, WorkerSpec

__all__ = [
    "Added",
    "DrainingChanged",
    "Listed",
    "Removed",
    "RoleChanged",
    "Vanished",
    "WorkerEvent",
    "WorkerSource",
]


class Added(Struct, frozen=True):
    """A worker has appeared; it replaces a worker with the same id."""

    spec: WorkerSpec


class Removed(Struct, frozen=True):
    """A worker has disappeared."""

    id: str


class Vanished(Struct, frozen=True):
    """A worker is named no longer, but nothing has said that it leaves; it may be a mistake.

    `spec` is what was said last. If the worker is named again it is added like a new one.
    """

    spec: WorkerSpec


class RoleChanged(Struct, frozen=True):
    """A worker has a new role; its load and its breaker stay."""

    id: str
    role: Role


class DrainingChanged(Struct, frozen=True):
    """A worker is about to disappear and gets no new requests, or it stays after all.

    Until it is removed it keeps its streams, its KV subscription and what it holds.
    """

    id: str
    draining: bool


class Listed(Struct, frozen=True):
    """All workers of the start have been named, so readiness can be decided."""


WorkerEvent = Added | Removed | Vanished | RoleChanged | DrainingChanged | Listed


class WorkerSource(Protocol):
    """A discovery backend."""

    def events(self) -> AsyncIterator[WorkerEvent]:
        """The events, without end; the consumer cancels."""
        ...
