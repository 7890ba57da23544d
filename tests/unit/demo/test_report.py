"""The table and the paragraph, at any width and with any figures missing."""

import io

import pytest
from rich.console import Console

from extproc.demo.figures import Tally
from extproc.demo.report import summary, table

from .test_figures import outcome


def tally(policy: str, *ttfts: float, cached: int = 0, failed: int = 0) -> Tally:
    found = Tally(policy, 2)
    for ttft in ttfts:
        found.add(outcome(ttft=ttft, cached=cached))
    for _ in range(failed):
        found.add(outcome(good=False))
    return found


def shown(*tallies: Tally, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(tallies, 5))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_row_for_every_policy() -> None:
    text = shown(tally("round_robin", 0.5, 1.5), tally("min_ttft", 0.25, cached=75, failed=1))
    first, second = [line.split() for line in text.splitlines() if "/5" in line]
    # One worker of two has computed everything.
    assert first == ["round_robin", "2/5", "0", "0.0%", "1.00", "s", "1.45", "s", "2.00"]
    assert second == ["min_ttft", "1/5", "1", "75.0%", "250", "ms", "250", "ms", "2.00"]


def test_a_table_without_figures() -> None:
    text = shown(tally("round_robin"))
    assert "0/5" in text
    assert text.splitlines()[4].split() == ["round_robin", "0/5", "0", "-", "-", "-", "-"]


@pytest.mark.parametrize("width", [80, 60])
def test_the_table_fits_80_columns(width: int) -> None:
    rows = [tally(name, 12.3456) for name in ("round_robin", "cache_aware_zmq", "min_ttft")]
    text = shown(*rows, width=width)
    assert all(len(line) <= width for line in text.splitlines())
    for name in ("round_robin", "cache_aware_zmq", "min_ttft"):
        assert name in text
    assert "\x1b" not in text


def test_the_summary_measures_against_round_robin() -> None:
    text = summary(
        [tally("min_ttft", 0.1, 0.1, cached=80), tally("round_robin", 1.0, 1.0, cached=20)],
        2,
        1,
        "4",
    )
    assert "the same 2 requests of 1 conversations (100 prompt tokens on average)" in text
    assert "with 4 workers of its own" in text
    assert "round_robin: 20% of prompt tokens cached, first token after 1.00 s (median)" in text
    # 0.1 s instead of 1 s, and 20 tokens computed instead of 80.
    assert "100 ms (p95), p95 10.0x as fast as round_robin with 25% of its prefill work." in text
    assert text.count("as fast") == 1
    assert "failed" not in text


def test_the_summary_measures_against_the_first_without_round_robin() -> None:
    text = summary([tally("random", 0.5), tally("min_ttft", 1.0)], 1, 1, "2")
    assert "p95 0.5x as fast as random with 100% of its prefill work" in text


def test_the_summary_of_fully_cached_answers() -> None:
    text = summary([tally("round_robin", 0.5, cached=100), tally("random", 0.5)], 1, 1, "2")
    assert "nothing to measure against round_robin" in text


def test_the_summary_mentions_failures() -> None:
    text = summary([tally("round_robin", 0.5, failed=1), tally("random", failed=2)], 3, 3, "2")
    assert text.endswith("3 requests failed, which ended their conversations.")
    assert "random" not in text


def test_the_summary_without_figures() -> None:
    assert summary([tally("round_robin", failed=3)], 3, 1, "2") == "No request was answered."


def test_the_legend_names_the_measured_workers() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(table([], 5, apart=True))
    assert isinstance(console.file, io.StringIO)
    assert "prefill worker" in console.file.getvalue()
    assert "prefill worker" not in shown()
