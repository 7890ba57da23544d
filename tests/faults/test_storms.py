"""Short storms with a fixed seed. `make faults` has longer ones."""

from pathlib import Path

import pytest

from tests.faults.fleet import FleetOptions, running
from tests.faults.storm import Storm, StormOptions

PLAIN = FleetOptions(workers=3, policy="min_ttft")
PAIRS = FleetOptions(workers=4, policy="round_robin", disaggregated=True)
PLAIN_FAULTS = (
    *("kill", "full", "errors", "reset", "cut", "wrong-length"),
    *("kv-garbage", "kv-flood", "service-kill"),
)
PAIR_FAULTS = ("kill", "hang", "half-open", "swallowed-syns", "service-stop", "gateway-restart")
EVERY_SECONDS = 0.3


@pytest.mark.parametrize(
    ("fleet_options", "faults"),
    [
        pytest.param(PLAIN, PLAIN_FAULTS, id="plain"),
        pytest.param(PAIRS, PAIR_FAULTS, id="prefill-and-decode"),
    ],
)
async def test_after_a_storm_everything_is_as_before(
    tmp_path: Path, fleet_options: FleetOptions, faults: tuple[str, ...]
) -> None:
    async with running(tmp_path, fleet_options) as fleet:
        storm = Storm(
            fleet,
            StormOptions(
                faults=faults,
                seconds=EVERY_SECONDS * len(faults),
                every_seconds=EVERY_SECONDS,
                concurrency=8,
                deadline_seconds=120.0,
            ),
        )
        await storm.run()
    assert storm.problems == []
    assert len(storm.log) >= len(faults)
