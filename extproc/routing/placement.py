"""From tokens to a rank: looks up what each rank holds of the prompt, and lets a policy choose.

This is the one place where index, predictions, load and policy meet. It works in memory and takes
a few dozen microseconds, since every request passes through it on the event loop.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

from msgspec import Struct

from extproc.engines.engine import Engine
from extproc.kv.index import PrefixIndex
from extproc.kv.prefix_hash import TokenIds
from extproc.kv.rank_pages import Overlap as Held
from extproc.kv.rank_pages import RankPages
from extproc.policies.base import KvPolicy, KvQuery
from extproc.routing.predictions import Prediction, Predictions
from extproc.routing.rank import Rank
from extproc.workers.prefill_speed import SPEED_DEFAULT_TOKENS_PER_SECOND, PrefillSpeed
from extproc.workers.rank_load import Booking, RankLoad
from extproc.workers.worker import Worker

__all__ = [
    "NO_OVERLAP",
    "NO_TOKENS",
    "TOKENS_DIFFER",
    "Compared",
    "EngineTokens",
    "Overlap",
    "Placed",
    "PlacedBooking",
    "Placement",
    "PromptTokens",
]

# The reason for a rank whose engine has other tokens for the request: they are not known here.
TOKENS_DIFFER: Final = "tokens_differ"

# Page size, whether pages are pairs of tokens, and the engine whose tokens they are.
_Shape = tuple[int, bool, Engine]


class Overlap(NamedTuple):
    """How many of a prompt's tokens events have confirmed that a rank holds; 0 of 0 if unknown."""

    cached_tokens: int
    total_tokens: int


class EngineTokens(NamedTuple):
    """A prompt's token ids (uint64) as an engine makes them, and the seed of their namespace.

    Without `reads_cache`, the engine computes all of them and leaves them in its cache. Of a prompt
    with images, audio or video, the ids are those before the first of them, and `more` is an
    estimate of the number of those that follow, at least 1.
    """

    ids: TokenIds
    seed: int
    reads_cache: bool = True
    more: int = 0

    @property
    def total(self) -> int:
        """The number of the prompt's tokens; an estimate if there are `more`."""
        return len(self.ids) + self.more


class PromptTokens(NamedTuple):
    """A prompt's tokens by engine, without the engines for which they are not known.

    `guess` is an estimate of the number of tokens where they are not known; 0 for no estimate.
    The `differing` workers have been found to make other tokens of such a prompt: only their load
    counts.
    """

    by_engine: Mapping[Engine, EngineTokens]
    guess: int = 0
    differing: Collection[Worker] = ()


NO_TOKENS: Final = PromptTokens({})
NO_OVERLAP: Final = Overlap(0, 0)


class _Candidate(Struct, gc=False):
    """A rank compared with a prompt; see policies.base.KvCandidate.

    `pages` is None unless the rank's pages are trusted.
    """

    rank: Rank
    order: int
    load: RankLoad
    pages: RankPages | None = None
    has_events: bool = False
    prompt_pages: int = 0
    held_pages: int = 0
    device_tokens: int = 0
    host_tokens: int = 0
    disk_tokens: int = 0
    predicted_pages: int = 0
    predicted_tokens: int = 0


class _Prompt:
    """A prompt cut into pages of one shape, and the ranks that hold or will hold them.

    `pages` are those of the known tokens, and `more` an estimate of those that follow.
    """

    __slots__ = ("cap", "held", "more", "pages", "predicted", "predictions", "prefixes")

    def __init__(
        self,
        prefixes: TokenIds,
        more: int,
        cap: int,
        held: dict[RankPages, Held],
        predictions: Predictions,
        predicted: dict[RankPages, int],
    ) -> None:
        self.prefixes = prefixes
        self.pages = len(prefixes)
        self.more = more
        self.cap = cap  # the most tokens of prefill that a cache can spare
        self.held = held
        self.predictions = predictions
        self.predicted = predicted


class Compared(NamedTuple):
    """The prompt in the tokens of each engine, and cut into the pages of each shape."""

    by_shape: Mapping[_Shape, _Prompt]
    tokens: Mapping[Engine, EngineTokens]


class PlacedBooking:
    """A request booked on a rank: its load and, perhaps, a prediction of the pages it leaves."""

    __slots__ = ("_booking", "_dp_rank", "_prediction")

    def __init__(self, booking: Booking, dp_rank: int, prediction: Prediction | None) -> None:
        self._booking = booking
        self._dp_rank = dp_rank
        self._prediction = prediction

    def started(self, now: float) -> None:
        """A good response has begun; idempotent."""
        self._booking.started(now)
        if self._prediction is not None:
            self._prediction.started(now)

    def release(self, now: float) -> None:
        """The request has ended, in whatever way; idempotent."""
        self._booking.release(now)
        if self._prediction is not None:
            self._prediction.release()

    def again(self, ranks: Sequence[Rank], now: float) -> "PlacedBooking | None":
        """Book the same request on another worker, whose ranks are `ranks`.

        It goes to the same rank, to the first one if there is no such rank; None if there are no
        ranks.
        """
        if not ranks:
            return None
        rank = ranks[self._dp_rank if self._dp_rank < len(ranks) else 0]
        prefill_tokens, streamed = self._booking.prefill_tokens, self._booking.streamed
        booking = rank.load.book(prefill_tokens, now, streamed=streamed)
        return PlacedBooking(booking, rank.dp_rank, None)


class Placed:
    """The rank that a prompt goes to.

    `cached_tokens` is how many of the prompt's `total_tokens` spare prefill because the rank
    holds them; `total_tokens` is 0 when the tokens are not known, and an estimate when only those
    before an image, audio or video are. `predicted_tokens` are those that
    it will hold once it has computed what it was sent before. `prefill_tokens`, at least 1, is how
    many the rank is expected to compute.
    """

    __slots__ = (
        "_compared",
        "_prompt",
        "cached_tokens",
        "predicted_tokens",
        "prefill_tokens",
        "rank",
        "reason",
        "total_tokens",
    )

    def __init__(
        self,
        rank: Rank,
        reason: str,
        *,
        cached_tokens: int,
        total_tokens: int,
        predicted_tokens: int,
        prefill_tokens: int,
        prompt: _Prompt | None,
        compared: Compared,
    ) -> None:
        self._compared = compared
        self.rank = rank
        self.reason = reason
        self.cached_tokens = cached_tokens
        self.total_tokens = total_tokens
        self.predicted_tokens = predicted_tokens
        self.prefill_tokens = prefill_tokens
        self._prompt = prompt

    def overlap_of(self, rank: Rank) -> Overlap:
        """What another of the ranks that were compared holds of the same prompt."""
        found = self._compared.tokens.get(rank.engine)
        if found is None:
            return NO_OVERLAP
        pages = rank.pages
        prompt = held = None
        if pages is not None and pages.trusted:
            prompt = self._compared.by_shape.get((pages.page_size, pages.bigram, rank.engine))
            held = None if prompt is None else prompt.held.get(pages)
        if prompt is None or pages is None or held is None:
            return Overlap(0, found.total)
        return Overlap(min(held[0] * pages.page_size, prompt.cap), found.total)

    def book(self, now: float, *, streamed: bool = True) -> PlacedBooking:
        """Count the request on its rank, and predict that its pages will be there."""
        load, pages, prompt = self.rank.load, self.rank.pages, self._prompt
        ends_at = None
        if prompt is not None and not streamed:
            work = load.prefill_tokens_ahead(now) + self.prefill_tokens
            seconds = work / load.prefill_tokens_per_second
            ends_at = now + seconds + prompt.predictions.grace_seconds
        booking = load.book(self.prefill_tokens, now, streamed=streamed)
        if prompt is None or pages is None:
            return PlacedBooking(booking, self.rank.dp_rank, None)
        prediction = prompt.predictions.add(pages, prompt.prefixes, ends_at)
        return PlacedBooking(booking, self.rank.dp_rank, prediction)


class Placement:
    """Places the requests of one model; all calls from one thread."""

    def __init__(
        self,
        policy: KvPolicy,
        index: PrefixIndex,
        *,
        prefill_tokens_per_second: float = SPEED_DEFAULT_TOKENS_PER_SECOND,
    ) -> None:
        """`prefill_tokens_per_second` is assumed until the speed of a rank has been measured."""
        self.policy = policy
        # For the RankLoad of every rank of this model.
        self.model_speed = PrefillSpeed(default_tokens_per_second=prefill_tokens_per_second)
        self._index = index
        self._predictions: dict[_Shape, Predictions] = {}

    def place(self, ranks: Sequence[Rank], prompt: PromptTokens, now: float) -> Placed:
        """Choose one of at least one rank, given in ascending `order`; books nothing.

        Each rank is compared with the tokens of its own engine.
        """
        tokens = prompt.by_engine
        prompts: dict[_Shape, _Prompt] = {}
        candidates = [_Candidate(rank, rank.order, rank.load) for rank in ranks]
        total = max([one.total for one in tokens.values()], default=0)
        if total:
            self._look_up(candidates, prompts, prompt, now)
        query = KvQuery(now, total, prompt.guess)
        chosen, reason = self.policy.choose(candidates, query)
        found = tokens.get(chosen.rank.engine)
        cached = chosen.device_tokens + chosen.host_tokens + chosen.disk_tokens
        pages = chosen.pages
        cut = None
        if pages is not None:
            cut = prompts.get((pages.page_size, pages.bigram, chosen.rank.engine))
        # An engine can have its own number of tokens; without its tokens it is 0.
        total = 0 if found is None else found.total
        expected = total or prompt.guess
        if found is not None and chosen.rank.worker in prompt.differing:
            # Their number is about right.
            total, reason = 0, TOKENS_DIFFER
        return Placed(
            chosen.rank,
            reason,
            cached_tokens=cached,
            total_tokens=total,
            predicted_tokens=chosen.predicted_tokens,
            prefill_tokens=max(1, expected - max(cached, chosen.predicted_tokens)),
            prompt=cut if cut is not None and chosen.held_pages < cut.pages else None,
            compared=Compared(prompts, tokens),
        )

    def _look_up(
        self,
        candidates: list[_Candidate],
        prompts: dict[_Shape, _Prompt],
        tokens: PromptTokens,
        now: float,
    ) -> None:
        """Fill in what each candidate holds."""
        differing = tokens.differing
        masks: dict[_Shape, int] = {}
        known: list[tuple[_Candidate, RankPages, _Shape]] = []
        for candidate in candidates:
            rank = candidate.rank
            pages = rank.pages
            if (
                pages is not None
                and pages.trusted
                and (not differing or rank.worker not in differing)
            ):
                candidate.pages, candidate.has_events = pages, True
                shape = (pages.page_size, pages.bigram, rank.engine)
                masks[shape] = masks.get(shape, 0) | pages.bit
                known.append((candidate, pages, shape))
        for shape, mask in masks.items():
            found = tokens.by_engine.get(shape[2])
            if found is not None:
                prompts[shape] = self._cut(shape, mask, found, now)
        for candidate, pages, shape in known:
            prompt = prompts.get(shape)
            if prompt is None:
                continue
            page_size = shape[0]
            candidate.prompt_pages = prompt.pages + prompt.more
            overlap = prompt.held.get(pages)
            if overlap is not None:
                cap = prompt.cap
                held, device, host = overlap
                candidate.held_pages = held
                candidate.device_tokens = device = min(device * page_size, cap)
                if held * page_size > device:
                    host = min(host * page_size, cap)
                    candidate.host_tokens = host - device
                    candidate.disk_tokens = min(held * page_size, cap) - host
            predicted = prompt.predicted.get(pages)
            if predicted is not None:
                candidate.predicted_pages = predicted
                candidate.predicted_tokens = min(predicted * page_size, prompt.cap)

    def _cut(self, shape: _Shape, mask: int, found: EngineTokens, now: float) -> _Prompt:
        page_size, bigram, _ = shape
        tokens = found.ids
        prefixes = self._index.prefixes(tokens, page_size, bigram=bigram, seed=found.seed)
        held: dict[RankPages, Held] = {}
        if found.reads_cache:
            self._index.match_prefixes(prefixes, mask, held)
        predictions = self._predictions.get(shape)
        if predictions is None:
            predictions = self._predictions[shape] = Predictions()
        # The engine always computes the last token, and reuses whole pages only.
        last = 0 if found.more else 1
        cap = (len(tokens) - last) // page_size * page_size
        predicted = predictions.match(prefixes, now) if found.reads_cache else {}
        return _Prompt(prefixes, found.more // page_size, cap, held, predictions, predicted)
