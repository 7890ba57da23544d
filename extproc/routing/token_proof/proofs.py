"""What is known of each worker's tokens: proven, different, or not known.

Separate from the prover, which does the asking, since routing reads this for every request.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from msgspec import Struct

from extproc.routing.token_proof.comparison import Difference
from extproc.routing.token_proof.traits import names_of
from extproc.workers.worker import Worker

__all__ = ["PENDING", "STATES", "ProofState", "TokenProof", "TokenProofs"]

# `pending`: asked soon. `not_proven`: the worker could not be asked.
ProofState: TypeAlias = Literal["pending", "proven", "differs", "not_proven"]
STATES: Final[tuple[ProofState, ...]] = ("pending", "proven", "differs", "not_proven")
_NOBODY: Final[Mapping[Worker, int]] = {}


class TokenProof(Struct, frozen=True, kw_only=True):
    """The result for one worker and model.

    `equal` are the probes whose tokens were the same, and `not_compared` the others that are not
    among the `differences`. `reason` says why a worker is not proven, or the likely cause of the
    differences.
    """

    state: ProofState
    equal: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    reason: str = ""

    @property
    def traits(self) -> int:
        """What a request must have to get other tokens from the engine than from this service."""
        traits = 0
        for one in self.differences:
            traits |= one.trait
        return traits

    def shown(self) -> dict[str, object]:
        """For the page of workers."""
        if self.state == "pending":
            return {"state": self.state}
        return {
            "state": self.state,
            "reason": self.reason or None,
            "by_load": names_of(self.traits),
            "equal": self.equal,
            "not_compared": self.not_compared,
            "differences": [
                {
                    "probe": one.probe,
                    "position": one.position,
                    "ours": {"tokens": one.ours, "text": one.our_text},
                    "engines": {"tokens": one.engines, "text": one.engines_text},
                }
                for one in self.differences
            ],
        }


PENDING: Final = TokenProof(state="pending")


class TokenProofs:
    """The proofs of all workers, by model."""

    def __init__(self) -> None:
        self._proofs: dict[str, dict[Worker, TokenProof]] = {}
        # Only of models that are routed by load where tokens differ.
        self._by_load: dict[str, dict[Worker, int]] = {}
        self._routes_by_load: frozenset[str] = frozenset()

    def route_by_load(self, models: frozenset[str]) -> None:
        """From now on differences have an effect on routing for these models, and no others."""
        self._routes_by_load = models
        self._by_load = {}
        for model in models:
            for worker, proof in self._proofs.get(model, {}).items():
                self._mark(model, worker, proof)

    def differing(self, model: str) -> Mapping[Worker, int]:
        """The workers that compute other tokens for requests with one of these traits."""
        return self._by_load.get(model, _NOBODY)

    def of(self, worker: Worker) -> dict[str, TokenProof]:
        """The proofs of a worker, by model."""
        return {model: proofs[worker] for model, proofs in self._proofs.items() if worker in proofs}

    def put(self, model: str, worker: Worker, proof: TokenProof) -> TokenProof | None:
        """Keep a result; returns the one before."""
        before = self._proofs.setdefault(model, {}).get(worker)
        self._proofs[model][worker] = proof
        self._mark(model, worker, proof)
        return before

    def forget(self, model: str, worker: Worker) -> None:
        """The worker left, or the model is not proven any more."""
        for by_model in (self._proofs, self._by_load):
            workers = by_model.get(model)
            if workers is not None:
                workers.pop(worker, None)
                if not workers:
                    del by_model[model]

    def counts(self) -> dict[str, Counter[str]]:
        """The numbers of workers by model and state."""
        return {
            model: Counter(proof.state for proof in proofs.values())
            for model, proofs in self._proofs.items()
        }

    def _mark(self, model: str, worker: Worker, proof: TokenProof) -> None:
        if proof.traits and model in self._routes_by_load:
            self._by_load.setdefault(model, {})[worker] = proof.traits
            return
        marked = self._by_load.get(model)
        if marked is not None:
            marked.pop(worker, None)
            if not marked:
                del self._by_load[model]
