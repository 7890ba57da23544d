"""Finds which blocks a group stores that keeps only some blocks of a prompt.

A group with a window or a state keeps the last blocks before a place where another request may go
on. vLLM's event of such a group has the tokens of all blocks, but the names of those that are kept.
The event of the full-attention group for the same request has the names of all, which are the same.
It comes before or after in the same batch, in the order of the groups.
"""

from collections.abc import Iterator

from msgspec.structs import replace

from extproc.kv.events import BlockStored

__all__ = ["is_sparse", "runs_of"]


def is_sparse(event: BlockStored) -> bool:
    """True if the event has the tokens of more blocks than it names."""
    return len(event.tokens) > len(event.block_hashes) * event.block_size > 0


def runs_of(sparse: BlockStored, full: BlockStored | None) -> Iterator[BlockStored]:
    """The blocks of `sparse` as events with their own tokens, one for each run of blocks in a row.

    Nothing where `full` is not of the same request, or has blocks of another size: then it is not
    known which blocks are meant.
    """
    if full is None or full.parent_block_hash != sparse.parent_block_hash:
        return
    size, names = full.block_size, full.block_hashes
    places = {name: number for number, name in enumerate(names)}
    numbers = [places.get(name) for name in sparse.block_hashes]
    known = [number for number in numbers if number is not None]
    if size != sparse.block_size or len(known) != len(numbers):
        return
    first = 0
    for end in range(1, len(known) + 1):
        if end < len(known) and known[end] == known[end - 1] + 1:
            continue
        begin, after = known[first], known[end - 1] + 1
        yield replace(
            sparse,
            block_hashes=names[begin:after],
            parent_block_hash=names[begin - 1] if begin else full.parent_block_hash,
            tokens=full.tokens[begin * size : after * size],
            cache_salt=full.cache_salt,
        )
        first = end
