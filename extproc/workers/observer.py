"""What other packages learn about registered workers: they derive from WorkerObserver.

It is separate from the code that calls it, since observers stand above this package: the ranks
of KV-aware routing, the passes of disaggregated models, the readiness of the service.
"""

from extproc.workers.worker import Role, Worker

__all__ = ["WorkerObserver"]


class WorkerObserver:
    """Observes registered workers; each method does nothing unless it is overridden."""

    def joined(self, worker: Worker) -> None:
        """The worker can be routed to from now on."""

    async def left(self, worker: Worker) -> None:
        """The worker cannot be routed to any more; returns when all of its state is dropped.

        Idempotent. The worker may join again, with other models or another place of its KV
        events.
        """

    def role_changed(self, worker: Worker, old: Role, new: Role) -> None:
        """A worker that stays registered has another role."""

    def workers_changed(self) -> None:
        """Membership, models, roles or addresses changed, or all workers of the start are known."""
