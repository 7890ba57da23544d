"""Computes medians and ratios from single runs.

Ratios are taken pair by pair, between runs that followed each other, and only then reduced
to a median: other load on the machine slows down both sides of a pair.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Final

from msgspec import Struct

from benchmarks.rig import Arm

__all__ = ["Ratio", "Run", "Setting", "Summary", "pair_order", "ratios", "summaries"]


class Setting(Struct, frozen=True, order=True):
    """The load: size of a body in bytes, number of open connections."""

    body_bytes: int
    connections: int


class Run(Struct, frozen=True, kw_only=True):
    """One measured run of one arm. CPU is in microseconds per request, 0 without a server.

    `strangers_cores` is the number of cores used by other processes of the machine.
    """

    pair: int
    arm: Arm
    setting: Setting
    requests: int
    seconds: float
    p50_us: int
    p99_us: int
    server_cpu_us: float
    envoy_cpu_us: float
    upstream_cpu_us: float
    strangers_cores: float
    errors: dict[str, int]

    @property
    def valid(self) -> bool:
        """False if requests failed: failed requests are cheap, so the run means nothing."""
        return not self.errors and self.requests > 0

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds


class Summary(Struct, frozen=True, kw_only=True):
    """Medians over the valid runs of one arm in one setting."""

    setting: Setting
    arm: Arm
    runs: int
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    server_cpu_us: float
    envoy_cpu_us: float
    upstream_cpu_us: float
    strangers_cores: float


class Ratio(Struct, frozen=True, kw_only=True):
    """One compared figure over all pairs."""

    name: str
    setting: Setting
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)


_Trio = dict[Arm, Run]


def _server_cpu(trio: _Trio) -> float | None:
    return _quotient(trio[Arm.OURS].server_cpu_us, trio[Arm.BARE].server_cpu_us)


def _throughput(trio: _Trio) -> float | None:
    return _quotient(trio[Arm.OURS].requests_per_second, trio[Arm.BARE].requests_per_second)


def _added_p50(trio: _Trio) -> float | None:
    none = trio[Arm.NONE].p50_us
    return _quotient(trio[Arm.OURS].p50_us - none, trio[Arm.BARE].p50_us - none)


_COMPARED: Final[tuple[tuple[str, Callable[[_Trio], float | None]], ...]] = (
    ("server CPU per request, ours/bare", _server_cpu),
    ("throughput, ours/bare", _throughput),
    ("p50 added to no filter, ours/bare", _added_p50),
)


def pair_order(pair: int) -> tuple[Arm, ...]:
    """The arms of one pair; each comes first, second and last equally often."""
    arms = tuple(Arm)
    shift = pair % len(arms)
    return arms[shift:] + arms[:shift]


def summaries(runs: Iterable[Run]) -> list[Summary]:
    """Summaries by setting, then in the order of the arms, without cells that have no valid run."""
    cells: dict[tuple[Setting, Arm], list[Run]] = {}
    for run in runs:
        if run.valid:
            cells.setdefault((run.setting, run.arm), []).append(run)
    order = list(Arm)
    return [
        Summary(
            setting=setting,
            arm=arm,
            runs=len(cell),
            requests_per_second=median(run.requests_per_second for run in cell),
            p50_ms=median(run.p50_us for run in cell) / 1000,
            p99_ms=median(run.p99_us for run in cell) / 1000,
            server_cpu_us=median(run.server_cpu_us for run in cell),
            envoy_cpu_us=median(run.envoy_cpu_us for run in cell),
            upstream_cpu_us=median(run.upstream_cpu_us for run in cell),
            strangers_cores=median(run.strangers_cores for run in cell),
        )
        for (setting, arm), cell in sorted(
            cells.items(), key=lambda item: (item[0][0], order.index(item[0][1]))
        )
    ]


def ratios(runs: Sequence[Run]) -> list[Ratio]:
    """Ratios by setting, from pairs of which every run is valid."""
    found: list[Ratio] = []
    for setting in sorted({run.setting for run in runs}):
        trios = list(_trios(run for run in runs if run.setting == setting))
        for name, compare in _COMPARED:
            values = tuple(value for trio in trios if (value := compare(trio)) is not None)
            if values:
                found.append(Ratio(name=name, setting=setting, values=values))
    return found


def _trios(runs: Iterable[Run]) -> Iterator[_Trio]:
    pairs: dict[int, _Trio] = {}
    for run in runs:
        if run.valid:
            pairs.setdefault(run.pair, {})[run.arm] = run
    return (trio for trio in pairs.values() if len(trio) == len(Arm))


def _quotient(over: float, under: float) -> float | None:
    # In very short runs noise can make the divisor zero.
    return over / under if under > 0 else None
