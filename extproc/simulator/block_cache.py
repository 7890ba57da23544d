"""The prefix cache of a rank like vLLM: the blocks of requests, in one group or two.

A block can be found from the start of the step that computes it, as in the engine; its events are
taken when that step has ended. The last token of a prompt is always computed, so the last block of
a prompt that is held in full is made anew. With a sliding window the model has two groups, of which
the first has the window: a prefix is found where the last blocks of a window are held, too.
"""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from itertools import chain

from extproc.simulator.block_pool import Block, BlockKey, BlockPool
from extproc.simulator.cache_events import CacheEvent, Cleared, Group, Namespace, Removed, Stored

__all__ = ["BlockCache", "BlockRequest"]


class BlockRequest:
    """The blocks of one prompt and its output; None stands for one that a window has left."""

    def __init__(self, cache: "BlockCache", prompt: Sequence[int], namespace: Namespace) -> None:
        self.cached_tokens = 0
        self._cache = cache
        self._namespace = namespace
        self._tokens = array("q", [*prompt])
        self._prompt_tokens = len(prompt)
        self._hashes: list[int] = []
        self._blocks: list[list[Block | None]] = [[] for _ in cache.groups]
        self._stored = [0 for _ in cache.groups]  # leading blocks that can be found

    def found(self) -> list[list[Block | None]]:
        """The blocks that hold the longest prefix, for every group; it is not held by that."""
        self._hash()
        most = max(0, len(self._tokens) - 1) // self._cache.block_size
        return self._cache.longest(self._hashes[:most])

    def missing(self, found: list[list[Block | None]]) -> int:
        """How many free blocks the prompt takes."""
        total = -(-len(self._tokens) // self._cache.block_size)
        idle = sum(1 for block in chain(*found) if block is not None and not block.users)
        return idle + sum(total - len(group) for group in found)

    def begin(self, *, reads_cache: bool) -> None:
        """Hold what is found, take blocks for the rest, and let them be found."""
        found = self.found() if reads_cache else [[] for _ in self._cache.groups]
        self.cached_tokens = len(found[0]) * self._cache.block_size
        self._cache.pool.hold(block for block in chain(*found) if block is not None)
        self._blocks = found
        self._stored = [len(blocks) for blocks in found]
        self._fill(len(self._tokens))

    def grow(self, produced: int, output_ids: Callable[[int], Sequence[int]]) -> bool:
        """Take and store blocks for an output of this length; True if one was stored.

        The last token of it is not computed yet.
        """
        computed = self._prompt_tokens + produced - 1
        self._cache.leave_window(self._blocks, computed - 1)
        size = self._cache.block_size
        is_stored = computed // size <= min(self._stored)
        if is_stored and computed <= min(map(len, self._blocks)) * size:
            return False
        known = len(self._tokens) - self._prompt_tokens
        self._tokens.extend(output_ids(produced)[known : produced - 1])
        self._fill(computed)
        return not is_stored

    def end(self) -> None:
        """Let go of all blocks, the last first."""
        for blocks in self._blocks:
            self._cache.pool.release([one for one in reversed(blocks) if one is not None])
        self._blocks = [[] for _ in self._cache.groups]

    def _fill(self, computed: int) -> None:
        size = self._cache.block_size
        for blocks in self._blocks:
            blocks += self._cache.pool.take(max(0, -(-computed // size) - len(blocks)))
        self._hash()
        full = computed // size
        for number, group in enumerate(self._cache.groups):
            self._store(number, group, min(full, len(self._blocks[number])))

    def _store(self, number: int, group: Group, full: int) -> None:
        first = self._stored[number]
        if first >= full:
            return
        self._stored[number] = full
        new = range(first, full)
        for at in new:
            block = self._blocks[number][at]
            if block is not None:
                self._cache.pool.cache(block, (self._hashes[at], group.number))
        size = self._cache.block_size
        self._cache.record(
            Stored(
                hashes=[self._hashes[at] for at in new],
                parent=self._hashes[first - 1] if first else None,
                pages=[tuple(self._tokens[at * size : (at + 1) * size]) for at in new],
                medium="GPU",
                namespace=self._namespace,
                group=group,
            )
        )

    def _hash(self) -> None:
        """Hash the full blocks: each with those before it, the first with the namespace."""
        size = self._cache.block_size
        for at in range(len(self._hashes), len(self._tokens) // size):
            if at:
                before = self._hashes[at - 1].to_bytes(8, "big")
            else:
                before = repr(self._namespace).encode()
            content = before + self._tokens[at * size : (at + 1) * size].tobytes()
            self._hashes.append(int.from_bytes(hashlib.sha256(content).digest()[:8], "big"))


class BlockCache:
    """The blocks of one rank. Events collect until `take_events`."""

    def __init__(
        self,
        *,
        blocks: int,
        block_size: int,
        window: int | None = None,
        record_events: bool = True,
    ) -> None:
        """`window` is the number of tokens that the layers of the first group see."""
        self.block_size = block_size
        if window is None:
            self.groups = [Group(0, "full_attention")]
        else:
            self.groups = [Group(0, "sliding_window", window), Group(1, "full_attention")]
        self._window = window
        self._records = record_events
        self._events: list[CacheEvent] = []
        self._steps = 0  # that have begun and not ended
        self.pool = BlockPool(blocks, self._evicted)

    @property
    def used_tokens(self) -> int:
        """Tokens of different blocks that can be found, in the group that sees all of them."""
        return self.pool.cached(self.groups[-1].number) * self.block_size

    host_used_tokens = 0

    def usage(self) -> float:
        """The part of the blocks that requests hold, from 0 to 1."""
        return self.pool.used / max(1, self.pool.used + self.pool.free)

    def take_events(self) -> list[CacheEvent]:
        """The events of the steps that have ended; an empty list while a prefill runs."""
        if self._steps:
            return []
        events, self._events = self._events, []
        # An idle engine takes no step, so the news of a reset waits for the next one.
        if all(isinstance(event, Cleared) for event in events):
            self._events = events
            return []
        return events

    def flush(self) -> None:
        """Forget all blocks, if no request holds one."""
        if self.pool.reset():
            self.record(Cleared())

    def begin_step(self) -> None:
        self._steps += 1

    def end_step(self) -> None:
        self._steps -= 1

    def record(self, event: CacheEvent) -> None:
        if self._records:
            self._events.append(event)

    def longest(self, hashes: list[int]) -> list[list[Block | None]]:
        """The blocks of the longest prefix that every group holds; None for those not needed."""
        full: list[Block | None] = []
        for number in hashes:
            block = self.pool.find((number, self.groups[-1].number))
            if block is None:
                break
            full.append(block)
        if self._window is None:
            return [full]
        windowed = self._longest_window(hashes[: len(full)], self._window)
        return [windowed, full[: len(windowed)]]

    def _longest_window(self, hashes: list[int], window: int) -> list[Block | None]:
        """Looks from the end for as many blocks in a row as a window needs."""
        needed = max(1, -(-(window - 1) // self.block_size))
        found: list[Block | None] = [None] * len(hashes)
        row = 0
        for at in range(len(hashes) - 1, -1, -1):
            found[at] = self.pool.find((hashes[at], self.groups[0].number))
            row = row + 1 if found[at] is not None else 0
            if row >= needed:
                return [None] * at + found[at : at + row]
        return found[:row]

    def leave_window(self, blocks: list[list[Block | None]], computed: int) -> None:
        """Let go of the blocks of the first group that no further token sees."""
        if self._window is None:
            return
        gone = max(0, computed - self._window + 1) // self.block_size
        held = blocks[0]
        freed = [at for at in range(min(gone, len(held))) if held[at] is not None]
        self.pool.release([block for at in reversed(freed) if (block := held[at]) is not None])
        for at in freed:
            held[at] = None

    def _evicted(self, key: BlockKey) -> None:
        group = next(group for group in self.groups if group.number == key[1])
        self.record(Removed(hashes=[key[0]], medium="GPU", group=group))
