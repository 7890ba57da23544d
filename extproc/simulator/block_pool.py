"""The blocks of a rank like vLLM, after vLLM 0.32's block pool.

Free blocks are in a queue: blocks without a hash at its front, cached ones behind, the least
recently freed first. A new block is taken from the front, and loses its hash then. Blocks are not
de-duplicated: a hash may be that of several blocks, each stored and removed by an event of its own.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

__all__ = ["Block", "BlockKey", "BlockPool"]

BlockKey = tuple[int, int]  # a hash and the number of a group


class Block:
    """`key` is set while its content can be found; `users` are the requests that hold it."""

    __slots__ = ("key", "users")

    def __init__(self) -> None:
        self.key: BlockKey | None = None
        self.users = 0


class BlockPool:
    """`size` blocks; `evicted` is called with the key of each cached block that is taken."""

    def __init__(self, size: int, evicted: Callable[[BlockKey], None]) -> None:
        self._size = size
        self._evicted = evicted
        self._free: OrderedDict[Block, None] = OrderedDict((Block(), None) for _ in range(size))
        self._found: dict[BlockKey, dict[Block, None]] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self._size - len(self._free)

    def cached(self, group: int) -> int:
        """The number of different hashes of a group that can be found."""
        return sum(key[1] == group for key in self._found)

    def find(self, key: BlockKey) -> Block | None:
        """The first of the blocks with this key."""
        blocks = self._found.get(key)
        return None if blocks is None else next(iter(blocks))

    def take(self, count: int) -> list[Block]:
        """So many blocks from the front of the queue, or as many as there are."""
        taken = [self._free.popitem(last=False)[0] for _ in range(min(count, len(self._free)))]
        for block in taken:
            block.users = 1
            if block.key is not None:
                key = block.key
                self._forget(block)
                self._evicted(key)
        return taken

    def hold(self, blocks: Iterable[Block]) -> None:
        """Hold blocks that were found."""
        for block in blocks:
            if not block.users:
                del self._free[block]
            block.users += 1

    def release(self, blocks: Sequence[Block]) -> None:
        """Let go of these blocks; of those with a hash, the first is evicted first."""
        left = []
        for block in blocks:
            block.users -= 1
            if not block.users:
                left.append(block)
        for block in reversed([one for one in left if one.key is None]):
            self._free[block] = None
            self._free.move_to_end(block, last=False)
        for block in left:
            if block.key is not None:
                self._free[block] = None

    def cache(self, block: Block, key: BlockKey) -> None:
        """Let a full block be found."""
        block.key = key
        self._found.setdefault(key, {})[block] = None

    def reset(self) -> bool:
        """Forget all hashes; False, and no change, while blocks are held."""
        if self.used:
            return False
        for blocks in self._found.values():
            for block in blocks:
                block.key = None
        self._found.clear()
        return True

    def _forget(self, block: Block) -> None:
        if block.key is not None:
            blocks = self._found[block.key]
            del blocks[block]
            if not blocks:
                del self._found[block.key]
            block.key = None
