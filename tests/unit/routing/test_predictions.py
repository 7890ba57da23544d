"""Predictions are found by marks, for a limited time, and leave nothing behind."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from extproc.kv.index import PrefixIndex
from extproc.kv.prefix_hash import PrefixHasher, TokenIds
from extproc.kv.rank_pages import RankPages
from extproc.routing.predictions import GRACE_SECONDS, PREDICTIONS_MAX, Prediction, Predictions

# A page is a token, so that a prompt of some pages is as many numbers.
INDEX = PrefixIndex(PrefixHasher(secret=1), 1)
A, B, C, D = (RankPages(f"http://{name}:1", 0, 1, bigram=False) for name in "abcd")
# The marks of the first pages; beyond each is the fourth part above the one before.
MARKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 22, 27, 33, 41, 51)


def prompt(pages: Sequence[int]) -> TokenIds:
    return INDEX.prefixes(np.array(pages, np.uint64), 1)


def first(pages: int, *, then: int = 0, otherwise: int = 1) -> TokenIds:
    """A prompt with pages that all prompts begin with, and some pages of its own."""
    return prompt([7] * pages + [1000 + otherwise] * then)


def is_empty(predictions: Predictions) -> bool:
    """True if all tables are empty; a free bit may be kept."""
    tables = (
        predictions._live,
        predictions._ends,
        predictions._seats,
        predictions._by_bit,
        predictions._masks,
        predictions._more,
    )
    return not any(tables)


# -- marks


def test_without_predictions_nothing_is_found() -> None:
    predictions = Predictions()
    assert predictions.match(first(5), 0.0) == {}
    assert len(predictions) == 0
    assert predictions.match(first(0), 0.0) == {}


@pytest.mark.parametrize("pages", [1, 2, 7, 8, 9, 10, 11, 100, 2500])
def test_the_same_prompt_again_is_predicted_in_full(pages: int) -> None:
    predictions = Predictions()
    predictions.add(A, first(pages))
    assert predictions.match(first(pages), 0.0) == {A: pages}


def test_a_prompt_with_nothing_in_common_is_not_predicted() -> None:
    predictions = Predictions()
    predictions.add(A, prompt([1, 2, 3]))
    assert predictions.match(prompt([2, 2, 3]), 0.0) == {}


def test_a_prompt_without_a_whole_page_predicts_nothing() -> None:
    predictions = Predictions()
    prediction = predictions.add(A, first(0))
    assert predictions.match(first(5), 0.0) == {}
    prediction.release()
    assert is_empty(predictions)


@pytest.mark.parametrize(
    ("sent", "asked", "common", "predicted"),
    [
        # The page counts of two prompts, how many of these are equal, and the mark below.
        (3, 3, 2, 2),
        (20, 20, 8, 8),
        (20, 20, 9, 8),
        (20, 20, 10, 10),
        (20, 20, 11, 10),
        (60, 60, 50, 41),
        (60, 60, 51, 51),
        # One is the other's beginning: all of it, if that is a mark of both.
        (10, 50, 10, 10),
        (50, 10, 10, 10),
        (9, 50, 9, 8),
        (50, 9, 9, 8),
    ],
)
def test_a_common_prefix_is_found_down_to_the_next_mark(
    sent: int, asked: int, common: int, predicted: int
) -> None:
    predictions = Predictions()
    predictions.add(A, first(common, then=sent - common, otherwise=1))
    assert predictions.match(first(common, then=asked - common, otherwise=2), 0.0) == {A: predicted}


@given(common=st.integers(1, 3000), more_sent=st.integers(0, 200), more_asked=st.integers(0, 200))
def test_a_common_prefix_is_underestimated_by_a_fifth_at_most(
    common: int, more_sent: int, more_asked: int
) -> None:
    predictions = Predictions()
    predictions.add(A, first(common, then=more_sent, otherwise=1))
    (found,) = predictions.match(first(common, then=more_asked, otherwise=2), 0.0).values()
    assert 0.8 * common <= found <= common


def test_a_long_prompt_takes_few_entries() -> None:
    predictions = Predictions()
    predictions.add(A, first(2500))
    assert len(predictions._masks) <= 40


# -- how long predictions live


def test_a_prediction_ends_a_grace_time_after_the_response_began() -> None:
    predictions = Predictions()
    prediction = predictions.add(A, first(5))
    assert predictions.match(first(5), 1e6) == {A: 5}  # however long the queue is
    prediction.started(1e6)
    assert predictions.match(first(5), 1e6 + GRACE_SECONDS - 0.01) == {A: 5}
    assert predictions.match(first(5), 1e6 + GRACE_SECONDS) == {}
    assert is_empty(predictions)


def test_a_second_start_does_not_prolong_a_prediction() -> None:
    predictions = Predictions(grace_seconds=3.0)
    prediction = predictions.add(A, first(5))
    prediction.started(10.0)
    prediction.started(12.0)
    assert predictions.match(first(5), 12.9) == {A: 5}
    assert predictions.match(first(5), 13.0) == {}
    prediction.started(20.0)
    assert is_empty(predictions)


def test_a_request_without_a_response_leaves_no_prediction() -> None:
    predictions = Predictions()
    prediction = predictions.add(A, first(5))
    prediction.release()
    assert predictions.match(first(5), 0.0) == {}
    assert is_empty(predictions)
    prediction.release()
    prediction.started(0.0)
    assert is_empty(predictions)


def test_a_prediction_may_outlive_its_response() -> None:
    predictions = Predictions(grace_seconds=3.0)
    prediction = predictions.add(A, first(5))
    prediction.started(10.0)
    prediction.release()
    assert predictions.match(first(5), 12.9) == {A: 5}
    assert predictions.match(first(5), 13.0) == {}
    assert is_empty(predictions)


def test_a_prediction_with_an_end_ends_then_without_a_start() -> None:
    predictions = Predictions(grace_seconds=3.0)
    predictions.add(A, first(5), 20.0)
    assert predictions.match(first(5), 19.9) == {A: 5}
    assert predictions.match(first(5), 20.0) == {}
    assert is_empty(predictions)


def test_the_earlier_of_two_ends_counts() -> None:
    predictions = Predictions(grace_seconds=3.0)
    predictions.add(A, first(5), 20.0).started(10.0)  # to 13
    predictions.add(B, first(5), 20.0).started(19.0)  # to 22, but for its end
    assert predictions.match(first(5), 12.9) == {A: 5, B: 5}
    assert predictions.match(first(5), 13.0) == {B: 5}
    assert predictions.match(first(5), 20.0) == {}
    assert predictions.match(first(5), 22.0) == {}
    assert is_empty(predictions)


def test_predictions_end_in_the_order_of_their_times() -> None:
    predictions = Predictions()
    for pages, ends_at in ((A, 3.0), (B, 1.0), (C, 2.0)):
        predictions.add(pages, first(5), ends_at)
    assert set(predictions.match(first(5), 0.0)) == {A, B, C}
    assert set(predictions.match(first(5), 1.0)) == {A, C}
    assert set(predictions.match(first(5), 2.0)) == {A}
    assert set(predictions.match(first(5), 3.0)) == set()


def test_only_predictions_from_before_a_rank_lost_its_cache_are_void() -> None:
    predictions = Predictions()
    lost, longer = predictions.add(A, first(5)), predictions.add(A, first(9))
    kept = predictions.add(B, first(5))
    A.generation += 1
    assert predictions.match(first(9), 0.0) == {B: 5}
    # A response that begins later does not change that.
    lost.started(0.0)
    longer.release()
    assert predictions.match(first(9), 0.0) == {B: 5}
    assert predictions.match(first(9), GRACE_SECONDS) == {B: 5}
    assert len(predictions) == 1
    kept.release()
    assert is_empty(predictions)


def test_new_predictions_of_a_rank_that_lost_its_cache_replace_the_void_ones() -> None:
    predictions = Predictions()
    before = predictions.add(A, first(5), 10.0)
    A.generation += 1
    predictions.add(A, first(3))
    assert len(predictions) == 1
    before.release()
    before.started(0.0)
    assert predictions.match(first(5), 10.0) == {A: 3}


def test_the_oldest_predictions_end_when_there_are_too_many() -> None:
    predictions = Predictions(max_predictions=2)
    oldest = predictions.add(A, first(3))
    predictions.add(B, first(3))
    predictions.add(C, first(3))
    assert len(predictions) == 2
    assert predictions.match(first(3), 0.0) == {B: 3, C: 3}
    oldest.started(0.0)
    oldest.release()
    assert predictions.match(first(3), 0.0) == {B: 3, C: 3}


def test_thousands_of_predictions_are_kept() -> None:
    predictions = Predictions()
    ranks = [RankPages("http://w:1", n, 1, bigram=False) for n in range(PREDICTIONS_MAX + 3)]
    for pages in ranks:
        predictions.add(pages, first(2))
    assert len(predictions) == PREDICTIONS_MAX
    assert set(predictions.match(first(2), 0.0)) == set(ranks[3:])


# -- several ranks


def test_each_rank_has_its_own_depth() -> None:
    predictions = Predictions()
    predictions.add(A, first(4))
    predictions.add(B, first(8))
    predictions.add(C, first(6, then=6, otherwise=3))
    predictions.add(D, prompt([9, 9]))
    assert predictions.match(first(8), 0.0) == {A: 4, B: 8, C: 6}
    assert predictions.match(first(3), 0.0) == {A: 3, B: 3, C: 3}


def test_the_longer_of_two_predictions_counts_and_each_ends_alone() -> None:
    predictions = Predictions()
    shallow, deep = predictions.add(A, first(4)), predictions.add(A, first(8))
    same = predictions.add(A, first(8))
    assert predictions.match(first(8), 0.0) == {A: 8}
    deep.release()
    assert predictions.match(first(8), 0.0) == {A: 8}
    same.release()
    assert predictions.match(first(8), 0.0) == {A: 4}
    shallow.release()
    assert predictions.match(first(8), 0.0) == {}
    assert is_empty(predictions)


def test_a_new_rank_reuses_the_bit_of_one_that_left() -> None:
    predictions = Predictions()
    for number in range(100):
        ranks = [RankPages(f"http://{number}:1", n, 1, bigram=False) for n in range(3)]
        a, b, c = (predictions.add(pages, first(3)) for pages in ranks)
        for prediction in (b, a, c):
            prediction.release()
    predictions.add(D, first(3))
    (bit,) = predictions._by_bit
    assert bit <= 1 << 2  # masks are as long as there were ranks at a time
    assert predictions.match(first(3), 0.0) == {D: 3}


# -- against a naive model

_RANKS = st.sampled_from([A, B, C])
# Few prompts, so that they share prefixes of all lengths.
_PROMPTS = st.builds(
    lambda branch, at, length: [7] * min(at, length) + [branch] * max(0, length - at),
    st.integers(0, 3),
    st.integers(0, 40),
    st.integers(0, 50),
)
_MAX = 6


class Naive:
    """A whole prompt, when its prediction ends, and whether its rank has lost its cache since."""

    def __init__(self, rank: RankPages, pages: list[int], ends_at: float) -> None:
        self.rank = rank
        self.is_void = False
        self.marks = {
            tuple(pages[:mark]) for mark in (*MARKS, len(pages)) if 0 < mark <= len(pages)
        }
        self.ends_at = ends_at
        self.started = False


class PredictionsAndModel(RuleBasedStateMachine):
    """Predictions compared with a list of them."""

    added = Bundle("added")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.predictions = Predictions(grace_seconds=2.0, max_predictions=_MAX)
        self.model: list[Naive] = []
        self.made: list[Prediction] = []

    @rule(
        target=added,
        rank=_RANKS,
        pages=_PROMPTS,
        ends_in=st.none() | st.sampled_from([1.0, 5.0]),
    )
    def add(
        self, rank: RankPages, pages: list[int], ends_in: float | None
    ) -> tuple[Prediction, Naive]:
        ends_at = None if ends_in is None else self.now + ends_in
        naive = Naive(rank, pages, float("inf") if ends_at is None else ends_at)
        self.model = [one for one in self.model if not (one.rank is rank and one.is_void)]
        self.model = [*self.model, naive][-_MAX:]
        prediction = self.predictions.add(rank, prompt(pages), ends_at)
        self.made.append(prediction)
        return prediction, naive

    @rule(one=added)
    def start(self, one: tuple[Prediction, Naive]) -> None:
        prediction, naive = one
        prediction.started(self.now)
        if not naive.started:
            naive.started = True
            naive.ends_at = min(naive.ends_at, self.now + 2.0)

    @rule(one=added)
    def release(self, one: tuple[Prediction, Naive]) -> None:
        prediction, naive = one
        prediction.release()
        if not naive.started and naive in self.model:
            self.model.remove(naive)

    @rule(rank=_RANKS)
    def lose_the_cache(self, rank: RankPages) -> None:
        rank.generation += 1
        for one in self.model:
            one.is_void = one.is_void or one.rank is rank

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 5.0]), pages=_PROMPTS)
    def ask_later(self, seconds: float, pages: list[int]) -> None:
        self.now += seconds
        self.ask(pages)

    @rule(pages=_PROMPTS)
    def ask(self, pages: list[int]) -> None:
        self.model = [one for one in self.model if one.ends_at > self.now]
        expected: dict[RankPages, int] = {}
        for mark in sorted({len(pages), *MARKS}):
            prefix = tuple(pages[:mark])
            for one in self.model:
                if 0 < mark <= len(pages) and prefix in one.marks and not one.is_void:
                    expected[one.rank] = mark
        assert self.predictions.match(prompt(pages), self.now) == expected

    @invariant()
    def as_many_live(self) -> None:
        assert len(self.predictions) == len(self.model)
        assert set(self.predictions._seats) == {one.rank for one in self.model}

    def teardown(self) -> None:
        for prediction in self.made:
            prediction.release()
        self.predictions.match(prompt([1]), float("inf"))
        assert len(self.predictions) == 0
        assert is_empty(self.predictions)
        assert len(self.predictions._free_bits) <= 3


TestPredictionsAndModel = PredictionsAndModel.TestCase
TestPredictionsAndModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
