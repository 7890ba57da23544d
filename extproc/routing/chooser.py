"""Chooses the workers of a model, by a policy over whole workers or over their ranks.

Each model has one chooser. It reads the prompt first, since that may take a thread, and then
chooses among the candidates of the moment, as often as the request needs a worker. It is separate
from the router so that both passes of `pd` choose by the same policy.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from extproc.policies.base import Policy
from extproc.routing.placement import NO_TOKENS, Placed, PromptTokens
from extproc.routing.request import Request
from extproc.workers.worker import Worker

__all__ = ["Chooser", "Chosen", "WorkerChooser"]


class Chosen(NamedTuple):
    """The chosen worker, and why.

    `placed` is set by policies that look at tokens. `dp_rank` is the rank that the body must name
    for the engine, None for an engine with a single rank.
    """

    worker: Worker
    policy: str
    reason: str
    placed: Placed | None = None
    dp_rank: int | None = None


class Chooser(Protocol):
    """Chooses the workers of one model."""

    @property
    def reads_prompts(self) -> bool:
        """True if `read` has work to do, which would be in vain without candidates."""
        ...

    async def read(self, request: Request, adapter: str | None) -> PromptTokens:
        """Return the part of the request that `choose` needs; `adapter` is from its model name."""
        ...

    def choose(self, workers: Sequence[Worker], prompt: PromptTokens, now: float) -> Chosen:
        """Choose one of at least one worker; books nothing."""
        ...

    def decided(self, chosen: Chosen) -> None:
        """Count the overlap of the final choice for a request."""
        ...


class WorkerChooser:
    """Chooses whole workers, by a policy that does not look at tokens."""

    reads_prompts = False

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @property
    def policy_name(self) -> str:
        return self._policy.name

    async def read(self, request: Request, adapter: str | None) -> PromptTokens:
        return NO_TOKENS

    def choose(self, workers: Sequence[Worker], prompt: PromptTokens, now: float) -> Chosen:
        policy = self._policy
        worker, reason = policy.choose(workers)
        return Chosen(worker, policy.name, reason)

    def decided(self, chosen: Chosen) -> None:
        pass
