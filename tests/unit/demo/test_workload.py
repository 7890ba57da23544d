"""The same conversations in every run, due when they should be."""

from collections.abc import Iterator
from itertools import pairwise

import pytest

from extproc.demo.workload import WORDS, Conversation, conversations

SECONDS = 20.0


def turn_count(planned: list[Conversation]) -> int:
    return sum(len(conversation.turns) for conversation in planned)


def texts(planned: list[Conversation]) -> Iterator[str]:
    for conversation in planned:
        yield conversation.system
        yield from (turn.text for turn in conversation.turns)


def test_the_same_in_every_run() -> None:
    assert conversations(4, SECONDS) == conversations(4, SECONDS)


def test_another_seed_is_another_workload() -> None:
    assert conversations(4, SECONDS) != conversations(4, SECONDS, seed=2)


def test_conversations_begin_in_order_and_turns_follow_each_other() -> None:
    planned = conversations(4, SECONDS)
    starts = [conversation.turns[0].due_seconds for conversation in planned]
    assert starts == sorted(starts)
    assert starts[0] == 0
    for conversation in planned:
        due = [turn.due_seconds for turn in conversation.turns]
        assert all(later - earlier > 0.499 for earlier, later in pairwise(due))
        assert due[-1] <= SECONDS


def test_most_conversations_have_several_turns() -> None:
    planned = conversations(4, SECONDS)
    assert turn_count(planned) > 2 * len(planned)


def test_a_tenant_has_one_system_prompt() -> None:
    planned = conversations(4, SECONDS)
    prompts = {(conversation.tenant, conversation.system) for conversation in planned}
    tenants = {conversation.tenant for conversation in planned}
    assert len(prompts) == len(tenants)
    assert 1 < len(tenants) <= 12
    assert all(1200 <= len(system.split()) <= 2400 for _, system in prompts)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_the_load_grows_with_the_workers(workers: int) -> None:
    # One conversation begins every second for each worker, in the first 16 of 20 seconds.
    begun = sum(len(conversations(workers, SECONDS, seed)) for seed in range(20)) / 20
    assert begun == pytest.approx(16 * workers, rel=0.15)


def test_a_short_round_has_requests_too() -> None:
    assert turn_count(conversations(1, 1)) >= 1


def test_all_words_are_known() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert {word for text in texts(conversations(2, 5)) for word in text.split()} <= {*WORDS}
