"""Chooses ranks by what they hold of the prompt: text to tokens, tokens to a rank.

This part of routing waits: tokens of long prompts are made in a thread. Everything that
outlives a request is in the parts it is given: the encoder, the placement and the ranks.
"""

import asyncio
from collections.abc import Collection, Sequence
from typing import Protocol

import structlog
from msgspec import Struct

from extproc.clock import Clock
from extproc.engines.engine import Engine
from extproc.metrics.service import Metrics
from extproc.routing.chooser import Chosen
from extproc.routing.engine_prompts import ENGINE_TOKENS_LATE, NO_TOKENIZER, EnginePrompts
from extproc.routing.placement import (
    NO_TOKENS,
    TOKENS_DIFFER,
    EngineTokens,
    Placement,
    PromptTokens,
)
from extproc.routing.rank import Rank
from extproc.routing.ranks import Ranks
from extproc.routing.request import Request
from extproc.routing.token_proof.proofs import TokenProofs
from extproc.routing.token_proof.traits import traits_of
from extproc.tokenization.encoder import Encoded
from extproc.tokenization.fields import BodyFields
from extproc.tokenization.prompts import Prompt, PromptRules
from extproc.tokenization.reasons import BUSY, RENDERED_BY_ENGINE, TEMPLATE_LIMIT
from extproc.workers.worker import Worker

_log = structlog.get_logger()

__all__ = ["Encoder", "RankChooser", "TokenTruth"]

# Of English text; JSON around it included.
_BYTES_PER_TOKEN = 5
# Of an image of a megapixel: 256 in one common model, 1300 in another.
_TOKENS_PER_MEDIUM = 512
_BODY_NOT_SEEN = "body_not_visible"
_NO_EVENTS = "no_events"
_WARN_SECONDS = 60.0
_LATE = Encoded(None, BUSY)
_ONLY_THE_ENGINE = (RENDERED_BY_ENGINE, NO_TOKENIZER)
_NO_WORKERS: Collection[Worker] = ()


class Encoder(Protocol):
    """The part of a model's tokenizer that routing uses."""

    async def read(
        self,
        rules: PromptRules,
        path: str,
        body: bytes | bytearray,
        fields: BodyFields | None,
    ) -> Prompt:
        """Return the prompt in a body by an engine's rules, or why it has no prompt.

        `fields` are those of the decoded body.
        """
        ...

    async def encode(self, prompt: Prompt) -> Encoded:
        """Return the prompt's token ids, or why they are not known."""
        ...


class TokenTruth(Struct, frozen=True):
    """What engines themselves say of their tokens: by proofs, and when they are asked."""

    proofs: TokenProofs
    engines: EnginePrompts


class RankChooser:
    """Chooses ranks for the requests of one model.

    A prompt whose tokens are not known after `patience_seconds` is routed without them: a worse
    place is better than no answer in time.
    """

    reads_prompts = True

    def __init__(
        self,
        model: str,
        encoder: Encoder,
        placement: Placement,
        ranks: Ranks,
        truth: TokenTruth,
        *,
        metrics: Metrics,
        clock: Clock,
        patience_seconds: float,
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._placement = placement
        self._ranks = ranks
        self._truth = truth
        self._metrics = metrics
        self._clock = clock
        self._patience_seconds = patience_seconds
        self._policy_name = placement.policy.name
        self._warn_again_at = 0.0
        self._prompt_tokens = metrics.prompt_tokens(model)
        self._cached_tokens = metrics.cached_tokens(model)

    async def read(self, request: Request, adapter: str | None) -> PromptTokens:
        if not request.body:
            self._metrics.prompts_without_tokens(self._model, _BODY_NOT_SEEN).inc()
            return NO_TOKENS
        started = self._clock.monotonic()
        fields, path = request.take_fields(), request.endpoint.path
        by_engine: dict[Engine, EngineTokens] = {}
        encoded, differing = _LATE, _NO_WORKERS
        guess = len(request.body) // _BYTES_PER_TOKEN
        try:
            async with asyncio.timeout(self._patience_seconds):
                for engine in self._ranks.engines_of(self._model):
                    prompt = await self._encoder.read(engine.rules, path, request.body, fields)
                    guess = _guess(prompt, request.body)
                    encoded = await self._encoder.encode(prompt)
                    if encoded.reason in _ONLY_THE_ENGINE:
                        encoded = await self._from_engine(engine, request, encoded.reason)
                    tokens = self._tokens(prompt, encoded, adapter, guess)
                    if tokens is not None:
                        by_engine[engine] = tokens
                        # Ids of the client are the engine's, too.
                        if prompt.ids is None:
                            differing = self._differing(request)
                if differing:
                    differing = await self._corrected(by_engine, differing, request)
        except TimeoutError:
            encoded = _LATE
        elapsed = self._clock.monotonic() - started
        self._metrics.tokenization_seconds(self._model).observe(elapsed)
        if encoded.beginning is not None:
            self._metrics.prompts_in_part(self._model).inc()
        elif encoded.ids is None:
            self._metrics.prompts_without_tokens(self._model, encoded.reason).inc()
            if encoded.reason == TEMPLATE_LIMIT and started >= self._warn_again_at:
                self._warn_again_at = started + _WARN_SECONDS
                _log.warning("chat_template_over_limit", model=self._model)
        return PromptTokens(by_engine, guess, differing)

    def _tokens(
        self, prompt: Prompt, encoded: Encoded, adapter: str | None, guess: int
    ) -> EngineTokens | None:
        ids, more = encoded.ids, 0
        if encoded.beginning is not None:
            ids = encoded.beginning
            more = max(1, guess - len(ids))
        if ids is None:
            return None
        return EngineTokens(ids, self._seed(prompt, adapter), prompt.reads_cache, more)

    async def _from_engine(self, engine: Engine, request: Request, reason: str) -> Encoded:
        """The tokens of a prompt that only the engine can make, from the engine."""
        engines = self._truth.engines
        if not engines.asks(self._model):
            return Encoded(None, reason)
        ids = await engines.ids(
            self._model,
            engine,
            request.endpoint.path,
            request.body,
            rendered_only=reason == RENDERED_BY_ENGINE,
        )
        return Encoded(ids, "" if ids is not None else ENGINE_TOKENS_LATE)

    async def _corrected(
        self,
        by_engine: dict[Engine, EngineTokens],
        differing: Collection[Worker],
        request: Request,
    ) -> Collection[Worker]:
        """Ask the engines all of whose workers make other tokens; returns the workers left."""
        engines = self._truth.engines
        if not engines.asks(self._model):
            return differing
        left, path = set(differing), request.endpoint.path
        for engine, tokens in list(by_engine.items()):
            workers = engines.workers_of(self._model, engine)
            # Before an image, too, other tokens are other tokens; the engine answers for all.
            if not workers or not workers <= left or tokens.more:
                continue
            ids = await engines.ids(self._model, engine, path, request.body, rendered_only=False)
            if ids is not None:
                by_engine[engine] = tokens._replace(ids=ids)
                left -= workers
        return left

    def _differing(self, request: Request) -> Collection[Worker]:
        """The workers that have been found to make other tokens of such a request."""
        found = self._truth.proofs.differing(self._model)
        if not found:
            return _NO_WORKERS
        concerned = 0
        for traits in found.values():
            concerned |= traits
        has = traits_of(request.endpoint.path, request.body, concerned)
        return {worker for worker, traits in found.items() if traits & has}

    def _seed(self, prompt: Prompt, adapter: str | None) -> int:
        """The seed of the prompt's cache namespace."""
        # The engine, too, takes the adapter in the model's name before the field.
        adapter = adapter or prompt.lora
        if prompt.cache_salt is None and adapter is None:
            return 0
        return self._ranks.indexer.seed(prompt.cache_salt, adapter)

    def choose(self, workers: Sequence[Worker], prompt: PromptTokens, now: float) -> Chosen:
        ranks: list[Rank] = []
        of = self._ranks.of
        for worker in workers:
            ranks += of(worker)
        if not ranks:
            # Between leaving and joining again: the worker's KV events come from elsewhere, or
            # a reload has just given its model this policy.
            return Chosen(min(workers, key=_in_flight), self._policy_name, _NO_EVENTS)
        placed = self._placement.place(ranks, prompt, now)
        rank = placed.rank
        dp_rank = rank.dp_rank if len(of(rank.worker)) > 1 else None
        return Chosen(rank.worker, self._policy_name, placed.reason, placed, dp_rank)

    def decided(self, chosen: Chosen) -> None:
        placed = chosen.placed
        if placed is not None and placed.reason == TOKENS_DIFFER:
            self._metrics.prompts_without_tokens(self._model, TOKENS_DIFFER).inc()
        if placed is not None and placed.total_tokens:
            self._prompt_tokens.value += placed.total_tokens
            self._cached_tokens.value += placed.cached_tokens
            self._metrics.overlap_tokens(self._model).observe(placed.cached_tokens)


def _guess(prompt: Prompt, body: bytes | bytearray) -> int:
    """An estimate of the number of tokens, from the size of the body's texts and its media."""
    texts = max(0, len(body) - prompt.media_bytes)
    return texts // _BYTES_PER_TOKEN + prompt.media * _TOKENS_PER_MEDIUM


def _in_flight(worker: Worker) -> int:
    return worker.in_flight
