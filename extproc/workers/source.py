"""The protocol of discovery: a stream of events about workers."""

from collections.abc import AsyncIterator
from typing import Protocol

from msgspec import Struct

from extproc.workers.worker import Role, WorkerSpec

__all__ = ["Added", "Listed", "Removed", "RoleChanged", "WorkerEvent", "WorkerSource"]


class Added(Struct, frozen=True):
    """A worker has appeared; it replaces a worker with the same id."""

    spec: WorkerSpec


class Removed(Struct, frozen=True):
    """A worker has disappeared."""

    id: str


class RoleChanged(Struct, frozen=True):
    """A worker has a new role; its load and its breaker stay."""

    id: str
    role: Role


class Listed(Struct, frozen=True):
    """All workers of the start have been named, so readiness can be decided."""


WorkerEvent = Added | Removed | RoleChanged | Listed


class WorkerSource(Protocol):
    """A discovery backend."""

    def events(self) -> AsyncIterator[WorkerEvent]:
        """The events, without end; the consumer cancels."""
        ...
