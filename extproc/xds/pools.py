"""Says which workers are in which cluster: each model and role has one.

A worker that has just left stays among the endpoints for a moment, since another replica may still
choose it. Separate from the publisher, which sends the result.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from msgspec import Struct

from extproc.envoy_config.endpoints import Endpoint
from extproc.workers.registry import Pool
from extproc.workers.worker import Role, Worker

__all__ = ["Members", "Pools"]

_PLAIN: Final[tuple[Role, ...]] = ("plain",)
_PAIR: Final[tuple[Role, ...]] = ("prefill", "decode")


class Members(Struct):
    """The endpoints of one cluster; true for those that get no new requests.

    Those in `left` are no workers any more.
    """

    endpoints: dict[Endpoint, bool]
    left: frozenset[Endpoint] = frozenset()


class Pools:
    """The members of all clusters, and since when some are about to go."""

    def __init__(self, settle_seconds: float) -> None:
        """`settle_seconds` is how long a worker that left is still among the endpoints."""
        self._settle_seconds = settle_seconds
        self._serving: dict[Pool, frozenset[Endpoint]] = {}
        self._leaving: dict[tuple[Pool, Endpoint], float] = {}
        # A model whose workers have all left keeps its clusters.
        self._roles: dict[str, tuple[Role, ...]] = {}

    def look(
        self, models: Mapping[str, bool], workers: Iterable[Worker], now: float
    ) -> dict[Pool, Members]:
        """The members of each cluster of these models.

        A model is true if prefill and decode workers serve it as long as its workers do not say
        otherwise.
        """
        found: dict[Pool, dict[Endpoint, bool]] = {}
        for worker in workers:
            if worker.address is None:
                continue
            one = Endpoint(worker.address, worker.url)
            for model in worker.model_ids:
                if model in models:
                    pool = found.setdefault((model, worker.role), {})
                    pool[one] = worker.draining and pool.get(one, True)
        self._note_leaving(found, models, now)
        self._note_roles(found, models)
        return {pool: self._members(pool, found.get(pool, {})) for pool in self._wanted()}

    def until_next_leaves(self, now: float) -> float | None:
        """The seconds until a worker that left is no endpoint any more."""
        return min((max(0.0, until - now) for until in self._leaving.values()), default=None)

    def _note_leaving(
        self, found: Mapping[Pool, Mapping[Endpoint, bool]], models: Mapping[str, bool], now: float
    ) -> None:
        for pool, before in self._serving.items():
            for one in before - found.get(pool, {}).keys():
                self._leaving[pool, one] = now + self._settle_seconds
        self._serving = {pool: frozenset(endpoints) for pool, endpoints in found.items()}
        self._leaving = {
            (pool, one): until
            for (pool, one), until in self._leaving.items()
            if until > now and pool[0] in models and one not in found.get(pool, {})
        }

    def _note_roles(self, found: Iterable[Pool], models: Mapping[str, bool]) -> None:
        before, self._roles = self._roles, {}
        roles: dict[str, set[Role]] = {}
        for model, role in found:
            roles.setdefault(model, set()).add(role)
        for model, is_pair in models.items():
            if model in roles:
                self._roles[model] = _PLAIN if "plain" in roles[model] else _PAIR
            else:
                self._roles[model] = before.get(model) or (_PAIR if is_pair else _PLAIN)

    def _wanted(self) -> list[Pool]:
        wanted = {(model, role) for model, roles in self._roles.items() for role in roles}
        return sorted(wanted | {pool for pool, _ in self._leaving})

    def _members(self, pool: Pool, serving: dict[Endpoint, bool]) -> Members:
        left = frozenset(one for other, one in self._leaving if other == pool)
        return Members(serving | dict.fromkeys(left, True), left)
