"""Tests policies that choose workers: order, uniformity, load and ties."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import NamedTuple, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.config.models import TOKEN_POLICIES, ModelConfig, PolicyName
from extproc.policies.base import Policy
from extproc.policies.factory import create_kv_policy, create_policy

POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
PLAIN = tuple(name for name in POLICIES if name not in TOKEN_POLICIES)


class Rank(NamedTuple):
    order: int
    in_flight: int = 0


def ranks(*loads: int) -> list[Rank]:
    return [Rank(order, load) for order, load in enumerate(loads)]


def picks(policy: Policy, candidates: Sequence[Rank], count: int) -> list[int]:
    return [policy.choose(candidates).candidate.order for _ in range(count)]


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_of_the_configuration_exists_under_its_name(name: PolicyName) -> None:
    if name in TOKEN_POLICIES:
        model = ModelConfig(id="m", policy=name, tokenizer_path="-")
        assert create_kv_policy(model, Random(0)).name == name
        with pytest.raises(ValueError, match=name):
            create_policy(name, Random(0))
    else:
        assert create_policy(name, Random(0)).name == name
        with pytest.raises(ValueError, match=name):
            create_kv_policy(ModelConfig(id="m", policy=name), Random(0))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("load", [0, 1000])
def test_one_candidate_is_always_the_choice(name: PolicyName, load: int) -> None:
    only = Rank(7, load)
    choice = create_policy(name, Random(0)).choose([only])
    assert choice.candidate is only
    assert choice.reason


@pytest.mark.parametrize("name", PLAIN)
@given(
    loads=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    start=st.integers(0, 100),
    seed=st.integers(0, 100),
)
def test_the_choice_is_one_of_the_candidates(
    name: PolicyName, loads: list[int], start: int, seed: int
) -> None:
    candidates = [Rank(start + 2 * index, load) for index, load in enumerate(loads)]
    policy = create_policy(name, Random(seed))
    for _ in range(5):
        assert policy.choose(candidates).candidate in candidates


def test_models_do_not_share_a_turn() -> None:
    first, second = (create_policy("round_robin", Random(0)) for _ in range(2))
    assert picks(first, ranks(0, 0), 1) == picks(second, ranks(0, 0), 1) == [0]


# -- round_robin


def test_round_robin_takes_each_in_turn() -> None:
    assert picks(create_policy("round_robin", Random(0)), ranks(9, 0, 5), 7) == [
        0,
        1,
        2,
        0,
        1,
        2,
        0,
    ]


@pytest.mark.parametrize("load", [0, 6, 50, 1000])
def test_round_robin_takes_each_in_turn_however_busy_all_of_them_are(load: int) -> None:
    loads = ranks(load, load + 5, load, load + 3)
    assert picks(create_policy("round_robin", Random(0)), loads, 6) == [0, 1, 2, 3, 0, 1]


def test_round_robin_passes_over_workers_on_which_requests_pile_up() -> None:
    """The mean is 12.5: more than 1.5 times that and 6, which is 24, are too many."""
    policy = create_policy("round_robin", Random(0))
    assert picks(policy, ranks(0, 25, 0, 25), 4) == [0, 2, 0, 2]
    assert picks(policy, ranks(1, 24, 0, 25), 4) == [0, 1, 2, 0]


def test_round_robin_continues_after_the_last_worker_when_one_is_left_out_for_a_moment() -> None:
    policy, everyone = create_policy("round_robin", Random(0)), ranks(0, 0, 0, 0)
    without_2 = [rank for rank in everyone if rank.order != 2]
    assert picks(policy, everyone, 2) == [0, 1]
    assert picks(policy, without_2, 1) == [3]
    assert picks(policy, everyone, 5) == [0, 1, 2, 3, 0]


def test_round_robin_does_not_jump_when_the_last_worker_leaves() -> None:
    policy = create_policy("round_robin", Random(0))
    assert picks(policy, ranks(0, 0, 0, 0), 2) == [0, 1]
    left = [Rank(0), Rank(2), Rank(3)]
    assert picks(policy, left, 4) == [2, 3, 0, 2]


def test_round_robin_serves_a_new_worker_when_its_turn_comes() -> None:
    policy = create_policy("round_robin", Random(0))
    assert picks(policy, ranks(0, 0), 2) == [0, 1]
    assert picks(policy, ranks(0, 0, 0), 4) == [2, 0, 1, 2]


@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=30))
def test_round_robin_never_takes_a_worker_twice_while_another_waits(rounds: list[set[int]]) -> None:
    policy = create_policy("round_robin", Random(0))
    chosen = [picks(policy, [Rank(order) for order in sorted(there)], 1)[0] for there in rounds]
    for (before, after), there in zip(pairwise(chosen), rounds[1:], strict=True):
        later = [order for order in there if order > before]
        assert after == min(later or there)


# -- random


def test_random_is_uniform() -> None:
    count = Counter(picks(create_policy("random", Random(1)), ranks(0, 9, 0, 9), 8000))
    # 8000 / 4 = 2000 each, standard deviation sqrt(8000 * 1/4 * 3/4) = 39; 5 of those.
    assert set(count) == {0, 1, 2, 3}
    assert all(abs(picked - 2000) < 200 for picked in count.values())


def test_random_follows_its_seed() -> None:
    first, second = (picks(create_policy("random", Random(5)), ranks(0, 0, 0), 20) for _ in "ab")
    assert first == second


# -- power_of_two


class Drawing(Random):
    """A Random that records its samples."""

    def __init__(self) -> None:
        super().__init__(0)
        self.drawn: list[list[Rank]] = []

    def sample(self, population: Sequence[Rank], k: int, **_: object) -> list[Rank]:  # type: ignore[override]
        drawn = super().sample(population, k)
        self.drawn.append(drawn)
        return drawn


def test_power_of_two_draws_two_workers_and_takes_the_less_loaded() -> None:
    random = Drawing()
    policy, candidates = create_policy("power_of_two", random), ranks(3, 1, 4, 1, 5)
    for _ in range(200):
        choice = policy.choose(candidates)
        first, second = random.drawn[-1]
        assert first.order != second.order
        if first.in_flight == second.in_flight:
            assert (choice.candidate, choice.reason) == (first, "equal_load")
        else:
            assert choice.candidate.in_flight == min(first.in_flight, second.in_flight)
            assert choice.reason == "less_loaded"
    assert len({frozenset(drawn) for drawn in random.drawn}) == 10  # all pairs of 5


def test_power_of_two_never_takes_the_single_most_loaded_worker() -> None:
    chosen = picks(create_policy("power_of_two", Random(0)), ranks(0, 2, 9), 300)
    assert set(chosen) == {0, 1}


def test_power_of_two_spreads_an_idle_pool() -> None:
    count = Counter(picks(create_policy("power_of_two", Random(1)), ranks(0, 0, 0, 0), 4000))
    assert all(abs(picked - 1000) < 150 for picked in count.values())
    assert len(count) == 4


# -- least_load


def test_least_load_takes_the_least_loaded_worker() -> None:
    assert set(picks(create_policy("least_load", Random(0)), ranks(3, 1, 2), 50)) == {1}


def test_least_load_draws_among_equals() -> None:
    count = Counter(picks(create_policy("least_load", Random(1)), ranks(1, 0, 0, 5, 0), 3000))
    assert set(count) == {1, 2, 4}
    assert all(abs(picked - 1000) < 150 for picked in count.values())
