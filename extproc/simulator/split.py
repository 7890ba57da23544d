"""A batch whose prompts run on several ranks: the rooms of prefill legs name the ranks."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from extproc.simulator.generation import FinishReason, Generation

__all__ = ["Output", "SplitGeneration"]


class SplitGeneration:
    """Several generations that advance together; their creator enters and leaves them.

    All of them have the id of the request, so an abort ends them together.
    """

    def __init__(self, parts: Sequence[Generation]) -> None:
        self.parts = parts

    @property
    def rank(self) -> int:
        """The rank of the first prompt."""
        return self.parts[0].rank

    @property
    def sequences(self) -> int:
        return sum(part.sequences for part in self.parts)

    @property
    def prompt_tokens(self) -> int:
        return sum(part.prompt_tokens for part in self.parts)

    @property
    def produced(self) -> int:
        return self.parts[0].produced

    @property
    def cached_tokens(self) -> int:
        return sum(part.cached_tokens for part in self.parts)

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.parts[0].finish_reason

    @property
    def is_aborted(self) -> bool:
        return self.parts[0].is_aborted

    async def prefill(self) -> None:
        async with asyncio.TaskGroup() as group:
            for part in self.parts:
                group.create_task(part.prefill())

    async def next_token(self) -> bool:
        async with asyncio.TaskGroup() as group:
            tokens = [group.create_task(part.next_token()) for part in self.parts]
        return all(token.result() for token in tokens)

    async def unless_aborted(self, work: Coroutine[Any, Any, None]) -> None:
        await self.parts[0].unless_aborted(work)

    def kv_arrived(self) -> None:
        for part in self.parts:
            part.kv_arrived()

    def keep_blocks(self) -> None:
        for part in self.parts:
            part.keep_blocks()

    def free_blocks(self) -> None:
        for part in self.parts:
            part.free_blocks()


Output = Generation | SplitGeneration
