"""Prefill and decode pods that come, go and change their roles while requests are made.

The pools are those of the selectors. Pods are deleted and reborn at their old addresses in the
other role, engines crash, and labels flip. A request may fail only if one of its legs was with an
engine that crashed.
"""

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from msgspec import Struct

from extproc.simulator.http import RunningSimulator

from .cluster import Namespace, eventually
from .installation import Installation, installation, port_of
from .pods import end_pod, run_pod, set_labels

_REQUESTS: Final = 500
_CLIENTS: Final = 20
_ROLES: Final = ("prefill", "decode")
_SELECTORS: Final = {"prefill_selector": "role=prefill", "decode_selector": "role in (decode)"}
# What a client may get when the socket of one of its legs died: docs/disaggregation.md.
_DIED: Final = {
    (502, "prefill_failed"),
    (503, "upstream_unreachable"),
    (500, ""),  # the decode engine's own error: its partner was gone
    (0, "cut"),
}


class _Answer(Struct):
    """What became of one request; `id` is sent as its correlation id."""

    id: str
    status: int
    code: str
    request_id: str | None = None


class _Pods:
    """The pods of both pools. Each has a number and an engine, which changes with a rebirth."""

    def __init__(self, namespace: Namespace, installed: Installation) -> None:
        self._namespace = namespace
        self._installed = installed
        self._next = 1
        self.roles: dict[int, str] = {}
        self.engines: dict[int, RunningSimulator] = {}
        # Of engines that crashed: the requests that they had not finished, and where they were.
        self.torn: set[str] = set()
        self.crashed: set[str] = set()

    async def run(self, role: str, **settings: Any) -> int:
        """A new pod in this role; `settings` may give its engine an old address."""
        engine = await self._installed.start_worker(
            disaggregation_mode=role, bootstrap_timeout_seconds=3.0, **settings
        )
        n = self._next
        self._next += 1
        port = {"sglang.ai/bootstrap-port": str(engine.bootstrap_port)}
        await run_pod(
            self._namespace,
            n,
            {"role": role},
            ip="127.0.0.1",
            port=int(port_of(engine)),
            annotations=port if role == "prefill" else None,
        )
        self.roles[n], self.engines[n] = role, engine
        return n

    async def delete(self, n: int) -> None:
        """As a kubelet does: the pod terminates, its engine finishes, and it is gone."""
        engine = self.engines[n]
        await end_pod(self._namespace, n, grace_seconds=60)
        await self._installed.is_idle(engine)
        await end_pod(self._namespace, n, grace_seconds=0)
        await engine.stop()
        self._forget(n)

    async def crash(self, n: int) -> None:
        """The engine dies first; then its pod is removed."""
        engine = self.engines[n]
        self.crashed.add(engine.url.removeprefix("http://"))
        await engine.stop()
        left = (entry for entry in engine.journal.recent if entry.outcome != "completed")
        self.torn |= {entry.headers["x-correlation-id"] for entry in left}
        await end_pod(self._namespace, n, grace_seconds=0)
        self._forget(n)

    async def reborn(self, n: int, *, crash: bool) -> None:
        """Another pod at the same address and in the other role takes this one's place."""
        engine, role = self.engines[n], _other(self.roles[n])
        ports = {
            "port": engine.port,
            "disaggregation_bootstrap_port": engine.settings.disaggregation_bootstrap_port,
        }
        await (self.crash(n) if crash else self.delete(n))
        await self.run(role, **ports)

    async def flip(self, n: int) -> None:
        """Its label takes it out of the pools, its idle engine changes, and it is back."""
        engine, role = self.engines[n], _other(self.roles[n])
        await set_labels(self._namespace, n, role="changing")
        await self._installed.is_idle(engine)
        url, body = f"{engine.url}/pd_role_switch", {"new_role": role}
        async with self._installed.http.post(url, json=body) as answer:
            assert answer.status == 200, await answer.text()
        await set_labels(self._namespace, n, role=role)
        self.roles[n] = role

    async def known(self) -> None:
        """Wait until the service uses exactly these pods in exactly these roles."""
        await self._installed.shows(**{port_of(one): True for one in self.engines.values()})
        await self._installed.has_roles({self.engines[n].url: self.roles[n] for n in self.roles})

    def larger(self, chance: random.Random) -> int:
        """Any pod of the larger pool."""
        sizes = Counter(self.roles.values())
        most = max(sizes.values())
        return chance.choice([n for n, role in self.roles.items() if sizes[role] == most])

    def _forget(self, n: int) -> None:
        engine = self.engines.pop(n)
        self._installed.workers.remove(engine)
        del self.roles[n]


def _other(role: str) -> str:
    return _ROLES[1 - _ROLES.index(role)]


@contextlib.asynccontextmanager
async def _clients(installed: Installation) -> AsyncIterator[list[_Answer]]:
    """Ask all the time, at least until there were that many requests; gives their answers."""
    answers: list[_Answer] = []
    ended = asyncio.Event()
    chance = random.Random(2)
    numbers = iter(range(1_000_000))

    async def ask() -> None:
        while not (ended.is_set() and len(answers) >= _REQUESTS):
            number = str(next(numbers))
            stream, tokens = chance.random() < 0.5, chance.randrange(2, 40)
            try:
                async with installed.chat(tokens, stream=stream, x_correlation_id=number) as got:
                    body = await got.read()
                    code = got.headers.get("x-router-error-code", "")
                    request_id = json.loads(body)["error"]["request_id"] if code else None
                    status = got.status
                    if status == 200:
                        assert (b"[DONE]" if stream else b'"choices"') in body
            except aiohttp.ClientPayloadError:
                status, code, request_id = 0, "cut", None
            answers.append(_Answer(number, status, code, request_id))

    tasks = [asyncio.create_task(ask()) for _ in range(_CLIENTS)]
    try:
        yield answers
    finally:
        ended.set()
        await asyncio.gather(*tasks)


def _with_dead_sockets(folder: Path, crashed: set[str]) -> set[str]:
    """Ids of requests of which a leg was sent to a crashed engine that had not read it."""
    lines = [json.loads(line) for line in (folder / "access.log").read_text().splitlines()]
    found = {
        line["request_id"]
        for line in lines
        if crashed & set((line["upstream_hosts_attempted"] or "").split(","))
    }
    for line in (folder / "service.log").read_text().splitlines():
        if "prefill_attempt_failed" in line:
            event = json.loads(line)
            if event["worker"].removeprefix("http://") in crashed:
                found.add(event["request_id"])
    return found


@pytest.mark.parametrize("decode", ["two_pass", "inline"])
async def test_pods_are_reborn_in_other_roles_while_requests_are_made(
    namespace: Namespace, tmp_path: Path, decode: str
) -> None:
    settings = {
        "envoy": {"endpoints": "ads", "fail_open": False},
        "pd": {"decode": decode},
        "observability": {"log_format": "json"},
    }
    chance = random.Random(1)
    changes = ["delete", "crash", "flip"] * 6
    chance.shuffle(changes)
    async with installation(namespace, tmp_path, settings, **_SELECTORS) as installed:
        pods = _Pods(namespace, installed)
        for role in _ROLES * 3:
            await pods.run(role)
        async with installed.stack:
            await pods.known()
            async with _clients(installed) as answers:
                for change in changes:
                    n = pods.larger(chance)
                    if change == "flip":
                        await pods.flip(n)
                    else:
                        await pods.reborn(n, crash=change == "crash")
                    await pods.known()
            failed = [one for one in answers if one.status != 200]
            torn = pods.torn | _with_dead_sockets(tmp_path, pods.crashed)
            assert [one for one in failed if (one.status, one.code) not in _DIED] == []
            assert [one for one in failed if not {one.id, one.request_id} & torn] == []
            assert len(answers) >= _REQUESTS
            await installed.at_rest()
            pairs = 'extproc_pd_pairs_total{model="m",outcome='
            whole, cut = len(answers) - len(failed), sum(one.code == "cut" for one in failed)
            # The outcome of the decode worker is known at its response headers.
            assert whole <= await installed.sample(f'{pairs}"ok"') <= whole + cut
            assert await installed.sample(pairs) == len(answers)
            assert await installed.sample("extproc_destination_missed_total") == 0


async def test_a_pod_that_is_back_is_used_in_its_new_role_only(
    namespace: Namespace, tmp_path: Path
) -> None:
    settings = {"envoy": {"endpoints": "ads", "fail_open": False}}
    async with installation(namespace, tmp_path, settings, **_SELECTORS) as installed:
        pods = _Pods(namespace, installed)
        for role in _ROLES * 2:
            flipping = await pods.run(role)
        async with installed.stack:
            await pods.known()
            # The label has flipped long before the service knows what the engine says.
            faults = {"server_info_hang": 1.0}
            url = f"{pods.engines[flipping].url}/simulator/faults"
            async with installed.http.post(url, json=faults) as answer:
                assert answer.status == 200
            async with _clients(installed) as answers:
                recent = pods.engines[flipping].journal.recent
                await eventually(lambda: bool(recent), "it is used in its old role")
                await pods.flip(flipping)
                await eventually(
                    lambda: recent[-1].role == pods.roles[flipping], "it is used in its new role"
                )
            assert {(one.status, one.code) for one in answers} == {(200, "")}
