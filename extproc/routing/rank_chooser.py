"""Routing of models whose policy looks at tokens: text to tokens to a rank.

Everything here is for one request and one model; what outlives a request is in the parts: the
encoders, the placements and the book of ranks.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from extproc.clock import Clock
from extproc.kv.prefix_hash import TokenIds
from extproc.metrics.service import Metrics
from extproc.routing.placement import Placed, Placement
from extproc.routing.rank import Rank
from extproc.routing.ranks import Ranks
from extproc.routing.request import Request
from extproc.tokenization.bodies.openai_chat import BodyFields
from extproc.tokenization.bodies.prompts import Prompt
from extproc.tokenization.encoder import Encoded
from extproc.tokenization.reasons import BUSY
from extproc.workers.tickets import RankBooking
from extproc.workers.worker import Worker

__all__ = ["Encoder", "PromptTokens", "RankChooser"]

# Of English text; JSON around it included.
_BYTES_PER_TOKEN = 5
_BODY_NOT_SEEN = "body_not_visible"
_LATE = Encoded(None, BUSY)


class Encoder(Protocol):
    """What is asked of a model's tokenizer here."""

    async def read(self, path: str, body: bytes | bytearray, fields: BodyFields | None) -> Prompt:
        """The prompt in a body, whose decoded `fields` are given or None; or why there is none."""
        ...

    async def encode(self, prompt: Prompt) -> Encoded:
        """The prompt's token ids, or why there are none."""
        ...


class PromptTokens(NamedTuple):
    """A prompt's token ids, None where they are not known, and its cache namespace.

    `guess` is about how many tokens there are, for want of their number; 0 for no idea.
    """

    ids: TokenIds | None
    seed: int
    guess: int = 0


class RankChooser:
    """`placements` and `encoders` by model id, of exactly the models that are routed here.

    A prompt whose tokens are not known after `patience_seconds` is routed without them: a worse
    place is better than no answer in time.
    """

    def __init__(
        self,
        placements: Mapping[str, Placement],
        encoders: Mapping[str, Encoder],
        ranks: Ranks,
        metrics: Metrics,
        clock: Clock,
        *,
        patience_seconds: float,
    ) -> None:
        self._placements = placements
        self._encoders = encoders
        self._ranks = ranks
        self._metrics = metrics
        self._clock = clock
        self._patience_seconds = patience_seconds

    def policy_name(self, model: str) -> str:
        return self._placements[model].policy.name

    async def read(self, model: str, request: Request, adapter: str | None) -> PromptTokens:
        """The request's tokens; `adapter` is the one its model name selects."""
        if not request.body:
            self._metrics.prompts_without_tokens(model, _BODY_NOT_SEEN).inc()
            return PromptTokens(None, 0)
        started = self._clock.monotonic()
        encoder = self._encoders[model]
        prompt, encoded = Prompt(why=BUSY), _LATE
        try:
            async with asyncio.timeout(self._patience_seconds):
                prompt = await encoder.read(
                    request.endpoint.path, request.body, request.take_fields()
                )
                encoded = await encoder.encode(prompt)
        except TimeoutError:
            pass
        elapsed = self._clock.monotonic() - started
        self._metrics.tokenization_seconds(model).observe(elapsed)
        if encoded.ids is None:
            self._metrics.prompts_without_tokens(model, encoded.why).inc()
        seed = 0
        # The engine, too, takes the adapter in the model's name before the field.
        adapter = adapter or prompt.lora
        if prompt.cache_salt is not None or adapter is not None:
            seed = self._ranks.indexer.seed(prompt.cache_salt, adapter)
        return PromptTokens(encoded.ids, seed, len(request.body) // _BYTES_PER_TOKEN)

    def place(
        self, model: str, workers: Sequence[Worker], prompt: PromptTokens, now: float
    ) -> Placed:
        """Choose among the ranks of these workers."""
        ranks: list[Rank] = []
        of = self._ranks.of
        for worker in workers:
            ranks += of(worker)
        return self._placements[model].place(
            ranks, prompt.ids, prompt.seed, now, expected_tokens=prompt.guess
        )

    def decided(self, model: str, placed: Placed) -> None:
        """Count the overlap of a decision; of several for one request, only the last."""
        if placed.total_tokens:
            metrics = self._metrics
            metrics.prompt_tokens(model).value += placed.total_tokens
            metrics.cached_tokens(model).value += placed.cached_tokens
            metrics.overlap_tokens(model).observe(placed.cached_tokens)

    def book_served(
        self, worker: Worker, dp_rank: int, prefill_tokens: int, streamed: bool, now: float
    ) -> RankBooking | None:
        """Count the request on a rank that serves it though another one was chosen."""
        ranks = self._ranks.of(worker)
        if not ranks:
            return None
        load = ranks[dp_rank if dp_rank < len(ranks) else 0].load
        return load.book(prefill_tokens, now, streamed=streamed)

    def has_ranks(self, worker: Worker) -> bool:
        """Whether the engine must be told which of its ranks was chosen."""
        return len(self._ranks.of(worker)) > 1

    def has_rank(self, worker: Worker, dp_rank: int) -> bool:
        return dp_rank < len(self._ranks.of(worker))
