"""The arithmetic of time, without a clock."""

import pytest

from extproc.simulator.time_model import TimeModel, reusable_tokens


def test_a_request_from_arrival_to_its_last_token() -> None:
    times = TimeModel(prefill_tokens_per_second=1000, seconds_per_token=0.01)
    started_at = times.prefill_starts_at(arrived_at=1.0, free_at=3.0)
    first_at = times.first_token_at(started_at, uncached_tokens=500)
    assert (started_at, first_at) == (3.0, 3.5)
    assert times.prefill_starts_at(arrived_at=4.0, free_at=first_at) == 4.0
    assert times.token_at(first_at, 0) == 3.5
    assert times.token_at(first_at, 100) == pytest.approx(4.5)
    assert times.token_at(first_at, 2, pace=1.0) == 5.5


@pytest.mark.parametrize(
    ("held", "prompt", "reusable"),
    [
        (0, 10, 0),
        (8, 9, 8),  # the ninth token is computed
        (8, 8, 4),  # the eighth has to be: its page is not reused
        (8, 100, 8),
        (0, 0, 0),
    ],
)
def test_the_last_token_of_a_prompt_is_always_computed(
    held: int, prompt: int, reusable: int
) -> None:
    assert reusable_tokens(held, prompt, page_size=4) == reusable
