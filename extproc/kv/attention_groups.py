"""Which blocks of a hybrid model say what a rank can reuse of a prompt.

Such a model has several groups of layers, each with blocks of its own. The full-attention group
needs every block of a prefix. A group with a sliding window needs only the blocks of the last
window, and one with a running state (Mamba) only the last block. vLLM numbers the groups by their
first layer and says the kind of each in its events.

The rank's pages are those of one full-attention group; all others limit what may be reused.
"""

from typing import Final

from extproc.kv.events import BlockRemoved, BlockStored
from extproc.kv.index import PrefixIndex
from extproc.kv.rank_pages import RankPages

__all__ = ["AttentionGroups"]

_FULL: Final = frozenset(("full_attention", "mla_attention", "sink_full_attention"))
_WINDOWS: Final = frozenset(("sliding_window", "sliding_window_mla"))
_STATES: Final = frozenset(("mamba",))
# A model has two or three; each is a column in the index.
_GROUPS_MAX: Final = 16
# A window's blocks may be smaller than the others, and complete some steps earlier.
_BATCHES_WITHOUT_FULL: Final = 32


class AttentionGroups:
    """The groups of one rank, learnt from its events.

    Groups of other kinds are not followed. Without kinds (older engines) it is group 0.
    """

    def __init__(self, index: PrefixIndex, pages: RankPages) -> None:
        self._index = index
        self._pages = pages
        self._main: int | None = None
        self._others: dict[int, RankPages] = {}
        self._batches = 0

    def forget(self) -> None:
        """The rank's pages were cleared, so its engine may be another one."""
        self._main = None
        self._others.clear()
        self._batches = 0

    def stored_in(self, event: BlockStored) -> RankPages | None:
        """The pages to which these blocks belong, None for blocks that are not followed."""
        group = event.group or 0
        if group == self._main:
            return self._pages
        if event.kind is None:
            return self._others.get(group) if group or self._others else self._pages
        if (known := self._others.get(group)) is not None:
            return known
        if event.kind in _FULL:
            if self._main is None:
                self._main = group
                return self._pages
            needed = None
        elif event.kind in _STATES:
            needed = 1
        elif event.kind in _WINDOWS and event.window and event.block_size:
            needed = max(1, -(-(event.window - 1) // event.block_size))
        else:
            return None
        if len(self._others) >= _GROUPS_MAX:
            return None
        made = self._index.add_group(self._pages, event.block_size, needed)
        self._others[group] = made
        return made

    def is_full(self, event: BlockStored) -> bool:
        """Whether the event is that of the full-attention group whose pages are the rank's."""
        return event.group is not None and event.group == self._main

    def is_after_full(self, event: BlockStored) -> bool:
        """Whether this group's event comes after that of the full-attention group."""
        return self._main is not None and (event.group or 0) > self._main

    def removed_in(self, event: BlockRemoved) -> RankPages | None:
        """The same for blocks that were removed."""
        group = event.group or 0
        if group == self._main or (self._main is None and not group and not self._others):
            return self._pages
        return self._others.get(group)

    def end_of_batch(self) -> None:
        """If a model has windows only, its first group stands for the rank."""
        if self._main is not None or not self._others:
            return
        self._batches += 1
        if self._batches >= _BATCHES_WITHOUT_FULL:
            first = min(self._others)
            self._index.lead(self._pages, self._others.pop(first))
            self._main = first
