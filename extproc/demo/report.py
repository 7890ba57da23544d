"""Renders the demo's figures: a table that fits 80 columns, and a paragraph at the end."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from extproc.demo.figures import Tally

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["summary", "table"]

_HEADINGS = ("done", "failed", "cache\nhits", "TTFT\np50", "TTFT\np95", "spread")
_LEGEND = (
    "cache hits: share of prompt tokens that were cached; TTFT: from sending to the first byte; "
    "spread: prompt tokens computed by the busiest worker, over the mean of all"
)
_LEGEND_APART = (
    "cache hits: share of prompt tokens that the prefill workers had cached; TTFT: from sending "
    "to the first byte; spread: prompt tokens computed by the busiest prefill worker, over the "
    "mean of them"
)
_BASELINE = "round_robin"
_UNKNOWN = "-"


def table(tallies: Sequence[Tally], planned: int, *, apart: bool = False) -> "Table":
    """The figures so far; `planned` requests are sent to each policy.

    `apart` is true if they are those of prefill workers.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption=_LEGEND_APART if apart else _LEGEND,
        caption_justify="left",
    )
    shown.add_column("policy", no_wrap=True)
    for heading in _HEADINGS:
        shown.add_column(heading, justify="right", overflow="fold")
    for tally in tallies:
        shown.add_row(tally.policy, *_cells(tally, planned))
    return shown


def _cells(tally: Tally, planned: int) -> tuple[str, ...]:
    hit_rate, spread = tally.hit_rate, tally.spread
    return (
        f"{tally.good}/{planned}",
        str(tally.failed),
        _UNKNOWN if hit_rate is None else f"{hit_rate:.1%}",
        _seconds(tally.ttft_seconds(50)),
        _seconds(tally.ttft_seconds(95)),
        _UNKNOWN if spread is None else f"{spread:.2f}",
    )


def _seconds(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def summary(tallies: Sequence[Tally], planned: int, conversations: int, workers: str) -> str:
    """The result as a paragraph; it compares the policies with round robin, if that ran.

    `workers` is the number of workers of each policy as text, to stand before "workers".
    """
    answered = [tally for tally in tallies if tally.good]
    if not answered:
        return "No request was answered."
    tokens = sum(tally.prompt_tokens for tally in answered) / sum(tally.good for tally in answered)
    said = [
        f"Every policy was sent the same {planned} requests of {conversations} conversations "
        f"({tokens:,.0f} prompt tokens on average), with {workers} workers of its own."
    ]
    baseline = next((tally for tally in answered if tally.policy == _BASELINE), answered[0])
    for tally in answered:
        sentence = (
            f"{tally.policy}: {tally.hit_rate or 0:.0%} of prompt tokens cached, first token "
            f"after {_seconds(tally.ttft_seconds(50))} (median) and "
            f"{_seconds(tally.ttft_seconds(95))} (p95)"
        )
        if tally is not baseline:
            sentence += f", {_compared(tally, baseline)}"
        said.append(sentence + ".")
    if failed := sum(tally.failed for tally in tallies):
        said.append(f"{failed} requests failed, which ended their conversations.")
    return " ".join(said)


def _compared(tally: Tally, baseline: Tally) -> str:
    """The 95th percentile and the work of a policy relative to another's."""
    ours, theirs = tally.ttft_seconds(95) or 0.0, baseline.ttft_seconds(95) or 0.0
    # Work is measured per request: a policy must not look better because its requests fail.
    work = tally.prefilled_tokens / tally.good
    their_work = baseline.prefilled_tokens / baseline.good
    if not ours or not their_work:
        return f"with nothing to measure against {baseline.policy}"
    return (
        f"p95 {theirs / ours:.1f}x as fast as {baseline.policy} with {work / their_work:.0%} "
        "of its prefill work"
    )
