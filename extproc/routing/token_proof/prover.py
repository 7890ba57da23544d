"""Asks workers for the tokens of probes, and compares them with those of this service.

A worker that joins is asked soon, at a random moment, and later again: at once after its engine has
restarted, and now and then in any case. At most a few workers are asked at a time, one question
after the other, and no worker that is avoided for its load or its failures. So the proof of a fleet
that starts takes a while, and until then its tokens are believed.
"""

import asyncio
import math
from collections.abc import Mapping
from random import Random
from typing import Final

import structlog

from extproc.clock import Clock
from extproc.metrics.service import Metrics
from extproc.routing.token_proof.asking import (
    UNKNOWN_ENGINE,
    UNREACHABLE,
    NotNowError,
    OurTokens,
    prove,
)
from extproc.routing.token_proof.comparison import FIXES
from extproc.routing.token_proof.proofs import PENDING, TokenProof, TokenProofs
from extproc.workers.engine_tokenizer import EngineTokenizer
from extproc.workers.observer import WorkerObserver
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Worker

__all__ = ["TokenProver"]

_log = structlog.get_logger()

_TICK_SECONDS: Final = 0.25
_WORKERS_AT_ONCE: Final = 4
# A worker that joins is asked within this time.
_JITTER_SECONDS: Final = 1.0
# A worker that is avoided, or an encoder that is busy.
_LATER_SECONDS: Final = 5.0
# A worker that did not answer: after so long, and each time twice as long.
_AGAIN_SECONDS: Final = 30.0
# Whatever was found: an engine may restart unseen.
_INTERVAL_SECONDS: Final = 900.0
_NO_ANSWERS: Final = frozenset({UNREACHABLE, "refused", "unreadable"})


class TokenProver(WorkerObserver):
    """Proves the tokens of all workers of the models given to `use`."""

    def __init__(
        self,
        registry: WorkerRegistry,
        engines: EngineTokenizer,
        proofs: TokenProofs,
        clock: Clock,
        random: Random,
        metrics: Metrics,
    ) -> None:
        self._registry = registry
        self._engines = engines
        self._proofs = proofs
        self._clock = clock
        self._random = random
        self._outcomes = metrics.token_proofs
        self._models: dict[str, OurTokens] = {}
        # When to ask; infinite while it is being asked.
        self._due: dict[tuple[Worker, str], float] = {}
        # Of a worker that is asked for a model while there is a reason to begin again.
        self._outdated: set[tuple[Worker, str]] = set()
        self._unanswered: dict[tuple[Worker, str], int] = {}

    def use(self, models: Mapping[str, OurTokens]) -> None:
        """Prove the workers of these models from now on; those whose tokens change once more."""
        before, self._models = self._models, dict(models)
        for key in [key for key in self._due if key[1] not in models]:
            self._forget(key)
        for worker in self._registry:
            for model in worker.model_ids:
                known = before.get(model)
                if model in models and (known is None or known.source is not models[model].source):
                    self._begin(worker, model)

    def joined(self, worker: Worker) -> None:
        for model in worker.model_ids:
            if model in self._models:
                self._begin(worker, model)

    async def left(self, worker: Worker) -> None:
        for key in [key for key in self._due if key[0] is worker]:
            self._forget(key)

    def restarted(self, worker: Worker) -> None:
        """The worker's engine may be another process. What was found stays until it is asked."""
        for key in [key for key in self._due if key[0] is worker]:
            self._ask_soon(key)

    async def run(self) -> None:
        """Ask for ever; awaits every question of its own when it is cancelled."""
        asking = 0

        async def ask(key: tuple[Worker, str]) -> None:
            nonlocal asking
            asking += 1
            try:
                await self._ask(key)
            finally:
                asking -= 1

        async with asyncio.TaskGroup() as group:
            while True:
                now = self._clock.monotonic()
                due = [key for key, at in self._due.items() if at <= now]
                for key in due[: _WORKERS_AT_ONCE - asking]:
                    self._due[key] = math.inf
                    self._outdated.discard(key)
                    group.create_task(ask(key))
                await self._clock.sleep(_TICK_SECONDS)

    def _begin(self, worker: Worker, model: str) -> None:
        self._proofs.put(model, worker, PENDING)
        self._ask_soon((worker, model))

    def _ask_soon(self, key: tuple[Worker, str]) -> None:
        if self._due.get(key) == math.inf:
            self._outdated.add(key)
            return
        self._due[key] = self._clock.monotonic() + self._random.random() * _JITTER_SECONDS

    def _forget(self, key: tuple[Worker, str]) -> None:
        worker, model = key
        del self._due[key]
        self._outdated.discard(key)
        self._unanswered.pop(key, None)
        self._proofs.forget(model, worker)

    async def _ask(self, key: tuple[Worker, str]) -> None:
        worker, model = key
        tokens = self._models[model]
        wait = _INTERVAL_SECONDS
        try:
            proof = await prove(worker, model, tokens, self._engines, self._clock)
        except NotNowError:
            proof, wait = None, _LATER_SECONDS
        except Exception:
            # An answer of a worker must not end the proofs of the others.
            _log.exception("token_proof_failed", worker=worker.url, model=model)
            proof = TokenProof(state="not_proven", reason="unreadable")
        if key not in self._due:
            return
        if key in self._outdated:
            self._due[key] = self._clock.monotonic()
            return
        if proof is not None:
            wait = self._wait(key, proof)
            self._take(worker, model, proof)
        self._due[key] = self._clock.monotonic() + wait * (0.75 + self._random.random() / 2)

    def _wait(self, key: tuple[Worker, str], proof: TokenProof) -> float:
        if proof.reason not in (UNREACHABLE, UNKNOWN_ENGINE):
            self._unanswered.pop(key, None)
            return _INTERVAL_SECONDS
        times = self._unanswered[key] = self._unanswered.get(key, 0) + 1
        return float(min(_INTERVAL_SECONDS, _AGAIN_SECONDS * 2 ** min(times - 1, 8)))

    def _take(self, worker: Worker, model: str, proof: TokenProof) -> None:
        known = self._proofs.of(worker).get(model, PENDING)
        if known.state == "differs" and proof.reason in _NO_ANSWERS:
            # What is known to be wrong stays so until the worker says something else.
            return
        self._proofs.put(model, worker, proof)
        self._outcomes(model, proof.state).inc()
        if (known.state, known.reason) == (proof.state, proof.reason):
            return
        if proof.state == "differs":
            _log.warning(
                "tokens_differ",
                worker=worker.url,
                model=model,
                reason=proof.reason,
                error="; ".join(one.text for one in proof.differences[:3]),
                fix=FIXES.get(proof.reason, ""),
            )
        elif known.state == "differs":
            _log.info("tokens_differ_no_more", worker=worker.url, model=model)
        elif proof.state == "not_proven":
            _log.info("tokens_not_proven", worker=worker.url, model=model, reason=proof.reason)
