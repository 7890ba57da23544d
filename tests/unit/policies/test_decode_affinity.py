"""Tests the choice of the decode worker: on the same host if it is not too busy."""

import math
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.policies.decode_affinity import DecodeAffinity

HERE, THERE = "10.0.0.1", "10.0.0.2"


class Decoder(NamedTuple):
    host: str
    requests: int = 0
    kv_usage: float = 0.0
    name: int = 0


def here(requests: int = 0, kv_usage: float = 0.0, name: int = 0) -> Decoder:
    return Decoder(HERE, requests, kv_usage, name)


def there(requests: int = 0, kv_usage: float = 0.0, name: int = 0) -> Decoder:
    return Decoder(THERE, requests, kv_usage, name)


def choose(candidates: Sequence[Decoder], seed: int = 0) -> tuple[Decoder, str]:
    choice = DecodeAffinity(Random(seed)).choose(candidates, HERE)
    return choice.candidate, choice.reason


def counts(candidates: Sequence[Decoder], draws: int) -> Counter[int]:
    affinity = DecodeAffinity(Random(3))
    return Counter(affinity.choose(candidates, HERE).candidate.name for _ in range(draws))


_CANDIDATES = st.lists(
    st.builds(
        Decoder,
        st.sampled_from([HERE, THERE, "10.0.0.3"]),
        st.integers(0, 6),
        st.sampled_from([0.0, 0.5, 1.0]),
    ),
    min_size=1,
    max_size=9,
).map(lambda found: [one._replace(name=name) for name, one in enumerate(found)])


@pytest.mark.parametrize(
    ("candidates", "expected", "reason"),
    [
        # The only candidate, on any host and however busy.
        ([here(1000)], HERE, "same_host"),
        ([there(1000)], THERE, "no_peer"),
        # All others idle: one request on the neighbour is accepted, two are not.
        ([here(1), there(0), there(0)], HERE, "same_host"),
        ([here(2), there(0), there(0)], THERE, "peer_busy"),
        # Median 3, hence up to 6.
        ([here(6), there(3), there(3)], HERE, "same_host"),
        ([here(7), there(3), there(3)], THERE, "peer_busy"),
        # Of an even number the upper median counts: of 0, 4 it is 4, hence up to 8.
        ([here(4), there(0)], HERE, "same_host"),
        # Of 0, 0, 1, 9 it is 1, hence up to 2.
        ([here(9), there(0), there(0), there(1)], THERE, "peer_busy"),
        ([here(1), there(0), there(0), there(9)], HERE, "same_host"),
    ],
)
def test_a_worker_on_the_same_host_is_taken_up_to_twice_the_median_load(
    candidates: list[Decoder], expected: str, reason: str
) -> None:
    chosen, why = choose(candidates)
    assert (chosen.host, why) == (expected, reason)


def test_a_busy_worker_on_the_same_host_is_not_taken_in_an_idle_pool() -> None:
    assert choose([here(50), *[there(0)] * 7]) == (there(0), "peer_busy")


def test_the_least_loaded_of_several_workers_on_the_host_is_taken() -> None:
    found = choose([here(3, name=1), here(1, name=2), here(2, name=3), there(0), there(2)])
    assert found == (here(1, name=2), "same_host")


def test_another_worker_on_the_host_is_taken_when_one_is_too_busy() -> None:
    assert choose([here(30), here(2), there(1), there(1)]) == (here(2), "same_host")


def test_of_equal_loads_the_emptier_cache_is_taken() -> None:
    assert choose([here(1, 0.9), here(1, 0.2), here(1, 0.4)])[0] == here(1, 0.2)
    assert choose([there(1, 0.9), there(1, 0.2), there(2, 0.0)])[0] == there(1, 0.2)


def test_an_emptier_cache_does_not_outweigh_a_request() -> None:
    assert choose([there(1, 0.99), there(2, 0.0)])[0] == there(1, 0.99)


@pytest.mark.parametrize("host", [HERE, THERE])
def test_equals_are_drawn_evenly(host: str) -> None:
    found = counts([Decoder(host, 1, 0.5, name) for name in range(4)], 4000)
    assert len(found) == 4
    # 1000 each; 137 are five standard deviations.
    assert all(abs(count - 1000) < 137 for count in found.values())


def test_only_equals_are_drawn() -> None:
    assert set(counts([there(1, 0.0, 1), there(1, 0.0, 2), there(1, 0.1, 3)], 200)) == {1, 2}


@given(_CANDIDATES, st.integers(0, 5))
def test_the_rule_holds_for_any_pool(candidates: list[Decoder], seed: int) -> None:
    chosen, reason = choose(candidates, seed)
    loads = sorted(one.requests for one in candidates)
    tolerance = max(1, math.ceil(2 * loads[len(loads) // 2]))
    peers = [one for one in candidates if one.host == HERE]
    near = [one for one in peers if one.requests <= tolerance]
    among = near or candidates
    assert reason == ("same_host" if near else "peer_busy" if peers else "no_peer")
    assert chosen in among
    least = min((one.requests, one.kv_usage) for one in among)
    assert (chosen.requests, chosen.kv_usage) == least


@given(_CANDIDATES, st.integers(0, 5))
def test_the_order_has_every_candidate_once_and_begins_with_the_choice(
    candidates: list[Decoder], seed: int
) -> None:
    ordered = DecodeAffinity(Random(seed)).order(candidates, HERE)
    assert sorted(ordered) == sorted(candidates)
    # The same draws lead to the same choice.
    assert ordered[0] == DecodeAffinity(Random(seed)).choose(candidates, HERE).candidate
    loads = [(one.requests, one.kv_usage) for one in ordered[1:]]
    assert loads == sorted(loads)


def test_the_others_are_in_random_order_among_equals() -> None:
    affinity = DecodeAffinity(Random(1))
    pool = [here(0, name=0), *[there(1, name=name) for name in (1, 2, 3)]]
    orders = Counter(tuple(one.name for one in affinity.order(pool, HERE)[1:]) for _ in range(1200))
    # 200 each of six; 65 are five standard deviations.
    assert len(orders) == 6
    assert all(abs(count - 200) < 65 for count in orders.values())
