"""Prefill and decode pods that come, go and change their roles while requests are made.

The pools are those of the selectors. Pods are deleted and reborn at their old addresses in the
other role, engines crash, and labels flip. A request may fail only if one of its legs was with an
engine that crashed.
"""

import random
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest

from extproc.simulator.http import RunningSimulator

from .cluster import Namespace, eventually
from .installation import Installation, installation, own_address, port_of
from .pods import end_pod, run_pod, set_labels, set_status
from .services import make_node, make_service
from .traffic import Crashes, asking

_REQUESTS: Final = 500
_CLIENTS: Final = 20
_ROLES: Final = ("prefill", "decode")
_LOOPBACK: Final = "127.0.0.1"
_SETTINGS: Final[dict[str, Any]] = {
    "envoy": {"endpoints": "ads", "fail_open": False},
    "observability": {"log_format": "json", "log_level": "debug"},
}
_SELECTORS: Final = {"prefill_selector": "role=prefill", "decode_selector": "role in (decode)"}
# What a client may get when the socket of one of its legs died: docs/disaggregation.md.
_DIED: Final = {
    (502, "prefill_failed"),
    (503, "upstream_unreachable"),
    (500, ""),  # the decode engine's own error: its partner was gone
    (0, "cut"),
}


class _Pods:
    """The pods of both pools. Each has a number and an engine, which changes with a rebirth."""

    def __init__(self, namespace: Namespace, installed: Installation, host: str) -> None:
        """All engines listen at this address."""
        self._host = host
        self._namespace = namespace
        self._installed = installed
        self._next = 1
        self.roles: dict[int, str] = {}
        self.engines: dict[int, RunningSimulator] = {}
        self.crashes = Crashes()

    async def run(self, role: str, **settings: Any) -> int:
        """A new pod in this role; `settings` may give its engine an old address."""
        engine = await self._installed.start_worker(
            host=self._host,
            disaggregation_mode=role,
            bootstrap_timeout_seconds=3.0,
            **settings,
        )
        n = self._next
        self._next += 1
        port = {"sglang.ai/bootstrap-port": str(engine.bootstrap_port)}
        await run_pod(
            self._namespace,
            n,
            {"role": role},
            ip=self._host,
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
        await self.crashes.crash(self.engines[n])
        await end_pod(self._namespace, n, grace_seconds=0)
        # Before that, requests for it would reach an engine that gets its address.
        await self._installed.is_gone(self.engines[n])
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
        """It leaves the pools, its idle engine changes, and it is back with another label.

        With Services it leaves by its readiness: their endpoints do not tell of another label.
        """
        engine, role = self.engines[n], _other(self.roles[n])
        by_readiness = self._host != _LOOPBACK
        if by_readiness:
            await set_status(self._namespace, n, ready=False, ips=(self._host,))
        else:
            await set_labels(self._namespace, n, role="changing")
        await self._installed.is_idle(engine)
        url, body = f"{engine.url}/pd_role_switch", {"new_role": role}
        async with self._installed.http.post(url, json=body) as answer:
            assert answer.status == 200, await answer.text()
        await set_labels(self._namespace, n, role=role)
        if by_readiness:
            await set_status(self._namespace, n, ready=True, ips=(self._host,))
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


@pytest.mark.parametrize("decode", ["two_pass", "inline"])
async def test_pods_are_reborn_in_other_roles_while_requests_are_made(
    namespace: Namespace, tmp_path: Path, decode: str
) -> None:
    settings = _SETTINGS | {"pd": {"decode": decode}}
    async with installation(namespace, tmp_path, settings, **_SELECTORS) as installed:
        await _change_pods(_Pods(namespace, installed, _LOOPBACK), installed, tmp_path)


async def test_pods_of_services_are_reborn_in_other_roles_while_requests_are_made(
    namespace: Namespace, tmp_path: Path
) -> None:
    await make_node(namespace)
    for role in _ROLES:
        labels = {"app": "sglang", "role": role}
        await make_service(namespace, role, labels, app="sglang", role=role)
    with namespace.cluster.slice_controller():
        async with installation(
            namespace, tmp_path, _SETTINGS, backend="k8s", **_SELECTORS
        ) as installed:
            pods = _Pods(namespace, installed, own_address())
            await _change_pods(pods, installed, tmp_path)


async def _change_pods(pods: _Pods, installed: Installation, folder: Path) -> None:
    chance = random.Random(1)
    changes = ["delete", "crash", "flip"] * 6
    chance.shuffle(changes)
    for role in _ROLES * 3:
        await pods.run(role)
    async with installed.stack:
        await pods.known()
        async with asking(installed, _CLIENTS, _REQUESTS) as answers:
            for change in changes:
                n = pods.larger(chance)
                if change == "flip":
                    await pods.flip(n)
                else:
                    await pods.reborn(n, crash=change == "crash")
                await pods.known()
        failed = [one for one in answers if not one.ok]
        assert [one for one in failed if (one.status, one.code) not in _DIED] == []
        assert pods.crashes.unexplained(answers, folder) == []
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
        pods = _Pods(namespace, installed, _LOOPBACK)
        for role in _ROLES * 2:
            flipping = await pods.run(role)
        async with installed.stack:
            await pods.known()
            # The label has flipped long before the service knows what the engine says.
            faults = {"server_info_hang": 1.0}
            url = f"{pods.engines[flipping].url}/simulator/faults"
            async with installed.http.post(url, json=faults) as answer:
                assert answer.status == 200
            async with asking(installed, _CLIENTS, _REQUESTS) as answers:
                recent = pods.engines[flipping].journal.recent
                await eventually(lambda: bool(recent), "it is used in its old role")
                await pods.flip(flipping)
                await eventually(
                    lambda: recent[-1].role == pods.roles[flipping], "it is used in its new role"
                )
            assert [one for one in answers if not one.ok] == []
