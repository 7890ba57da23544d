"""An engine on several pods: the KV events of each rank are read at the pod that has the rank."""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from extproc.simulator.http import RunningSimulator, start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import reserved_ports
from tests.unit.simulator.model_folders import model_folder

from .cluster import Namespace
from .installation import installation, until_not
from .pods import end_pod, run_pod

_INDEX: Final = "leaderworkerset.sigs.k8s.io/worker-index"
_GROUP: Final = "leaderworkerset.sigs.k8s.io/group-key"
_HOSTS: Final = ("127.0.0.1", "127.0.0.2")


async def _engines(exits: AsyncExitStack, folder: str) -> list[RunningSimulator]:
    """Two pods of an engine with two ranks. Each publishes both, at the same ports."""
    given: dict[str, Any] = {"kv_events_port": 0}
    (port,) = exits.enter_context(reserved_ports(1))
    engines = []
    for host in _HOSTS:
        settings = SimulatorSettings(
            host=host,
            port=port,
            model="m",
            dp_size=2,
            page_size=16,
            tokenizer_path=folder,
            **given,
        )
        engine = await start(settings)
        exits.push_async_callback(engine.stop)
        engines.append(engine)
        ports = engine.kv_ports
        assert ports is not None
        given = {
            "kv_events_port": ports.events,
            "kv_replay_port": ports.replay or 0,
            "kv_load_port": ports.load or 0,
        }
    return engines


@pytest.mark.parametrize("mapped", [True, False])
async def test_the_ranks_of_other_pods_are_followed_only_where_pods_say_so(
    namespace: Namespace, tmp_path: Path, mapped: bool
) -> None:
    folder = model_folder(tmp_path)
    model = {
        "id": "m",
        "policy": "cache_aware_zmq",
        "tokenizer_path": folder,
    }
    section = {"ranks_from": _INDEX} if mapped else {}
    settings = {"models": [model], "envoy": {"endpoints": "ads"}}
    async with (
        installation(namespace, tmp_path, settings, **section) as installed,
        AsyncExitStack() as exits,
    ):
        engines = await _engines(exits, folder)
        for n, engine in enumerate(engines):
            labels = {_INDEX: str(n), _GROUP: "group"}
            await run_pod(namespace, n + 1, labels, ip=_HOSTS[n], port=engine.port)

        async def trusted(*expected: bool) -> None:
            async def differs() -> Any:
                shown = [one["kv"]["ranks"] for one in (await installed.listed()).values()]
                found = [[rank.get("trusted", False) for rank in ranks] for ranks in shown]
                return found != [[*expected]] and f"{found} is {expected}"

            await until_not(differs)

        async with installed.stack:
            await trusted(True, True)
            # Rank 1 is lost with the second pod only if that is where it is read.
            await engines[1].stop()
            if mapped:
                await trusted(True, False)
                await end_pod(namespace, 2, grace_seconds=0)
                await trusted(True, False)
            else:
                await end_pod(namespace, 2, grace_seconds=0)
                await trusted(True, True)
            async with installed.chat(2) as answer:
                assert answer.status == 200
