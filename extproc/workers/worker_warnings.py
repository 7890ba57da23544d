"""What the operator should look at, once for each new reason.

Workers are asked again and again; one that stays dead must not fill the log.
"""

from collections.abc import Collection, Sequence

import structlog

from extproc.workers.introspection import Introspection
from extproc.workers.worker import WorkerSpec

__all__ = ["WorkerWarnings", "shown_models"]

_log = structlog.get_logger()

_SHOWN_CHARS = 200


class WorkerWarnings:
    """The warnings about workers; `models` are the configured ones."""

    def __init__(self, models: Collection[str]) -> None:
        self._models = models
        # What was last warned about, by worker and subject.
        self._warned: dict[tuple[str, str], str] = {}

    def answer(self, spec: WorkerSpec, told: Introspection) -> None:
        """A worker that is about to join, or could not so far, has answered or failed to."""
        if reason := self._unusable(spec, told):
            self._warn(spec, "answer", reason)
        else:
            self._warned.pop((spec.id, "answer"), None)
        self._kv_answer(spec, told)

    def later_answer(self, spec: WorkerSpec, told: Introspection) -> None:
        """The same for a worker that has a model: it serves on when it does not answer.

        That is told once until it answers again, whatever it fails with in the meantime.
        """
        if not told.problem:
            self.answer(spec, told)
        elif (spec.id, "answer") not in self._warned:
            self._warned[spec.id, "answer"] = told.problem
            _log.warning("worker_not_answering", worker=str(spec.url), reason=told.problem)

    def addresses(self, spec: WorkerSpec, addresses: Sequence[str]) -> None:
        """The worker's host name was resolved."""
        if not addresses:
            self._warn(spec, "address", "the host name has no address")
        elif len(addresses) > 1:
            self._warn(
                spec, "address", "the host name has several addresses, the first one is used"
            )
        else:
            self._warned.pop((spec.id, "address"), None)

    def no_kv_events(self, spec: WorkerSpec, model: str) -> None:
        """Nobody says where the worker publishes, though the model's policy wants to know."""
        if self._is_news(spec.id, "kv_events", model):
            _log.warning("kv_events_missing", worker=str(spec.url), model=model)

    def refused(self, spec: WorkerSpec, reason: str) -> bool:
        """The worker can not join; True when that is news."""
        if not self._is_news(spec.id, "role", reason):
            return False
        _log.error("worker_refused", worker=str(spec.url), role=spec.role, reason=reason)
        return True

    def joined(self, worker_id: str) -> None:
        """Another refusal would be news."""
        self._warned.pop((worker_id, "role"), None)

    def forget(self, worker_id: str) -> None:
        """The worker has left."""
        for key in [key for key in self._warned if key[0] == worker_id]:
            del self._warned[key]

    def _unusable(self, spec: WorkerSpec, told: Introspection) -> str:
        """Why the worker can not be used as it answered; empty when it can."""
        models = told.model_ids or spec.model_ids
        if told.problem:
            return told.problem
        if not models:
            return "the worker told no served_model_name"
        if not any(model in self._models for model in models):
            return f"none of its models is configured: {shown_models(models)}"
        return told.warning

    def _kv_answer(self, spec: WorkerSpec, told: Introspection) -> None:
        if told.kv_problem:
            if self._is_news(spec.id, "kv_answer", told.kv_problem):
                _log.warning("kv_events_not_usable", worker=str(spec.url), reason=told.kv_problem)
        elif not told.problem:
            self._warned.pop((spec.id, "kv_answer"), None)

    def _warn(self, spec: WorkerSpec, subject: str, reason: str) -> None:
        if self._is_news(spec.id, subject, reason):
            _log.warning("worker_not_usable", worker=str(spec.url), reason=reason)

    def _is_news(self, worker_id: str, subject: str, reason: str) -> bool:
        if self._warned.get((worker_id, subject)) == reason:
            return False
        self._warned[worker_id, subject] = reason
        return True


def shown_models(models: Sequence[str]) -> str:
    """Names for the log, not longer than an operator reads."""
    text = ",".join(models)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
