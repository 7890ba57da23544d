"""The seam to discovery: a stream of what joined and what left."""

from collections.abc import AsyncIterator
from typing import Protocol

from msgspec import Struct

from extproc.workers.worker import Role, WorkerSpec

__all__ = ["Added", "Listed", "Removed", "RoleChanged", "WorkerEvent", "WorkerSource"]


class Added(Struct, frozen=True):
    """A worker is there, for the first time or again; the same id replaces the old one."""

    spec: WorkerSpec


class Removed(Struct, frozen=True):
    """A worker is gone."""

    id: str


class RoleChanged(Struct, frozen=True):
    """A worker plays another role from now on; its load and breaker stay."""

    id: str
    role: Role


class Listed(Struct, frozen=True):
    """Everything that was there at the start has been named: readiness can be judged."""


WorkerEvent = Added | Removed | RoleChanged | Listed


class WorkerSource(Protocol):
    """Discovery as the manager sees it."""

    def events(self) -> AsyncIterator[WorkerEvent]:
        """Endless; ends only by cancellation."""
        ...
