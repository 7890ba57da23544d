"""Medians and ratios of runs made by hand, with the arithmetic beside them."""

import pytest

from benchmarks.figures import Run, Setting, pair_order, ratios, summaries
from benchmarks.rig import Arm

SMALL = Setting(1200, 32)
ADDED = "p50 added to no filter, ours/bare"
CPU = "server CPU per request, ours/bare"
THROUGHPUT = "throughput, ours/bare"


def run(
    arm: Arm,
    pair: int = 0,
    *,
    setting: Setting = SMALL,
    requests: int = 1000,
    p50_us: int = 1000,
    cpu_us: float = 100.0,
    errors: dict[str, int] | None = None,
) -> Run:
    return Run(
        pair=pair,
        arm=arm,
        setting=setting,
        requests=requests,
        seconds=2.0,
        p50_us=p50_us,
        p99_us=2 * p50_us,
        server_cpu_us=cpu_us,
        envoy_cpu_us=50.0,
        upstream_cpu_us=20.0,
        strangers_cores=0.0,
        errors=errors or {},
    )


def test_each_arm_takes_each_place_once_in_three_pairs() -> None:
    orders = [pair_order(pair) for pair in range(3)]
    for place in range(3):
        assert {order[place] for order in orders} == set(Arm)
    assert pair_order(3) == pair_order(0)


def test_a_summary_is_the_median_of_the_runs() -> None:
    runs = [run(Arm.OURS, pair, requests=count) for pair, count in enumerate((100, 900, 200))]
    (summary,) = summaries(runs)
    assert summary.runs == 3
    assert summary.requests_per_second == 100  # 200 requests in 2 s
    assert summary.p50_ms == 1.0
    assert summary.p99_ms == 2.0


def test_summaries_are_ordered_by_setting_then_arm() -> None:
    large = Setting(33000, 1)
    runs = [run(Arm.OURS, setting=large), run(Arm.OURS), run(Arm.BARE), run(Arm.NONE)]
    assert [(each.setting, each.arm) for each in summaries(runs)] == [
        (SMALL, Arm.NONE),
        (SMALL, Arm.BARE),
        (SMALL, Arm.OURS),
        (large, Arm.OURS),
    ]


def test_ratios_are_taken_pair_by_pair() -> None:
    runs = [
        *(run(Arm.NONE, 0), run(Arm.BARE, 0, cpu_us=100), run(Arm.OURS, 0, cpu_us=120)),
        # The machine was slow: both sides doubled, the ratio did not.
        *(run(Arm.NONE, 1), run(Arm.BARE, 1, cpu_us=200), run(Arm.OURS, 1, cpu_us=240)),
        *(run(Arm.NONE, 2), run(Arm.BARE, 2, cpu_us=100), run(Arm.OURS, 2, cpu_us=150)),
    ]
    ratio = next(each for each in ratios(runs) if each.name == CPU)
    assert ratio.values == pytest.approx((1.2, 1.2, 1.5))
    assert ratio.median == pytest.approx(1.2)


def test_added_latency_excludes_the_latency_without_a_filter() -> None:
    runs = [
        run(Arm.NONE, p50_us=100),
        run(Arm.BARE, p50_us=1100),
        run(Arm.OURS, p50_us=1300),
    ]
    ratio = next(each for each in ratios(runs) if each.name == ADDED)
    assert ratio.values == pytest.approx((1.2,))  # (1300 - 100) / (1100 - 100)


def test_a_run_with_errors_is_excluded_from_all_figures() -> None:
    runs = [
        *(run(Arm.NONE), run(Arm.BARE), run(Arm.OURS, errors={"status": 1})),
        *(run(Arm.NONE, 1), run(Arm.BARE, 1), run(Arm.OURS, 1, requests=500)),
    ]
    ours = next(each for each in summaries(runs) if each.arm is Arm.OURS)
    assert ours.runs == 1
    throughput = next(each for each in ratios(runs) if each.name == THROUGHPUT)
    assert throughput.values == (0.5,)


def test_a_run_without_an_answer_is_not_valid() -> None:
    assert not run(Arm.BARE, requests=0).valid


def test_a_zero_divisor_gives_no_ratio() -> None:
    runs = [run(Arm.NONE), run(Arm.BARE, cpu_us=0), run(Arm.OURS)]
    assert [each.name for each in ratios(runs)] == [THROUGHPUT]
