"""Tests policies that choose ranks by what they hold and by their load."""

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

from extproc.policies.base import KvPolicy, KvQuery, TierWeights
from extproc.policies.cache_aware_zmq import CacheAwareZmq
from extproc.policies.min_ttft import MinTtft

PAGE = 100
NOW = 50.0
# Enough draws to see each of three equals.
SEEDS = range(60)


class Load(Struct, frozen=True):
    """The load of a rank; speed in tokens per second."""

    waiting: int = 0
    decoding: int = 0
    ahead: float = 0.0
    speed: float = 8000.0
    slot_wait: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.speed

    def requests(self, now: float) -> int:
        assert now == NOW
        return self.waiting

    def running(self, now: float) -> int:
        assert now == NOW
        return self.decoding

    def prefill_tokens_ahead(self, now: float) -> float:
        assert now == NOW
        return self.ahead

    def slot_wait_seconds(self, prompt_tokens: int, now: float) -> float:
        assert now == NOW
        return self.slot_wait


class Rank(Struct, frozen=True):
    """A candidate; its `order` is its place in the list of ranks."""

    load: Load = Load()
    has_events: bool = True
    prompt_pages: int = 10
    held_pages: int = 0
    device_tokens: int = 0
    host_tokens: int = 0
    disk_tokens: int = 0
    predicted_pages: int = 0
    predicted_tokens: int = 0
    order: int = 0


def rank(
    requests: int = 0,
    *,
    held: int = 0,
    predicted: int = 0,
    of: int = 10,
    host: int = 0,
    disk: int = 0,
    events: bool = True,
) -> Rank:
    """A rank with that many requests that holds `held` of `of` pages, the last on lower tiers."""
    return Rank(
        Load(waiting=requests),
        has_events=events,
        prompt_pages=of if events else 0,
        held_pages=held,
        device_tokens=(held - host - disk) * PAGE,
        host_tokens=host * PAGE,
        disk_tokens=disk * PAGE,
        predicted_pages=predicted,
        predicted_tokens=predicted * PAGE,
    )


def numbered(candidates: Sequence[Rank]) -> list[Rank]:
    return [replace(one, order=order) for order, one in enumerate(candidates)]


def chosen(policy: KvPolicy, candidates: Sequence[Rank], query: KvQuery) -> tuple[int, str]:
    choice = policy.choose(numbered(candidates), query)
    return choice.candidate.order, choice.reason


def query(tokens: int = 1000, expected: int = 0) -> KvQuery:
    return KvQuery(NOW, tokens, expected)


# -- cache_aware_zmq


def zmq(candidates: Sequence[Rank], tokens: int = 1000) -> tuple[int, str]:
    return chosen(CacheAwareZmq(Random(0)), candidates, query(tokens))


def zmq_draws(candidates: Sequence[Rank], tokens: int = 1000) -> set[tuple[int, str]]:
    return {chosen(CacheAwareZmq(Random(seed)), candidates, query(tokens)) for seed in SEEDS}


@pytest.mark.parametrize(
    ("lowest", "highest", "imbalanced"),
    [
        # The difference must be above 32, and the highest above floor(1.1 * lowest); with a
        # lowest below 321 the first rule is the stricter one.
        (0, 32, False),  # 32 - 0 = 32, not above 32
        (0, 33, True),  # 33 > 32; 33 > floor(0) = 0
        (100, 132, False),  # 32
        (100, 133, True),  # 33; 133 > floor(110.0) = 110
        # From here on the second rule is the stricter one.
        (400, 433, False),  # 33 > 32, but 433 <= floor(440.0) = 440
        (400, 440, False),  # 440 is not above 440
        (400, 441, True),
        (405, 445, False),  # floor(445.5) = 445
        (405, 446, True),  # 446 > 445: rounded down, not up
        (1000, 1100, False),
        (1000, 1101, True),
    ],
)
def test_imbalance_needs_more_than_both_thresholds(
    lowest: int, highest: int, imbalanced: bool
) -> None:
    # The rank that holds the prompt is the busiest: only an imbalance keeps the request away.
    expected = (1, "imbalance") if imbalanced else (0, "hit")
    assert zmq([rank(highest, held=10), rank(lowest)]) == expected


def test_imbalance_comes_before_everything_else() -> None:
    assert zmq([rank(33, held=10), rank(0)], tokens=0) == (1, "imbalance")
    assert zmq([rank(33, events=False), rank(0, events=False)]) == (1, "imbalance")
    assert zmq([rank(33, of=0), rank(0, of=0)]) == (1, "imbalance")
    assert zmq([rank(33), rank(0, predicted=10)]) == (1, "imbalance")


def test_imbalance_compares_the_extremes_and_draws_among_the_least_loaded() -> None:
    assert zmq_draws([rank(40, held=10), rank(7), rank(20, held=10), rank(7)]) == {
        (1, "imbalance"),
        (3, "imbalance"),
    }


def test_the_thresholds_can_be_set() -> None:
    candidates = [rank(3, held=3), rank(1)]
    # 3 - 1 = 2 > 1; 3 > floor(1 * 2.0) = 2
    policy = CacheAwareZmq(Random(0), balance_abs_threshold=1, balance_rel_threshold=2.0)
    assert chosen(policy, candidates, query()) == (1, "imbalance")
    # 3 > floor(1 * 3.5) = 3 does not hold; 3 / 10 is not above 0.5
    policy = CacheAwareZmq(Random(0), balance_abs_threshold=1, balance_rel_threshold=3.5)
    assert chosen(policy, candidates, query()) == (1, "below_threshold")
    # 3 / 10 > 0.25
    policy = CacheAwareZmq(Random(0), cache_threshold=0.25)
    assert chosen(policy, candidates, query()) == (0, "hit")
    # A threshold of 0 needs one page.
    policy = CacheAwareZmq(Random(0), cache_threshold=0.0)
    assert chosen(policy, [rank(3, held=1), rank(1)], query()) == (0, "hit")
    assert chosen(policy, [rank(3), rank(1)], query()) == (1, "below_threshold")


def test_without_tokens_only_load_decides() -> None:
    assert zmq([rank(2), rank(1), rank(2)], tokens=0) == (1, "no_tokens")
    # Without tokens no overlap is known, and the reason is not that there are no events.
    assert zmq([rank(2, events=False), rank(1, events=False)], tokens=0) == (1, "no_tokens")


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        ([rank(2, events=False), rank(1, events=False)], "no_events"),
        ([rank(2, of=0), rank(1, of=0)], "short_prompt"),
        ([rank(2, of=0), rank(1, events=False)], "short_prompt"),
        # With pages of another size the prompt has a whole page.
        ([rank(2, of=0), rank(1, of=1)], "below_threshold"),
        ([rank(2, of=1), rank(1, events=False)], "below_threshold"),
    ],
)
def test_no_rank_is_preferred_without_events_or_whole_pages(
    candidates: list[Rank], reason: str
) -> None:
    assert zmq(candidates) == (1, reason)


@pytest.mark.parametrize(
    ("held", "of", "is_hit"),
    [
        (5, 10, False),  # 5/10 = 0.5 is not above 0.5
        (6, 10, True),
        (1, 2, False),
        (2, 3, True),  # 0.67
        (1, 1, True),
        (50, 101, False),  # 0.495
        (51, 101, True),  # 0.505
    ],
)
def test_a_hit_needs_more_than_the_threshold_of_whole_pages(
    held: int, of: int, is_hit: bool
) -> None:
    expected = (0, "hit") if is_hit else (1, "below_threshold")
    # Whole pages, and most of another page, which does not count.
    assert zmq([rank(9, held=held, of=of), rank(0, of=of)], of * PAGE + 99) == expected


def test_a_trailing_partial_page_is_not_in_the_ratio() -> None:
    # 199 tokens are one whole page and 99 tokens: 1/1 is held, where 1/2 would be too little.
    assert zmq([rank(1, held=1, of=1), rank(0, of=1)], 199) == (0, "hit")


def test_the_rank_that_holds_most_is_preferred_to_the_least_loaded() -> None:
    assert zmq([rank(0, held=7), rank(30, held=9), rank(0, held=8)]) == (1, "hit")


def test_the_overlap_is_taken_per_candidate() -> None:
    # The deepest rank is not a candidate, or is below the threshold in its own page size.
    assert zmq([rank(3, held=6), rank(0)]) == (0, "hit")
    # 1 of 4 large pages is 400 tokens but no hit; 6 of 10 small ones are.
    large = Rank(Load(waiting=0), prompt_pages=4, held_pages=1, device_tokens=700)
    assert zmq([large, rank(5, held=6)]) == (1, "hit")


def test_an_untrusted_rank_does_not_hide_a_rank_that_holds_the_prompt() -> None:
    assert zmq([rank(0, events=False), rank(5, held=6), rank(0, events=False)]) == (1, "hit")


def test_of_the_ranks_that_hold_most_the_least_loaded_is_taken() -> None:
    assert zmq([rank(3, held=9), rank(2, held=9), rank(4, held=9), rank(0, held=6)]) == (1, "hit")


def test_of_equals_one_is_drawn() -> None:
    candidates = [rank(2, held=9), rank(2, held=9), rank(3, held=9), rank(2, held=9)]
    assert zmq_draws(candidates) == {(0, "hit"), (1, "hit"), (3, "hit")}
    # The first of the equals comes after a rank that is less loaded, or holds less.
    candidates = [rank(5, held=9), rank(0, held=6), rank(2, held=9), rank(2, held=9)]
    assert zmq_draws(candidates) == {(2, "hit"), (3, "hit")}
    assert zmq_draws([rank(1), rank(0), rank(0)]) == {
        (1, "below_threshold"),
        (2, "below_threshold"),
    }
    assert zmq_draws([rank(), rank(), rank()], tokens=0) == {
        (order, "no_tokens") for order in range(3)
    }


def test_the_last_page_of_a_prompt_held_in_full_gains_nothing() -> None:
    # 10 whole pages, of which 9 spare prefill: a rank with 9 is as good as one with all.
    full = Rank(Load(waiting=2), held_pages=10, device_tokens=900)
    assert zmq([full, rank(1, held=9)]) == (1, "hit")


def test_pages_on_lower_tiers_are_worth_less() -> None:
    # 8 pages of which 4 on the host: 400 + 400 * 0.8 = 720 > 700 of 7 on the device.
    assert zmq([rank(0, held=7), rank(9, held=8, host=4)]) == (1, "hit")
    # 8 on the host: 640 < 700.
    assert zmq([rank(9, held=7), rank(0, held=8, host=8)]) == (0, "hit")
    # 10 of which 4 on disk: 600 + 200 = 800; 10 of which 5 on the host: 500 + 400 = 900.
    assert zmq([rank(0, held=10, disk=4), rank(9, held=10, host=5)]) == (1, "hit")
    # The ratio is that of pages: 6 of 10 are held, worth 300 tokens.
    assert zmq([rank(9, held=6, disk=6), rank(0)]) == (0, "hit")
    # 8 pages all on disk at the weight of 1 are more than 7 on the device.
    policy = CacheAwareZmq(Random(0), weights=TierWeights(disk=1.0))
    assert chosen(policy, [rank(0, held=7), rank(9, held=8, disk=8)], query()) == (1, "hit")


def test_a_predicted_rank_is_taken_when_no_rank_holds_enough() -> None:
    assert zmq([rank(0, held=5), rank(2, predicted=6), rank(0)]) == (1, "predicted")
    # 5 of 10 are not above the threshold here either.
    assert zmq([rank(0), rank(2, predicted=5)]) == (0, "below_threshold")


def test_a_rank_that_holds_enough_is_preferred_to_a_predicted_one() -> None:
    assert zmq([rank(9, held=6), rank(0, predicted=10)]) == (0, "hit")


@pytest.mark.parametrize(("more", "reason"), [(4, "predicted"), (5, "below_threshold")])
def test_a_busy_predicted_rank_is_not_taken(more: int, reason: str) -> None:
    expected = 1 if reason == "predicted" else 0
    assert zmq([rank(3), rank(3 + more, predicted=10)]) == (expected, reason)


def test_of_predicted_ranks_the_deepest_then_the_least_loaded_is_taken() -> None:
    assert zmq([rank(), rank(2, predicted=9), rank(4, predicted=10)]) == (2, "predicted")
    assert zmq([rank(), rank(2, predicted=9), rank(1, predicted=9)]) == (2, "predicted")
    # The deepest rank is too busy.
    assert zmq([rank(), rank(5, predicted=10), rank(1, predicted=8)]) == (2, "predicted")
    equals = [rank(), rank(1, predicted=9), rank(1, predicted=9), rank(2, predicted=9)]
    assert zmq_draws(equals) == {(1, "predicted"), (2, "predicted")}


# -- min_ttft
#
# Costs in the comments: wait + work * (1 + min(0.5 + 2 * shortest wait of all, 100)), in seconds,
# at 8000 tokens a second; ranks within 5 % of the lowest, or 5 ms, are drawn from.


def ttft(candidates: Sequence[Rank], tokens: int = 16_000, expected: int = 0) -> tuple[int, str]:
    """The choice, asserting that it was not drawn."""
    (only,) = ttft_draws(candidates, tokens, expected)
    return only


def ttft_draws(
    candidates: Sequence[Rank], tokens: int = 16_000, expected: int = 0
) -> set[tuple[int, str]]:
    return {chosen(MinTtft(Random(seed)), candidates, query(tokens, expected)) for seed in SEEDS}


def queue(tokens: int, *, device: int = 0, predicted: int = 0, **load: float) -> Rank:
    """A rank with that many tokens to prefill, which may hold a part of the prompt."""
    return Rank(
        Load(ahead=tokens, **load),  # type: ignore[arg-type]
        prompt_pages=160,
        held_pages=device // PAGE,
        device_tokens=device,
        predicted_pages=predicted // PAGE,
        predicted_tokens=predicted,
    )


def test_a_queue_is_worth_waiting_in_only_for_a_prefix_that_takes_longer_to_compute() -> None:
    idle = queue(0)  # all 16000 tokens: 0 + 2.0 * 1.5 = 3.0
    # 2.0 + 0.5 * 1.5 = 2.75, and idle is more than 5 % above.
    assert ttft([queue(16_000, device=12_000), idle]) == (0, "hit")
    # 2.5 + 0.5 * 1.5 = 3.25, more than 5 % above 3.0.
    assert ttft([queue(20_000, device=12_000), idle]) == (1, "spread")
    # A prefix of 1600 tokens saves 0.2 * 1.5 = 0.3: a queue of 0.1 s is worth it, one of 0.5 s not.
    # 0.1 + 1.8 * 1.5 = 2.8; 0.5 + 1.8 * 1.5 = 3.2
    assert ttft([queue(800, device=1600), idle]) == (0, "hit")
    assert ttft([queue(4000, device=1600), idle]) == (1, "spread")


def test_hit_means_that_no_rank_holds_more() -> None:
    # (16000 - 12000) / 8000 * 1.5 = 0.75 and (16000 - 4000) / 8000 * 1.5 = 2.25
    assert ttft([queue(0, device=4000), queue(0, device=12_000)]) == (1, "hit")
    # 3.0 + 0.75 = 3.75 against 2.25, which holds something, but not most.
    assert ttft([queue(0, device=4000), queue(24_000, device=12_000)]) == (0, "spread")


def test_work_counts_more_the_longer_the_shortest_queue_is() -> None:
    # Beside an idle rank, 2.5 s more of queue were not worth it. Here all ranks have 2 s:
    # weight 1 + 0.5 + 2 * 2 = 5.5; 4.5 + 0.5 * 5.5 = 7.25 against 2.0 + 2.0 * 5.5 = 13.0.
    assert ttft([queue(36_000, device=12_000), queue(16_000)]) == (0, "hit")
    # 11.5 + 0.5 * 5.5 = 14.25: not worth it here either.
    assert ttft([queue(92_000, device=12_000), queue(16_000)]) == (1, "spread")


def test_the_weight_of_work_has_a_limit() -> None:
    # All wait 60 s: 0.5 + 2 * 60 = 120.5, but not more than 100, so that the weight is 101.
    behind = queue(480_000)  # 60 + 2.0 * 101 = 262
    # 180 + 0.5 * 101 = 230.5
    assert ttft([queue(1_440_000, device=12_000), behind]) == (0, "hit")
    # 226 + 0.5 * 101 = 276.5; with a weight of 121.5 it had been 286.75 against 303.
    assert ttft([queue(1_808_000, device=12_000), behind]) == (1, "spread")


def test_a_prompt_that_no_rank_holds_goes_to_the_shortest_queue() -> None:
    # 3.0 + 0.5 against 3.0
    assert ttft([queue(4000), queue(0)]) == (1, "miss")


def test_a_predicted_prefix_spares_work_like_a_held_one() -> None:
    assert ttft([queue(0), queue(8000, predicted=12_000)]) == (1, "predicted")
    # It will hold more soon.
    assert ttft([queue(0), queue(0, device=2000, predicted=12_000)]) == (1, "predicted")
    # It already holds as much.
    assert ttft([queue(0), queue(0, device=12_000, predicted=12_000)]) == (1, "hit")
    # 2.5 + 0.5 * 1.5 = 3.25 against 3.0: the queue is too long, and no rank holds any page.
    assert ttft([queue(0), queue(20_000, predicted=12_000)]) == (0, "miss")
    # The rank that holds the prompt equals the predicted one, except for a queue.
    assert ttft([queue(0, device=12_000), queue(8000, predicted=12_000)]) == (0, "hit")


def test_a_prompt_on_a_lower_tier_is_worth_less() -> None:
    # Spared: 8000 * 0.8 = 6400 on the host, 8000 * 0.5 = 4000 on disk, 5000 on the device.
    # Left: (16000 - s) / 8000 * 1.5 = 1.8, 2.25, 2.0625
    host = Rank(prompt_pages=160, held_pages=80, host_tokens=8000)
    disk = Rank(prompt_pages=160, held_pages=80, disk_tokens=8000)
    assert ttft([disk, host, queue(0, device=5000)]) == (1, "hit")
    assert ttft([disk, queue(0, device=5000)]) == (1, "hit")
    policy = MinTtft(Random(0), weights=TierWeights(disk=1.0))
    assert chosen(policy, [disk, queue(0, device=5000)], query(16_000)) == (0, "hit")
    # On disk, 8000 tokens are worth 4000, which is less than the 8000 that are predicted.
    both = Rank(prompt_pages=160, held_pages=80, disk_tokens=8000, predicted_tokens=8000)
    assert ttft([queue(0, device=5000), both]) == (1, "predicted")


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        ([Rank(Load(ahead=8000), has_events=False), Rank(has_events=False)], "no_events"),
        ([Rank(Load(ahead=8000), prompt_pages=0), Rank(prompt_pages=0)], "short_prompt"),
        ([Rank(Load(ahead=8000), prompt_pages=0), Rank(has_events=False)], "short_prompt"),
        ([Rank(Load(ahead=8000), prompt_pages=1), Rank(has_events=False)], "miss"),
        ([Rank(Load(ahead=8000), prompt_pages=0), Rank(prompt_pages=1)], "miss"),
    ],
)
def test_the_reason_says_why_no_rank_holds_any_of_the_prompt(
    candidates: list[Rank], reason: str
) -> None:
    # 1000 tokens take 0.125 s; a second of queue decides.
    assert ttft(candidates, 1000) == (1, reason)


def test_without_tokens_the_expected_number_is_used() -> None:
    slow, fast = queue(0, speed=1000.0), queue(4000)
    # 8000 expected: 8.0 * 1.5 = 12.0 against 0.5 + 1.0 * 1.5 = 2.0
    assert ttft([slow, fast], 0, 8000) == (1, "no_tokens")
    # 100: 0.1 * 1.5 = 0.15 against 0.5 + 0.0125 * 1.5 = 0.519
    assert ttft([slow, fast], 0, 100) == (0, "no_tokens")
    # Without an estimate the prompt counts as one token, so only the wait decides.
    assert ttft([slow, fast], 0) == (0, "no_tokens")


def test_the_exact_number_of_tokens_is_preferred_to_the_estimate() -> None:
    slow, fast = queue(0, speed=1000.0), queue(4000)
    assert ttft([slow, fast], 100, 8000) == (0, "miss")


def test_a_slow_rank_is_taken_when_the_fast_one_has_more_to_do() -> None:
    slow, fast = queue(0, speed=4000.0), 16_000.0
    # slow: 4.0 * 1.5 = 6.0; fast: ahead / 16000 + 1.0 * 1.5
    assert ttft([slow, queue(64_000, speed=fast)]) == (1, "miss")  # 4 + 1.5 = 5.5
    assert ttft([slow, queue(96_000, speed=fast)]) == (0, "miss")  # 6 + 1.5 = 7.5
    # Equal queues in tokens are not equal in time; weight 1.5 + 2 * 0.5 = 2.5:
    # 2.0 + 4.0 * 2.5 = 12.0 against 0.5 + 1.0 * 2.5 = 3.0
    assert ttft([queue(8000, speed=4000.0), queue(8000, speed=fast)]) == (1, "miss")


def test_the_wait_for_a_slot_in_the_running_batch_counts() -> None:
    # Nothing to prefill, and 3 s until a request ends: 3.0 + 0.75 against 3.0
    assert ttft([queue(0, device=12_000, slot_wait=3.0), queue(0)]) == (1, "spread")
    # The queue shrinks while it waits for a slot: the longer wait counts, 2.0 + 0.75.
    assert ttft([queue(16_000, device=12_000, slot_wait=1.5), queue(0)]) == (0, "hit")


def test_decoding_requests_slow_a_rank_down_a_little() -> None:
    # 80 tokens: 0.01 * 1.5 = 0.015; 20 decoding requests add 0.02 s, which is more than 5 ms.
    assert ttft([queue(0, decoding=20), queue(0)], 80) == (1, "miss")
    # 4 decoding requests add 0.004 s, within 5 ms.
    assert ttft_draws([queue(0, decoding=4), queue(0)], 80) == {(0, "miss"), (1, "miss")}


def test_of_nearly_equal_ranks_one_is_drawn() -> None:
    # 3.0; 0.1 more is within 5 % (3.15), 0.2 is not.
    assert ttft_draws([queue(0), queue(800), queue(1600)]) == {(0, "miss"), (1, "miss")}
    # Of a short prompt 5 ms are more than 5 %: 80 tokens, 0.015, to 0.020.
    # 32 tokens ahead are 0.004, 48 are 0.006.
    assert ttft_draws([queue(0), queue(32), queue(48)], 80) == {(0, "miss"), (1, "miss")}
    # Each rank drawn has a reason of its own: 0.1 of queue and 800 tokens of prefix fewer to do.
    # 0.1 + 1.9 * 1.5 = 2.95 against 3.0
    assert ttft_draws([queue(0), queue(800, device=800)]) == {(0, "spread"), (1, "hit")}


def test_at_least_one_token_is_computed() -> None:
    # More is predicted than the prompt has: the work is never negative.
    over = queue(0, predicted=1000)
    assert ttft_draws([over, queue(0, device=500)], 500) == {(0, "predicted"), (1, "hit")}


# -- both policies

_RANKS = st.builds(
    Rank,
    st.builds(
        Load,
        st.integers(0, 60),
        st.integers(0, 60),
        st.floats(0, 1e6),
        st.floats(50.0, 2e6),
        st.floats(0, 1e3),
    ),
    st.booleans(),
    st.just(10),
    st.integers(0, 10),
    st.integers(0, 1000),
    st.integers(0, 1000),
    st.integers(0, 1000),
    st.integers(0, 10),
    st.integers(0, 1000),
)
_REASONS = {
    "cache_aware_zmq": {
        "imbalance",
        "no_tokens",
        "no_events",
        "short_prompt",
        "hit",
        "predicted",
        "below_threshold",
    },
    "min_ttft": {
        "hit",
        "spread",
        "miss",
        "predicted",
        "no_tokens",
        "no_events",
        "short_prompt",
    },
}


@pytest.mark.parametrize("kind", [CacheAwareZmq, MinTtft])
@given(
    candidates=st.lists(_RANKS, min_size=1, max_size=6),
    tokens=st.integers(0, 2000),
    seed=st.integers(0, 9),
)
def test_the_choice_is_a_candidate_with_a_known_reason_and_follows_the_seed(
    kind: type[CacheAwareZmq | MinTtft], candidates: list[Rank], tokens: int, seed: int
) -> None:
    order, reason = chosen(kind(Random(seed)), candidates, query(tokens))
    assert 0 <= order < len(candidates)
    assert reason in _REASONS[kind.name]
    assert chosen(kind(Random(seed)), candidates, query(tokens)) == (order, reason)
