"""From tokens to a rank: which tokens count as held, what is booked and what is predicted."""

from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from msgspec import Struct

from extproc.engines.engine import DEFAULT_ENGINE, engine_named
from extproc.kv.index import PrefixIndex, Tier
from extproc.kv.prefix_hash import PrefixHasher, TokenIds
from extproc.kv.rank_pages import RankPages
from extproc.policies.base import Choice, KvCandidate, KvCandidateT, KvPolicy, KvQuery
from extproc.policies.cache_aware_zmq import CacheAwareZmq
from extproc.policies.min_ttft import MinTtft
from extproc.routing.placement import EngineTokens, Placed, Placement, PromptTokens
from extproc.routing.predictions import GRACE_SECONDS
from extproc.routing.rank import Rank
from extproc.workers.rank_load import RankLoad
from tests.builders import make_worker

PAGE = 16
NOW = 100.0
SPEED = 1000.0


def some_tokens(count: int, start: int = 1) -> TokenIds:
    return np.arange(start, start + count, dtype=np.uint64)


class Noting:
    """A policy that takes the candidate that the test names, and records what it sees."""

    name = "noting"

    def __init__(self) -> None:
        self.takes = 0
        self.seen: Sequence[KvCandidate] = ()
        self.query = KvQuery(0.0)

    def choose(self, candidates: Sequence[KvCandidateT], query: KvQuery) -> Choice[KvCandidateT]:
        self.seen, self.query = candidates, query
        return Choice(candidates[self.takes], "noted")


class Fleet(Struct, kw_only=True):
    """Ranks of one model; the test says which pages they hold."""

    policy: Noting
    index: PrefixIndex
    placement: Placement
    ranks: list[Rank]

    def hold(
        self, number: int, tokens: TokenIds, *, tier: Tier = 0, skip: int = 0, seed: int = 0
    ) -> None:
        """The rank has the whole pages of these tokens, from page `skip` on stored on `tier`."""
        rank_pages = self.ranks[number].pages
        assert rank_pages is not None
        size = rank_pages.page_size
        units = tokens
        if rank_pages.bigram:
            units = tokens[:-1] | tokens[1:] << np.uint64(32)
        pages = len(units) // size
        ids = [hash((seed, tokens[0], page)) for page in range(pages)]
        self.index.store(
            rank_pages,
            ids[skip:],
            ids[skip - 1] if skip else None,
            units[skip * size : pages * size],
            size,
            tier,
            seed,
        )

    def clear(self, number: int) -> None:
        """The engine has cleared its cache."""
        rank_pages = self.ranks[number].pages
        assert rank_pages is not None
        self.index.clear(rank_pages)

    def place(
        self,
        tokens: TokenIds | None,
        *,
        takes: int = 0,
        now: float = NOW,
        seed: int = 0,
        expected_tokens: int = 0,
    ) -> Placed:
        self.policy.takes = takes
        return self.placement.place(self.ranks, prompt(tokens, seed, expected_tokens), now)

    def predicted(self, tokens: TokenIds, now: float = NOW, seed: int = 0) -> list[int]:
        """Pages each rank is expected to have of it."""
        self.place(tokens, now=now, seed=seed)
        return [candidate.predicted_pages for candidate in self.policy.seen]


def prompt(tokens: TokenIds | None, seed: int = 0, guess: int = 0) -> PromptTokens:
    if tokens is None:
        return PromptTokens({}, guess)
    return PromptTokens({DEFAULT_ENGINE: EngineTokens(tokens, seed)}, guess)


def trusted_pages(index: PrefixIndex, order: int, size: int, *, bigram: bool) -> RankPages:
    pages = index.add(str(order), size, bigram=bigram)
    pages.trusted = True
    return pages


def make_fleet(*pages: int | None, bigram: bool = False, policy: KvPolicy | None = None) -> Fleet:
    """A rank for each page size; None = its KV events are not followed."""
    index, noting = PrefixIndex(PrefixHasher(secret=1), 100_000), Noting()
    placement = Placement(policy or noting, index, prefill_tokens_per_second=SPEED)
    ranks = [
        Rank(
            make_worker(f"http://10.0.0.{order + 1}:8000", order=order),
            0,
            order=order,
            load=RankLoad(placement.model_speed),
            pages=None if size is None else trusted_pages(index, order, size, bigram=bigram),
        )
        for order, size in enumerate(pages)
    ]
    return Fleet(policy=noting, index=index, placement=placement, ranks=ranks)


# -- what is held


@pytest.mark.parametrize(
    ("total", "held", "cached"),
    [
        # Pages of 16 tokens; the last token is always computed, and whole pages are reused.
        (100, 0, 0),
        (100, 15, 0),
        (100, 16, 16),
        (100, 100, 96),  # 6 whole pages
        (97, 97, 96),  # the last token is beyond the sixth page
        (96, 96, 80),  # it is the last of the sixth
        (95, 95, 80),
        (96, 500, 80),
        (17, 17, 16),
        (16, 16, 0),
        (1, 500, 0),
    ],
)
def test_cached_tokens_are_those_that_spare_prefill(total: int, held: int, cached: int) -> None:
    fleet = make_fleet(PAGE)
    if held:
        fleet.hold(0, some_tokens(held))
    placed = fleet.place(some_tokens(total))
    assert placed.cached_tokens == cached
    assert placed.total_tokens == total
    assert placed.prefill_tokens == total - cached
    assert placed.reason == "noted"
    (seen,) = fleet.policy.seen
    assert seen.has_events
    assert seen.prompt_pages == total // PAGE
    assert seen.held_pages == min(held, total) // PAGE
    assert (seen.device_tokens, seen.host_tokens, seen.disk_tokens) == (cached, 0, 0)


def test_the_result_is_about_the_chosen_rank() -> None:
    fleet = make_fleet(PAGE, PAGE, None)
    fleet.hold(1, some_tokens(100))
    for takes, cached in ((0, 0), (1, 96), (2, 0)):
        placed = fleet.place(some_tokens(100), takes=takes)
        assert placed.rank is fleet.ranks[takes]
        assert (placed.cached_tokens, placed.prefill_tokens) == (cached, 100 - cached)


def test_only_a_common_prefix_counts() -> None:
    fleet = make_fleet(PAGE)
    fleet.hold(0, some_tokens(100))
    tokens = some_tokens(100)
    tokens[40] = 9999  # in the third page
    assert fleet.place(tokens).cached_tokens == 32


def test_ranks_with_different_page_sizes_are_compared() -> None:
    fleet = make_fleet(16, 64, 1, 128)
    for number in range(4):
        fleet.hold(number, some_tokens(150))
    fleet.place(some_tokens(129))
    # 8 pages of 16 up to 128; 2 of 64; 129 of 1, of which the last is computed; 1 of 128.
    assert [(one.prompt_pages, one.held_pages) for one in fleet.policy.seen] == [
        (8, 8),
        (2, 2),
        (129, 129),
        (1, 1),
    ]
    assert [one.device_tokens for one in fleet.policy.seen] == [128, 128, 128, 128]
    # One token less: the last token is in the last page of 16, 64 and 128.
    fleet.place(some_tokens(128))
    assert [one.device_tokens for one in fleet.policy.seen] == [112, 64, 127, 0]


def test_pages_of_pairs_of_tokens() -> None:
    fleet = make_fleet(4, bigram=True)
    fleet.hold(0, some_tokens(30))
    # 9 tokens are 8 pairs: 2 pages, and the last token is beyond them.
    placed = fleet.place(some_tokens(9))
    assert fleet.policy.seen[0].prompt_pages == 2
    assert (placed.cached_tokens, placed.prefill_tokens) == (8, 1)
    # 8 tokens are 7 pairs: one page.
    placed = fleet.place(some_tokens(8))
    assert fleet.policy.seen[0].prompt_pages == 1
    assert (placed.cached_tokens, placed.prefill_tokens) == (4, 4)
    # No pair at all.
    placed = fleet.place(some_tokens(1))
    assert fleet.policy.seen[0].prompt_pages == 0
    assert (placed.cached_tokens, placed.prefill_tokens) == (0, 1)


def test_tokens_of_the_tiers_add_up_to_the_tokens_held() -> None:
    fleet = make_fleet(PAGE)
    fleet.hold(0, some_tokens(100))
    rank_pages = fleet.ranks[0].pages
    assert rank_pages is not None
    ids = [hash((0, some_tokens(1)[0], page)) for page in range(6)]
    # Pages 0 and 1 stay on the device, 2 and 3 are on the host, 4 and 5 below.
    fleet.hold(0, some_tokens(64), tier=1, skip=2)
    fleet.hold(0, some_tokens(96), tier=2, skip=4)
    fleet.index.remove(rank_pages, ids[2:], 0)
    placed = fleet.place(some_tokens(100))
    (seen,) = fleet.policy.seen
    assert (seen.device_tokens, seen.host_tokens, seen.disk_tokens) == (32, 32, 32)
    assert (placed.cached_tokens, placed.prefill_tokens) == (96, 4)
    # The last page spares nothing, wherever it lies: 80 of 96.
    placed = fleet.place(some_tokens(96))
    (seen,) = fleet.policy.seen
    assert (seen.device_tokens, seen.host_tokens, seen.disk_tokens) == (32, 32, 16)
    assert placed.cached_tokens == 80
    placed = fleet.place(some_tokens(64))
    (seen,) = fleet.policy.seen
    assert (seen.device_tokens, seen.host_tokens, seen.disk_tokens) == (32, 16, 0)
    assert placed.cached_tokens == 48
    placed = fleet.place(some_tokens(32))
    (seen,) = fleet.policy.seen
    assert (seen.device_tokens, seen.host_tokens, seen.disk_tokens) == (16, 0, 0)
    assert seen.held_pages == 2


def test_namespaces_do_not_share_pages() -> None:
    fleet = make_fleet(PAGE)
    salted = fleet.index.hasher.seed("salt")
    fleet.hold(0, some_tokens(100))
    assert fleet.place(some_tokens(100), seed=salted).cached_tokens == 0
    fleet.hold(0, some_tokens(50), seed=salted)
    assert fleet.place(some_tokens(100), seed=salted).cached_tokens == 48
    assert fleet.place(some_tokens(100)).cached_tokens == 96


# -- what is unknown


@pytest.mark.parametrize("followed", [True, False])
def test_a_rank_that_is_not_trusted_counts_as_holding_nothing(followed: bool) -> None:
    fleet = make_fleet(PAGE if followed else None, PAGE)
    if (pages := fleet.ranks[0].pages) is not None:
        fleet.hold(0, some_tokens(100))
        pages.trusted = False
    fleet.hold(1, some_tokens(100))
    fleet.place(some_tokens(100)).book(NOW)
    placed = fleet.place(some_tokens(100))
    untrusted, trusted = fleet.policy.seen
    assert not untrusted.has_events
    assert (untrusted.prompt_pages, untrusted.held_pages, untrusted.predicted_pages) == (0, 0, 0)
    assert trusted.held_pages == 6
    assert (placed.cached_tokens, placed.prefill_tokens) == (0, 100)
    assert placed.total_tokens == 100  # what the prompt has is known all the same


def test_trust_may_come_and_go() -> None:
    fleet = make_fleet(PAGE)
    fleet.hold(0, some_tokens(100))
    pages = fleet.ranks[0].pages
    assert pages is not None
    pages.trusted = False
    assert fleet.place(some_tokens(100)).cached_tokens == 0
    assert not fleet.policy.seen[0].has_events
    pages.trusted = True
    assert fleet.place(some_tokens(100)).cached_tokens == 96


@pytest.mark.parametrize("tokens", [None, some_tokens(0)])
def test_without_tokens_nothing_is_looked_up(tokens: TokenIds | None) -> None:
    fleet = make_fleet(PAGE)
    fleet.hold(0, some_tokens(100))
    placed = fleet.place(tokens, expected_tokens=700)
    assert (placed.cached_tokens, placed.total_tokens, placed.prefill_tokens) == (0, 0, 700)
    assert (fleet.policy.query.prompt_tokens, fleet.policy.query.expected_tokens) == (0, 700)
    assert not fleet.policy.seen[0].has_events
    booking = placed.book(NOW)
    assert fleet.ranks[0].load.prefill_tokens_ahead(NOW) == 700
    assert fleet.predicted(some_tokens(100)) == [0]
    booking.release(NOW)
    assert fleet.place(tokens).prefill_tokens == 1  # not even a guess


def test_the_exact_number_of_tokens_is_preferred_to_a_guess() -> None:
    fleet = make_fleet(PAGE)
    assert fleet.place(some_tokens(100), expected_tokens=700).prefill_tokens == 100


def test_the_policy_sees_the_time_and_the_number_of_tokens() -> None:
    fleet = make_fleet(PAGE)
    fleet.place(some_tokens(100), now=7.0, expected_tokens=9)
    assert fleet.policy.query == KvQuery(7.0, 100, 9)
    (seen,) = fleet.policy.seen
    assert (seen.order, seen.load) == (0, fleet.ranks[0].load)


def test_ranks_begin_with_the_speed_that_is_assumed_of_their_model() -> None:
    assert make_fleet(PAGE).ranks[0].load.prefill_tokens_per_second == SPEED


# -- what is booked and predicted


def test_placing_a_prompt_books_nothing() -> None:
    fleet = make_fleet(PAGE)
    fleet.place(some_tokens(100))
    assert fleet.predicted(some_tokens(100)) == [0]
    assert fleet.ranks[0].load.in_flight == 0


def test_predicted_pages_spare_prefill_but_are_not_reported_as_held() -> None:
    fleet = make_fleet(PAGE, PAGE)
    fleet.place(some_tokens(100), takes=1).book(NOW)
    placed = fleet.place(some_tokens(100), takes=1)
    assert [one.predicted_pages for one in fleet.policy.seen] == [0, 6]
    assert [one.predicted_tokens for one in fleet.policy.seen] == [0, 96]
    assert (placed.cached_tokens, placed.predicted_tokens, placed.prefill_tokens) == (0, 96, 4)
    # Nothing is predicted for the other rank.
    placed = fleet.place(some_tokens(100))
    assert (placed.cached_tokens, placed.predicted_tokens, placed.prefill_tokens) == (0, 0, 100)
    # The last page of a prediction spares nothing either: 80 of 96.
    assert fleet.place(some_tokens(96), takes=1).prefill_tokens == 16


def test_the_larger_of_held_and_predicted_is_spared() -> None:
    fleet = make_fleet(PAGE)
    fleet.place(some_tokens(64)).book(NOW)
    fleet.hold(0, some_tokens(32))
    placed = fleet.place(some_tokens(100))
    assert (placed.cached_tokens, placed.prefill_tokens) == (32, 36)  # 100 - 64
    fleet.hold(0, some_tokens(80), skip=2)
    placed = fleet.place(some_tokens(100))
    assert (placed.cached_tokens, placed.prefill_tokens) == (80, 20)


def test_nothing_is_predicted_for_a_prompt_that_is_held_already() -> None:
    fleet = make_fleet(PAGE)
    fleet.hold(0, some_tokens(100))
    fleet.place(some_tokens(100)).book(NOW)
    assert fleet.predicted(some_tokens(100)) == [0]
    assert fleet.ranks[0].load.prefill_tokens_ahead(NOW) == 4
    # One page more is not held.
    fleet.place(some_tokens(112)).book(NOW)
    assert fleet.predicted(some_tokens(112)) == [7]


def test_a_prompt_that_the_engine_computes_whole_finds_nothing_and_leaves_its_pages() -> None:
    fleet = make_fleet(PAGE)
    fleet.hold(0, some_tokens(100))
    computed = EngineTokens(some_tokens(200), 0, reads_cache=False)
    placed = fleet.placement.place(fleet.ranks, PromptTokens({DEFAULT_ENGINE: computed}), NOW)
    assert (placed.cached_tokens, placed.total_tokens, placed.prefill_tokens) == (0, 200, 200)
    placed.book(NOW).started(NOW)
    assert fleet.predicted(some_tokens(200)) == [200 // PAGE]


def test_each_rank_is_compared_with_the_tokens_of_its_engine() -> None:
    fleet = make_fleet(PAGE, PAGE)
    fleet.ranks[1].engine = engine_named("vllm")
    fleet.hold(0, some_tokens(100))
    fleet.hold(1, some_tokens(100)[::-1].copy())
    tokens = {
        engine_named("sglang"): EngineTokens(some_tokens(100), 0),
        engine_named("vllm"): EngineTokens(some_tokens(100)[::-1].copy(), 0),
    }
    fleet.policy.takes = 1
    placed = fleet.placement.place(fleet.ranks, PromptTokens(tokens), NOW)
    assert [one.held_pages for one in fleet.policy.seen] == [100 // PAGE] * 2
    assert placed.total_tokens == 100


def test_a_rank_whose_engine_has_no_tokens_of_the_prompt_holds_nothing() -> None:
    fleet = make_fleet(PAGE, PAGE)
    fleet.ranks[1].engine = engine_named("vllm")
    fleet.hold(0, some_tokens(100))
    fleet.hold(1, some_tokens(100))
    fleet.policy.takes = 1
    placed = fleet.placement.place(fleet.ranks, prompt(some_tokens(100), guess=70), NOW)
    assert [one.held_pages for one in fleet.policy.seen] == [100 // PAGE, 0]
    assert (placed.total_tokens, placed.cached_tokens) == (0, 0)
    placed.book(NOW).release(NOW)


def test_predictions_belong_to_a_namespace() -> None:
    fleet = make_fleet(PAGE)
    salted = fleet.index.hasher.seed("salt")
    fleet.place(some_tokens(100), seed=salted).book(NOW)
    assert fleet.predicted(some_tokens(100)) == [0]
    assert fleet.predicted(some_tokens(100), seed=salted) == [6]


def test_predictions_belong_to_a_page_size() -> None:
    fleet = make_fleet(16, 32)
    fleet.place(some_tokens(100), takes=1).book(NOW)
    assert fleet.predicted(some_tokens(100)) == [0, 3]
    fleet.place(some_tokens(50), takes=0).book(NOW)
    assert fleet.predicted(some_tokens(100)) == [3, 3]


def test_the_start_of_a_response_updates_load_and_prediction() -> None:
    fleet = make_fleet(PAGE)
    load = fleet.ranks[0].load
    booking = fleet.place(some_tokens(100)).book(NOW)
    assert (load.in_flight, load.running(NOW), load.prefill_tokens_ahead(NOW)) == (1, 0, 100)
    booking.started(NOW + 1)
    booking.started(NOW + 9)  # counts once
    assert (load.in_flight, load.running(NOW + 1), load.prefill_tokens_ahead(NOW + 1)) == (1, 1, 0)
    end = NOW + 1 + GRACE_SECONDS
    booking.release(NOW + 1.5)
    booking.release(NOW + 1.5)
    assert load.in_flight == 0
    assert fleet.predicted(some_tokens(100), end - 0.01) == [6]
    assert fleet.predicted(some_tokens(100), end) == [0]


def test_a_release_before_the_start_drops_load_and_prediction() -> None:
    fleet = make_fleet(PAGE)
    load = fleet.ranks[0].load
    booking = fleet.place(some_tokens(100)).book(NOW)
    booking.release(NOW)
    assert (load.in_flight, load.prefill_tokens_ahead(NOW)) == (0, 0)
    assert fleet.predicted(some_tokens(100)) == [0]
    booking.started(NOW)
    assert (load.in_flight, load.running(NOW)) == (0, 0)
    assert fleet.predicted(some_tokens(100)) == [0]


def test_the_prediction_of_an_unstreamed_response_ends_when_its_prefill_should_have() -> None:
    fleet = make_fleet(PAGE)
    other = fleet.place(some_tokens(200, 5000)).book(NOW)
    # 200 tokens before, 100 of its own, at 1000 a second: 0.3 s.
    fleet.place(some_tokens(100)).book(NOW, streamed=False)
    end = NOW + 0.3 + GRACE_SECONDS
    assert fleet.predicted(some_tokens(100), end - 0.001) == [6]
    assert fleet.predicted(some_tokens(100), end + 0.001) == [0]
    # One that is streamed waits for its start, however late.
    assert fleet.predicted(some_tokens(200, 5000), NOW + 500) == [12]
    other.release(NOW + 500)


def test_an_unstreamed_response_may_also_begin_sooner() -> None:
    fleet = make_fleet(PAGE)
    booking = fleet.place(some_tokens(100)).book(NOW, streamed=False)
    booking.started(NOW + 0.05)
    booking.release(NOW + 0.05)
    end = NOW + 0.05 + GRACE_SECONDS
    assert fleet.predicted(some_tokens(100), end - 0.001) == [6]
    assert fleet.predicted(some_tokens(100), end + 0.001) == [0]


def test_a_rank_that_lost_its_cache_is_forgotten_in_every_namespace_and_no_other() -> None:
    fleet = make_fleet(16, 32, 16)
    salted = fleet.index.hasher.seed("salt")
    for takes in range(3):
        fleet.place(some_tokens(100), takes=takes).book(NOW)
        fleet.place(some_tokens(100), takes=takes, seed=salted).book(NOW)
    fleet.clear(0)
    assert fleet.predicted(some_tokens(100)) == [0, 3, 6]
    assert fleet.predicted(some_tokens(100), seed=salted) == [0, 3, 6]
    fleet.clear(1)
    fleet.clear(1)
    assert fleet.predicted(some_tokens(100)) == [0, 0, 6]


# -- with the real policies


def placed_on(fleet: Fleet, count: int) -> tuple[int, str]:
    placed = fleet.placement.place(fleet.ranks, prompt(some_tokens(count)), NOW)
    return placed.rank.order, placed.reason


@pytest.mark.parametrize("kind", [CacheAwareZmq, MinTtft])
def test_a_second_request_follows_the_prediction_and_later_the_pages(
    kind: type[CacheAwareZmq | MinTtft],
) -> None:
    fleet = make_fleet(PAGE, PAGE, PAGE, policy=kind(Random(0)))
    first = fleet.placement.place(fleet.ranks, prompt(some_tokens(2000)), NOW)
    assert first.reason in ("below_threshold", "miss")
    booking = first.book(NOW)
    booking.started(NOW)  # at once, so that no queue keeps others away
    assert placed_on(fleet, 2000) == (first.rank.order, "predicted")
    fleet.hold(first.rank.order, some_tokens(2000))
    assert placed_on(fleet, 2000) == (first.rank.order, "hit")
    fleet.clear(first.rank.order)
    fleet.hold(first.rank.order, some_tokens(2000))
    assert placed_on(fleet, 2000) == (first.rank.order, "hit")


@pytest.mark.parametrize("kind", [CacheAwareZmq, MinTtft])
def test_the_reason_shows_that_nothing_is_known_about_the_ranks(
    kind: type[CacheAwareZmq | MinTtft],
) -> None:
    fleet = make_fleet(None, None, policy=kind(Random(0)))
    assert placed_on(fleet, 100)[1] == "no_events"
    fleet = make_fleet(PAGE, None, policy=kind(Random(0)))
    assert placed_on(fleet, PAGE - 1)[1] == "short_prompt"
    placed = fleet.placement.place(fleet.ranks, prompt(None), NOW)
    assert placed.reason == "no_tokens"
