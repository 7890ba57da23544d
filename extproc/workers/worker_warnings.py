"""Warns of problems with workers, once for each new reason.

Workers are asked again and again. A worker that stays dead must not fill the log.
"""

from collections.abc import Collection, Sequence
from typing import Final, Literal

import structlog

from extproc.engines.engine import EngineName, engine_named
from extproc.workers.adapters import ADAPTERS_MAX, NAME_MAX_CHARS
from extproc.workers.introspection import Introspection
from extproc.workers.registry import MixedRolesError
from extproc.workers.worker import WorkerSpec

__all__ = ["SEVERAL_ADDRESSES_FIX", "WorkerWarnings", "shown_models"]

_log = structlog.get_logger()

_SHOWN_CHARS: Final = 200
_VERSIONS_MAX: Final = 100

SEVERAL_ADDRESSES_FIX: Final = (
    "put the name under discovery.dns and set discovery.backend: dns, so that every address is a "
    "worker; or give each engine a URL of its own; only the first address is used"
)
_Subject = Literal["answer", "address", "adapters", "kv_events", "kv_answer", "role"]
_Reason = Literal[
    "model_not_configured",
    "no_address",
    "no_bootstrap_port",
    "no_model_name",
    "several_addresses",
    "unknown_role",
]
_FIXES: Final[dict[_Reason, str]] = {
    "model_not_configured": "add a model with this id to models, or rename the served model",
    "no_address": "check the host name in the worker's URL",
    "no_bootstrap_port": "set disaggregation_bootstrap_port of the engine",
    "no_model_name": "set served_model_name of the engine",
    "several_addresses": SEVERAL_ADDRESSES_FIX,
    "unknown_role": "set disaggregation_mode of the engine to null, prefill or decode",
}


class WorkerWarnings:
    """The warnings about workers; `models` are the ids of the configured ones."""

    def __init__(self, models: Collection[str]) -> None:
        self._models = models
        # The last warning about each subject of a worker.
        self._warned: dict[tuple[str, _Subject], str] = {}
        self._versions_warned: set[tuple[EngineName | None, str]] = set()

    def answered(self, spec: WorkerSpec, answer: Introspection) -> None:
        """A worker that is about to join, or could not so far, has answered or failed to."""
        models = answer.model_ids or spec.model_ids
        if answer.problem:
            if self._is_news(spec, "answer", answer.problem):
                _log.warning("worker_not_answering", worker=str(spec.url), error=answer.problem)
        elif not models:
            self._not_usable(spec, "answer", "no_model_name")
        elif not any(model in self._models for model in models):
            self._not_usable(spec, "answer", "model_not_configured", shown_models(models))
        elif answer.warning is not None:
            self._misconfigured(spec, "answer", answer.warning)
        else:
            self._forget(spec, "answer")
        self._kv_answer(spec, answer)
        self._version(answer)
        if not answer.problem:
            self._adapters(spec, answer.adapters_left_out)

    def answered_later(self, spec: WorkerSpec, answer: Introspection) -> None:
        """The same for a worker that has a model: it continues to serve without an answer.

        One warning is logged until it answers again, even if the error changes meanwhile.
        """
        if not answer.problem:
            self.answered(spec, answer)
        elif (spec.id, "answer") not in self._warned:
            self._warned[spec.id, "answer"] = answer.problem
            _log.warning("worker_not_answering", worker=str(spec.url), error=answer.problem)

    def addresses(self, spec: WorkerSpec, addresses: Sequence[str]) -> None:
        """The worker's host name was resolved."""
        if not addresses:
            self._not_usable(spec, "address", "no_address")
        elif len(addresses) > 1:
            self._misconfigured(spec, "address", "several_addresses")
        else:
            self._forget(spec, "address")

    def no_kv_events(self, spec: WorkerSpec, model: str) -> None:
        """The model's policy needs KV events, and nothing says where the worker publishes them."""
        if self._is_news(spec, "kv_events", model):
            _log.warning(
                "kv_events_missing",
                worker=str(spec.url),
                model=model,
                fix="start the engine with --kv-events-config, or set models[].kv_events",
            )

    def refused(self, spec: WorkerSpec, error: MixedRolesError) -> bool:
        """The worker cannot join; returns True if that is news."""
        if not self._is_news(spec, "role", str(error)):
            return False
        _log.error(
            "worker_refused",
            worker=str(spec.url),
            model=error.model,
            role=spec.role,
            error=str(error),
        )
        return True

    def adapters_changed(self, before: WorkerSpec, spec: WorkerSpec) -> None:
        """The worker has loaded or unloaded adapters."""
        old, new = set(before.adapters), set(spec.adapters)
        _log.info(
            "worker_adapters_changed",
            worker=str(spec.url),
            loaded=shown_models(sorted(new - old)),
            unloaded=shown_models(sorted(old - new)),
            count=len(new),
        )

    def _version(self, answer: Introspection) -> None:
        """Once for each version, since a whole fleet has the same."""
        name, version = answer.engine, answer.engine_version
        engine = engine_named(name, version)
        if engine.was_read(version) or (name, version) in self._versions_warned:
            return
        if len(self._versions_warned) < _VERSIONS_MAX:
            self._versions_warned.add((name, version))
            _log.warning(
                "engine_version_not_read",
                engine=engine.name,
                version=version,
                read=f"{'.'.join(map(str, engine.since))} to {engine.read_until}",
                fix="look at the tokens of its workers at /workers, or use another version",
            )

    def _adapters(self, spec: WorkerSpec, left_out: int) -> None:
        if not left_out:
            self._forget(spec, "adapters")
        elif self._is_news(spec, "adapters", str(left_out)):
            _log.warning(
                "worker_adapters_left_out",
                worker=str(spec.url),
                count=left_out,
                fix=f"load at most {ADAPTERS_MAX} adapters, with names of at most "
                f"{NAME_MAX_CHARS} characters that can be printed",
            )

    def joined(self, spec: WorkerSpec) -> None:
        """The worker was registered: another refusal will be news."""
        self._forget(spec, "role")

    def left(self, worker_id: str) -> None:
        """Discovery has removed the worker: everything about it will be news."""
        for key in [key for key in self._warned if key[0] == worker_id]:
            del self._warned[key]

    def _kv_answer(self, spec: WorkerSpec, answer: Introspection) -> None:
        if answer.kv_problem:
            if self._is_news(spec, "kv_answer", answer.kv_problem):
                _log.warning("kv_events_not_usable", worker=str(spec.url), error=answer.kv_problem)
        elif not answer.problem:
            self._forget(spec, "kv_answer")

    def _not_usable(
        self, spec: WorkerSpec, subject: _Subject, reason: _Reason, models: str = ""
    ) -> None:
        if self._is_news(spec, subject, f"{reason} {models}"):
            _log.warning(
                "worker_not_usable",
                worker=str(spec.url),
                reason=reason,
                models=models or shown_models(spec.model_ids),
                fix=_FIXES[reason],
            )

    def _misconfigured(self, spec: WorkerSpec, subject: _Subject, reason: _Reason) -> None:
        if self._is_news(spec, subject, reason):
            _log.warning(
                "worker_misconfigured", worker=str(spec.url), reason=reason, fix=_FIXES[reason]
            )

    def _is_news(self, spec: WorkerSpec, subject: _Subject, text: str) -> bool:
        if self._warned.get((spec.id, subject)) == text:
            return False
        self._warned[spec.id, subject] = text
        return True

    def _forget(self, spec: WorkerSpec, subject: _Subject) -> None:
        self._warned.pop((spec.id, subject), None)


def shown_models(models: Sequence[str]) -> str:
    """Model ids for the log, cut to a length that an operator can read."""
    text = ",".join(models)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
