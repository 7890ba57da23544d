"""Chooses ranks by what they hold of the prompt: text to tokens, tokens to a rank.

This part of routing waits: tokens of long prompts are made in a thread. Everything that
outlives a request is in the parts it is given: the encoder, the placement and the ranks.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog

from extproc.clock import Clock
from extproc.metrics.service import Metrics
from extproc.routing.chooser import Chosen, PromptTokens
from extproc.routing.placement import Placement
from extproc.routing.rank import Rank
from extproc.routing.ranks import Ranks
from extproc.routing.request import Request
from extproc.tokenization.bodies.openai_chat import BodyFields
from extproc.tokenization.bodies.prompts import Prompt
from extproc.tokenization.encoder import Encoded
from extproc.tokenization.reasons import BUSY, TEMPLATE_LIMIT
from extproc.workers.worker import Worker

_log = structlog.get_logger()

__all__ = ["Encoder", "RankChooser"]

# Of English text; JSON around it included.
_BYTES_PER_TOKEN = 5
_BODY_NOT_SEEN = "body_not_visible"
_NO_EVENTS = "no_events"
_WARN_SECONDS = 60.0
_LATE = Encoded(None, BUSY)


class Encoder(Protocol):
    """The part of a model's tokenizer that routing uses."""

    async def read(self, path: str, body: bytes | bytearray, fields: BodyFields | None) -> Prompt:
        """Return the prompt in a body, or why it has no prompt; `fields`: the decoded body."""
        ...

    async def encode(self, prompt: Prompt) -> Encoded:
        """Return the prompt's token ids, or why they are not known."""
        ...


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
        *,
        metrics: Metrics,
        clock: Clock,
        patience_seconds: float,
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._placement = placement
        self._ranks = ranks
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
            return PromptTokens(None, 0)
        started = self._clock.monotonic()
        prompt, encoded = Prompt(reason=BUSY), _LATE
        try:
            async with asyncio.timeout(self._patience_seconds):
                prompt = await self._encoder.read(
                    request.endpoint.path, request.body, request.take_fields()
                )
                encoded = await self._encoder.encode(prompt)
        except TimeoutError:
            pass
        elapsed = self._clock.monotonic() - started
        self._metrics.tokenization_seconds(self._model).observe(elapsed)
        if encoded.ids is None:
            self._metrics.prompts_without_tokens(self._model, encoded.reason).inc()
            if encoded.reason == TEMPLATE_LIMIT and started >= self._warn_again_at:
                self._warn_again_at = started + _WARN_SECONDS
                _log.warning("chat_template_over_limit", model=self._model)
        seed = 0
        # The engine, too, takes the adapter in the model's name before the field.
        adapter = adapter or prompt.lora
        if prompt.cache_salt is not None or adapter is not None:
            seed = self._ranks.indexer.seed(prompt.cache_salt, adapter)
        return PromptTokens(encoded.ids, seed, len(request.body) // _BYTES_PER_TOKEN)

    def choose(self, workers: Sequence[Worker], prompt: PromptTokens, now: float) -> Chosen:
        ranks: list[Rank] = []
        of = self._ranks.of
        for worker in workers:
            ranks += of(worker)
        if not ranks:
            # Between leaving and joining again: the worker's KV events come from elsewhere, or
            # a reload has just given its model this policy.
            return Chosen(min(workers, key=_in_flight), self._policy_name, _NO_EVENTS)
        placed = self._placement.place(
            ranks, prompt.ids, prompt.seed, now, expected_tokens=prompt.guess
        )
        rank = placed.rank
        dp_rank = rank.dp_rank if len(of(rank.worker)) > 1 else None
        return Chosen(rank.worker, self._policy_name, placed.reason, placed, dp_rank)

    def decided(self, chosen: Chosen) -> None:
        placed = chosen.placed
        if placed is not None and placed.total_tokens:
            self._prompt_tokens.value += placed.total_tokens
            self._cached_tokens.value += placed.cached_tokens
            self._metrics.overlap_tokens(self._model).observe(placed.cached_tokens)


def _in_flight(worker: Worker) -> int:
    return worker.in_flight
