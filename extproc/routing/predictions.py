"""Predicts which pages ranks will hold soon, from the prompts that were just sent to them.

Between a decision and the rank's first KV event about it lie a queue, a prefill and the network.
In that time a second request with the same new prefix would find no rank that holds it. A
prediction fills the gap. It is a guess, so it is never reported as overlap. It ends a little after
the response has begun, or at once when the request ends without a response.

A prompt is stored by its first 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, … pages and by all of it. A common
prefix is underestimated by a fifth at most, with 40 entries for a prompt of 2 500 pages.
"""

from bisect import bisect_right
from functools import lru_cache
from heapq import heappop, heappush
from typing import Final

from extproc.kv.prefix_hash import TokenIds
from extproc.kv.rank_pages import RankPages

__all__ = ["Prediction", "Predictions"]

# How long the events of a finished prefill may take to arrive.
GRACE_SECONDS: Final = 2.0
PREDICTIONS_MAX: Final = 4096
_MARK_RATIO: Final = 1.25


def _mark_counts() -> list[int]:
    counts = [1]
    while counts[-1] < 1 << 22:
        counts.append(max(counts[-1] + 1, int(counts[-1] * _MARK_RATIO)))
    return counts


_MARKS: Final = _mark_counts()


class _Seat:
    """A rank with live predictions, and its bit; void once its pages have another generation."""

    __slots__ = ("bit", "generation", "live", "pages")

    def __init__(self, pages: RankPages, bit: int) -> None:
        self.pages = pages
        self.generation = pages.generation
        self.bit = bit
        self.live = 0


class Prediction:
    """One prompt that one rank is about to hold."""

    __slots__ = ("_marks", "_predictions", "_seat", "_started")

    def __init__(self, predictions: "Predictions", seat: _Seat, marks: list[int]) -> None:
        self._predictions = predictions
        self._seat = seat
        self._marks = marks
        self._started = False

    def started(self, now: float) -> None:
        """The response has begun, so the prompt is prefilled and its events will arrive soon."""
        if not self._started:
            self._started = True
            self._predictions._end_at(self, now + self._predictions.grace_seconds)

    def release(self) -> None:
        """The request has ended. If its response never began, the pages will not be there."""
        if not self._started:
            self._predictions._end(self)


class Predictions:
    """All predictions for the ranks of one page size.

    At most `max_predictions` are kept; beyond that the oldest ones end. A rank's predictions are
    void when its pages have another generation, since its cache was cleared or it has left.
    """

    def __init__(
        self, *, grace_seconds: float = GRACE_SECONDS, max_predictions: int = PREDICTIONS_MAX
    ) -> None:
        self.grace_seconds = grace_seconds
        self._max = max_predictions
        self._live: dict[Prediction, None] = {}  # oldest first
        self._ends: list[tuple[float, int, Prediction]] = []  # a heap
        self._ends_pushed = 0
        self._seats: dict[RankPages, _Seat] = {}
        self._by_bit: dict[int, _Seat] = {}
        self._free_bits: list[int] = []
        self._masks: dict[int, int] = {}  # prefix -> bits of ranks
        self._more: dict[tuple[int, int], int] = {}  # (prefix, bit) -> predictions beyond one

    def __len__(self) -> int:
        return len(self._live)

    def add(self, pages: RankPages, prefixes: TokenIds, ends_at: float | None = None) -> Prediction:
        """Predict that the rank will hold the pages of a prompt.

        `prefixes` are PrefixIndex.prefixes of the prompt. The prediction ends at `ends_at` at the
        latest, for responses whose beginning does not show the end of the prefill.
        """
        key = prefixes.item
        marks = [key(count - 1) for count in _marks_of(len(prefixes))]
        seat = self._seats.get(pages)
        if seat is not None and seat.generation != pages.generation:
            self._end_all(seat)
            seat = None
        if seat is None:
            seat = self._take_seat(pages)
        prediction = Prediction(self, seat, marks)
        masks, bit = self._masks, seat.bit
        for prefix in marks:
            mask = masks.get(prefix, 0)
            if mask & bit:
                self._more[prefix, bit] = self._more.get((prefix, bit), 0) + 1
            else:
                masks[prefix] = mask | bit
        seat.live += 1
        self._live[prediction] = None
        if len(self._live) > self._max:
            self._end(next(iter(self._live)))
        if ends_at is not None:
            self._end_at(prediction, ends_at)
        return prediction

    def match(self, prefixes: TokenIds, now: float) -> dict[RankPages, int]:
        """Return how many of these pages each rank is going to hold, if any."""
        if self._ends and self._ends[0][0] <= now:
            self._expire(now)
        found: dict[RankPages, int] = {}
        if not self._masks:
            return found
        key, get = prefixes.item, self._masks.get
        open_bits = -1
        for count in reversed(_marks_of(len(prefixes))):
            mask = get(key(count - 1), 0) & open_bits
            if mask:
                open_bits ^= mask
                while mask:
                    bit = mask & -mask
                    seat = self._by_bit[bit]
                    if seat.generation == seat.pages.generation:
                        found[seat.pages] = count
                    mask ^= bit
        return found

    def _end_all(self, seat: _Seat) -> None:
        for prediction in [one for one in self._live if one._seat is seat]:
            self._end(prediction)

    def _take_seat(self, pages: RankPages) -> _Seat:
        bit = self._free_bits.pop() if self._free_bits else 1 << len(self._seats)
        seat = self._seats[pages] = self._by_bit[bit] = _Seat(pages, bit)
        return seat

    def _end_at(self, prediction: Prediction, ends_at: float) -> None:
        if prediction in self._live:
            self._ends_pushed += 1
            heappush(self._ends, (ends_at, self._ends_pushed, prediction))

    def _expire(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            self._end(heappop(self._ends)[2])

    def _end(self, prediction: Prediction) -> None:
        if prediction not in self._live:
            return
        del self._live[prediction]
        seat = prediction._seat
        bit, masks, more = seat.bit, self._masks, self._more
        for prefix in prediction._marks:
            if more and (others := more.pop((prefix, bit), 0)):
                if others > 1:
                    more[prefix, bit] = others - 1
                continue
            left = masks[prefix] ^ bit
            if left:
                masks[prefix] = left
            else:
                del masks[prefix]
        seat.live -= 1
        if not seat.live:
            del self._seats[seat.pages], self._by_bit[bit]
            self._free_bits.append(bit)


@lru_cache(maxsize=1024)
def _marks_of(pages: int) -> tuple[int, ...]:
    """Return the page counts by which a prompt of that many pages is stored, ascending."""
    marks = tuple(_MARKS[: bisect_right(_MARKS, pages)])
    return marks if not pages or marks[-1] == pages else (*marks, pages)
