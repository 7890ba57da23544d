"""Asks workers for the tokens of requests that this service cannot render as their engine does.

Some models have no chat template that counts: the engine renders their chats with code of its own.
A request for such a model waits for an answer of one worker, half a second at most. What
comes later is kept for the next request with the same body. Engines are spared: few questions are
open at a time, one for equal bodies, no large bodies are sent, and after some failures the engine
is not asked for a while.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Collection
from hashlib import blake2b
from typing import Final, NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from extproc.clock import Clock
from extproc.engines.engine import Engine
from extproc.metrics.service import Metrics
from extproc.tokenization.encoder import Encoded
from extproc.tokenization.fields import BodyFields
from extproc.tokenization.prompts import Prompt, PromptRules, prompt_of, read_prompt
from extproc.tokenization.reasons import TOO_LONG
from extproc.workers.engine_tokenizer import EngineTokenizer, NoTokensToldError
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Role, Worker

__all__ = ["ENGINE_TOKENS_LATE", "NO_TOKENIZER", "EngineOnly", "EnginePrompts"]

_log = structlog.get_logger()

# Why a request has no tokens although its engine can be asked.
ENGINE_TOKENS_LATE: Final = "engine_tokens_late"
# The model has no tokenizer here: the engine is asked for all tokens.
NO_TOKENIZER: Final = "no_tokenizer"

_ROLES: Final[tuple[Role, ...]] = ("plain", "prefill", "decode")
# Measured with vLLM on two busy cores: 6 ms for a body of 4 KB, 150 ms for one of 108 KB, whose
# prefill takes many times as long.
_PATIENCE_SECONDS: Final = 0.1
_PATIENCE_SECONDS_PER_MB: Final = 4.0
_PATIENCE_MAX_SECONDS: Final = 0.5
_TIMEOUT_SECONDS: Final = 2.0
_BODY_MAX_BYTES: Final = 512 * 1024
# Decoding so many takes 6 ms, which hold the interpreter.
_TOKENS_MAX: Final = 65_536
# What vLLM obeys in a request and where it renders, but not in /tokenize.
_OBEYED_IN_REQUESTS: Final = (
    b'"reasoning_effort"',
    b'"reasoning"',
    b'"truncate_prompt_tokens"',
    b'"documents"',
)
_QUESTIONS_AT_ONCE: Final = 16
_CACHE_MAX_BYTES: Final = 16 * 1024 * 1024
_ENTRY_BYTES: Final = 200
_DIGEST_BYTES: Final = 16
# Failures in a row after which an engine is not asked for a while, each time twice as long.
_FAILURES_MAX: Final = 3
_PAUSE_SECONDS: Final = 10.0
_PAUSE_MAX_SECONDS: Final = 300.0


class _Pause:
    """Failures of the questions for one model, and until when no more are asked."""

    def __init__(self) -> None:
        self.failures = 0
        self.until = 0.0

    def failed(self, now: float) -> bool:
        """Count a failure; returns True if a pause begins with it."""
        self.failures += 1
        if self.failures < _FAILURES_MAX:
            return False
        longer = 2 ** min(self.failures - _FAILURES_MAX, 8)
        self.until = now + min(_PAUSE_MAX_SECONDS, _PAUSE_SECONDS * longer)
        return self.failures == _FAILURES_MAX


class _Question(NamedTuple):
    model: str
    path: str
    body: bytes
    rendered_only: bool

    def digest(self) -> bytes:
        found = blake2b(self.body, digest_size=_DIGEST_BYTES)
        found.update(f"{self.model}\0{self.path}\0{self.rendered_only}".encode())
        return found.digest()


class EngineOnly:
    """The encoder of a model that has no tokenizer here: it only knows ids that clients send."""

    async def read(
        self,
        rules: PromptRules,
        path: str,
        body: bytes | bytearray,
        fields: BodyFields | None,
    ) -> Prompt:
        """The prompt in a body, by the engine's rules."""
        if len(body) > _BODY_MAX_BYTES:
            return Prompt(reason=TOO_LONG, body_bytes=len(body))
        if fields is not None:
            return prompt_of(rules, path, fields, len(body))
        return read_prompt(rules, path, body)

    async def encode(self, prompt: Prompt) -> Encoded:
        """The ids in a prompt; without ids, the engine is to be asked."""
        if prompt.ids is not None:
            return Encoded(prompt.ids, "")
        return Encoded(None, prompt.reason or NO_TOKENIZER)


class EnginePrompts:
    """Asks for the models that are given to `use`; all calls from one event loop."""

    def __init__(
        self, engines: EngineTokenizer, registry: WorkerRegistry, clock: Clock, metrics: Metrics
    ) -> None:
        self._engines = engines
        self._registry = registry
        self._clock = clock
        self._outcomes = metrics.engine_token_questions
        self._models: frozenset[str] = frozenset()
        self._pauses: dict[str, _Pause] = {}
        self._cache: OrderedDict[bytes, NDArray[np.uint64]] = OrderedDict()
        self._cache_bytes = 0
        self._open: dict[bytes, asyncio.Task[NDArray[np.uint64] | None]] = {}

    def use(self, models: Collection[str]) -> None:
        """From now on engines are asked for these models, and what was kept is dropped."""
        self._models = frozenset(models)
        self._pauses.clear()
        self._cache.clear()
        self._cache_bytes = 0

    def close(self) -> None:
        """Give up all questions."""
        for task in self._open.values():
            task.cancel()

    def asks(self, model: str) -> bool:
        """True if the engines of this model are asked."""
        return model in self._models

    def workers_of(self, model: str, engine: Engine) -> set[Worker]:
        """The workers of the model with this engine, in all roles."""
        return {
            worker
            for role in _ROLES
            for worker in self._registry.pool_of(model, role)
            if worker.engine is engine
        }

    async def ids(
        self, model: str, engine: Engine, path: str, body: bytes | bytearray, *, rendered_only: bool
    ) -> NDArray[np.uint64] | None:
        """The ids of the prompt of a body, None if no worker tells them in time.

        With `rendered_only` only an endpoint counts that renders as for a request.
        """
        outcome = self._outcomes
        if engine.name == "vllm" and not rendered_only:
            rendered_only = any(member in body for member in _OBEYED_IN_REQUESTS)
        if len(body) > _BODY_MAX_BYTES:
            outcome(model, "too_large").inc()
            return None
        question = _Question(model, path, bytes(body), rendered_only)
        digest = question.digest()
        found = self._cache.get(digest)
        if found is not None:
            self._cache.move_to_end(digest)
            outcome(model, "cached").inc()
            return found
        task = self._open.get(digest) or self._ask(digest, question, engine)
        if task is None:
            outcome(model, "not_asked").inc()
            return None
        patience = _PATIENCE_SECONDS + len(body) / 1e6 * _PATIENCE_SECONDS_PER_MB
        await asyncio.wait({task}, timeout=min(_PATIENCE_MAX_SECONDS, patience))
        if not task.done() or task.cancelled():
            outcome(model, "late").inc()
            return None
        ids = task.result()
        outcome(model, "answered" if ids is not None else "failed").inc()
        return ids

    def _ask(
        self, digest: bytes, question: _Question, engine: Engine
    ) -> "asyncio.Task[NDArray[np.uint64] | None] | None":
        """Begin a question to the least loaded worker; None if no worker can be asked now."""
        now = self._clock.monotonic()
        pause = self._pauses.setdefault(question.model, _Pause())
        if len(self._open) >= _QUESTIONS_AT_ONCE or now < pause.until:
            return None
        workers = [
            worker
            for worker in self.workers_of(question.model, engine)
            if worker.breaker.would_allow(now)
        ]
        if not workers:
            return None
        worker = min(workers, key=lambda one: (one.in_flight, one.order))
        task = asyncio.create_task(self._answer(digest, question, worker, pause))
        self._open[digest] = task
        task.add_done_callback(lambda _: self._open.pop(digest, None))
        return task

    async def _answer(
        self, digest: bytes, question: _Question, worker: Worker, pause: _Pause
    ) -> NDArray[np.uint64] | None:
        try:
            ids = await self._engines.ask(
                worker.spec.url,
                worker.engine.name,
                question.path,
                question.body,
                timeout_seconds=_TIMEOUT_SECONDS,
                tokens_max=_TOKENS_MAX,
                rendered_only=question.rendered_only,
            )
        except NoTokensToldError as told:
            # A body that the engine refuses says nothing about other bodies.
            if told.reason != "refused" and pause.failed(self._clock.monotonic()):
                _log.warning(
                    "engine_tokens_not_told",
                    worker=worker.url,
                    model=question.model,
                    reason=told.reason,
                    error=str(told),
                )
            return None
        except Exception:
            pause.failed(self._clock.monotonic())
            _log.exception("engine_tokens_failed", worker=worker.url, model=question.model)
            return None
        pause.failures = 0
        self._keep(digest, question.model, ids)
        return ids

    def _keep(self, digest: bytes, model: str, ids: NDArray[np.uint64]) -> None:
        if model not in self._models or digest in self._cache:
            return
        self._cache[digest] = ids
        self._cache_bytes += ids.nbytes + _ENTRY_BYTES
        while self._cache_bytes > _CACHE_MAX_BYTES:
            _, dropped = self._cache.popitem(last=False)
            self._cache_bytes -= dropped.nbytes + _ENTRY_BYTES
