"""Asks one worker for the tokens of all probes: one proof.

Separate from the prover, which decides when a worker is asked and keeps what was found.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from extproc.clock import Clock
from extproc.errors import ServiceError
from extproc.routing.token_proof.comparison import Difference, compare, likely_cause
from extproc.routing.token_proof.probes import PROBES, Probe
from extproc.routing.token_proof.proofs import TokenProof
from extproc.routing.token_proof.traits import CHAT, TEXT
from extproc.tokenization.encoder import Encoded
from extproc.tokenization.reasons import BUSY
from extproc.workers.engine_tokenizer import EngineTokenizer, NoTokensToldError
from extproc.workers.worker import Worker

__all__ = ["UNKNOWN_ENGINE", "UNREACHABLE", "NotNowError", "OurTokens", "prove"]

_TIMEOUT_SECONDS: Final = 2.0
# A first question may find an engine that compiles its template.
_FIRST_TIMEOUT_SECONDS: Final = 5.0
# Each probe has a few hundred.
_TOKENS_MAX: Final = 4096
_BETWEEN_SECONDS: Final = 0.02
# The worker has not said which engine it is, so it is not known how to ask it.
UNKNOWN_ENGINE: Final = "unknown_engine"
UNREACHABLE: Final = "unreachable"
# This service has no tokens for any probe that the worker could be asked for.
_NO_TOKENS: Final = "no_tokens_here"


class OurTokens(Struct, frozen=True):
    """How this service makes the tokens of a model.

    `encode` gives those of a body that is sent to a path of this worker, `text_of` the text of ids,
    whether they are in the vocabulary or not. `source` is another object for other tokens.
    """

    encode: Callable[[Worker, str, bytes], Awaitable[Encoded]]
    text_of: Callable[[Sequence[int]], str]
    source: object


class NotNowError(ServiceError):
    """The worker is to be avoided now, or this service is busy."""


async def prove(
    worker: Worker, model: str, tokens: OurTokens, engines: EngineTokenizer, clock: Clock
) -> TokenProof:
    """Ask a worker for the tokens of all probes; raises NotNowError.

    The first question without an answer is the last one.
    """
    if worker.spec.engine is None:
        return TokenProof(state="not_proven", reason=UNKNOWN_ENGINE)
    asked = _Asked(worker, model, tokens, engines)
    for probe in PROBES:
        if worker.draining or not worker.breaker.would_allow(clock.monotonic()):
            raise NotNowError("the worker gets no requests now")
        await asked.compare(probe)
        if asked.unreachable:
            break
        await clock.sleep(_BETWEEN_SECONDS)
    return asked.result()


class _Asked:
    """What one worker has answered so far."""

    def __init__(
        self, worker: Worker, model: str, tokens: OurTokens, engines: EngineTokenizer
    ) -> None:
        self._worker = worker
        self._model = model
        self._tokens = tokens
        self._engines = engines
        self._absent: set[str] = set()
        self._equal: list[str] = []
        self._differences: list[Difference] = []
        # Why probes were not compared.
        self._reasons: dict[str, str] = {}
        self._has_answered = False

    @property
    def unreachable(self) -> bool:
        return UNREACHABLE in self._reasons.values()

    async def compare(self, probe: Probe) -> None:
        """Compare the tokens of one probe; raises NotNowError."""
        body = msgspec.json.encode({"model": self._model, **probe.body})
        ours = await self._tokens.encode(self._worker, probe.path, body)
        if ours.ids is None:
            if ours.reason == BUSY:
                raise NotNowError("too many prompts wait for their tokens")
            self._reasons[probe.name] = _NO_TOKENS
            return
        engine = self._worker.spec.engine
        if engine is None:
            # It joins again, since it says something else about itself now.
            raise NotNowError("the worker is not known any more")
        try:
            engines = await self._engines.ask(
                self._worker.spec.url,
                engine,
                probe.path,
                body,
                timeout_seconds=_TIMEOUT_SECONDS if self._has_answered else _FIRST_TIMEOUT_SECONDS,
                tokens_max=_TOKENS_MAX,
                absent=self._absent,
            )
        except NoTokensToldError as told:
            self._reasons[probe.name] = told.reason
            return
        self._has_answered = True
        difference = compare(probe, ours.ids, engines, self._tokens.text_of)
        if difference is None:
            self._equal.append(probe.name)
        else:
            self._differences.append(difference)

    def result(self) -> TokenProof:
        equal, differences = tuple(self._equal), tuple(self._differences)
        compared = {*equal, *(one.probe for one in differences)}
        not_compared = tuple(probe.name for probe in PROBES if probe.name not in compared)
        if differences:
            return TokenProof(
                state="differs",
                equal=equal,
                not_compared=not_compared,
                differences=differences,
                reason=likely_cause(differences, frozenset(equal)),
            )
        if reason := self._missing(compared):
            return TokenProof(
                state="not_proven", equal=equal, not_compared=not_compared, reason=reason
            )
        return TokenProof(state="proven", equal=equal, not_compared=not_compared)

    def _missing(self, compared: Collection[str]) -> str:
        """Why equal tokens of some probes prove too little; empty if they are enough.

        A text and a chat are needed, where this service has tokens for them at all.
        """
        if self.unreachable:
            return UNREACHABLE
        for trait in (TEXT, CHAT):
            names = [probe.name for probe in PROBES if probe.trait == trait]
            reasons = [self._reasons.get(name, "") for name in names]
            if not any(name in compared for name in names) and {*reasons} != {_NO_TOKENS}:
                return next(reason for reason in reasons if reason != _NO_TOKENS)
        return "" if compared else _NO_TOKENS
