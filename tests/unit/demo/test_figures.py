"""The arithmetic of what the demo shows."""

import pytest

from extproc.demo.figures import Outcome, Tally, percentile


def outcome(
    worker: str = "a", prompt: int = 100, cached: int = 0, ttft: float = 1.0, *, good: bool = True
) -> Outcome:
    return Outcome(
        worker=worker, good=good, ttft_seconds=ttft, prompt_tokens=prompt, cached_tokens=cached
    )


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([3.0], 95, 3.0),
        ([1.0, 2.0], 50, 1.5),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 50, 3.0),
        ([float(n) for n in range(101)], 95, 95.0),
        ([5.0, 1.0, 3.0], 50, 3.0),
    ],
)
def test_percentiles(values: list[float], percent: int, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_figures_are_unknown_before_the_first_answer() -> None:
    tally = Tally("p", 2)
    assert (tally.hit_rate, tally.spread, tally.ttft_seconds(50)) == (None, None, None)
    tally.add(outcome(good=False))
    assert (tally.hit_rate, tally.spread, tally.ttft_seconds(50)) == (None, None, None)
    assert (tally.good, tally.failed) == (0, 1)


def test_the_hit_rate_is_of_tokens_not_of_requests() -> None:
    tally = Tally("p", 2)
    tally.add(outcome(prompt=300, cached=300 - 60))
    tally.add(outcome(prompt=100, cached=0))
    assert tally.hit_rate == pytest.approx(240 / 400)
    assert tally.prefilled_tokens == 160


def test_the_spread_counts_workers_that_did_nothing() -> None:
    tally = Tally("p", 4)
    tally.add(outcome("a", 100, 40))  # 60 computed
    tally.add(outcome("b", 100, 80))  # 20
    assert tally.spread == pytest.approx(60 / (80 / 4))


def test_an_even_spread_is_one() -> None:
    tally = Tally("p", 2)
    for worker in ("a", "b", "a", "b"):
        tally.add(outcome(worker, 10))
    assert tally.spread == pytest.approx(1.0)


def test_failed_requests_count_only_as_failed() -> None:
    tally = Tally("p", 1)
    tally.add(outcome(ttft=1.0))
    tally.add(outcome(ttft=9.0, good=False))
    assert (tally.good, tally.failed, tally.prompt_tokens) == (1, 1, 100)
    assert tally.ttft_seconds(95) == 1.0
