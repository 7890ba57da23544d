"""The page tree of a prefix cache, and the order in which its leaves are evicted."""

import hashlib
from collections.abc import Callable
from heapq import heapify, heappop, heappush

import msgspec

from extproc.simulator.cache_events import Namespace, Page

__all__ = ["LeafQueue", "Node", "Root", "is_gpu_leaf", "is_host_leaf", "root_of"]

_SPARE_ENTRIES = 1024  # a queue is compacted when it has doubled, but not below this size


class Node:
    """One page; `used_at` is exact on the deepest page of every request."""

    __slots__ = (
        *("children", "gpu_children", "hash", "on_gpu", "on_host"),
        *("page", "parent", "pins", "used_at"),
    )

    def __init__(self, parent: "Node | None", page: Page, hash_: int, used_at: float) -> None:
        self.parent = parent  # None for a root, and for a page that was removed
        self.page = page
        self.hash = hash_
        self.used_at = used_at
        self.on_gpu = True
        self.on_host = False
        self.pins = 0
        self.gpu_children = 0
        self.children: dict[Page, Node] = {}


class Root(Node):
    """The root of one namespace's pages; its hash separates them from all others."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: Namespace) -> None:
        digest = hashlib.sha256(msgspec.json.encode(namespace)).digest()
        super().__init__(None, None, int.from_bytes(digest[:8], "big", signed=True), 0.0)
        self.namespace = namespace


def root_of(node: Node) -> Root:
    above = node.parent
    while above is not None:
        node, above = above, above.parent
    assert isinstance(node, Root)  # noqa: S101  # the chain of parents ends at a root
    return node


def is_gpu_leaf(node: Node) -> bool:
    """Whether the page can leave the device now."""
    return node.on_gpu and not node.gpu_children and not node.pins and node.parent is not None


def is_host_leaf(node: Node) -> bool:
    return node.on_host and not node.children and node.parent is not None


class LeafQueue:
    """Leaves, the least recently used first.

    A page is pushed whenever it becomes a leaf. An entry stays when the page is used again or
    gets a child; such stale entries are skipped when they come up.
    """

    def __init__(self, is_leaf: Callable[[Node], bool]) -> None:
        self._is_leaf = is_leaf
        self._heap: list[tuple[float, int, Node]] = []
        self._pushed = 0
        self._tidy_at = _SPARE_ENTRIES

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, node: Node) -> None:
        self._pushed += 1
        heappush(self._heap, (node.used_at, self._pushed, node))
        if len(self._heap) > self._tidy_at:
            self._tidy()

    def pop(self) -> Node | None:
        while self._heap:
            used_at, _, node = heappop(self._heap)
            if node.used_at == used_at and self._is_leaf(node):
                return node
        return None

    def pop_or(self, leaf: Node) -> Node | None:
        """The less recently used of `leaf`, which is not in the queue, and the queue's first.

        Whole branches are evicted this way, page after page, without entering the queue.
        """
        if self._heap and self._heap[0][0] < leaf.used_at:
            self.push(leaf)
            return self.pop()
        return leaf

    def _tidy(self) -> None:
        due = {
            node: (used_at, number, node)
            for used_at, number, node in self._heap
            if node.used_at == used_at and self._is_leaf(node)
        }
        self._heap = list(due.values())
        heapify(self._heap)
        self._tidy_at = _SPARE_ENTRIES + 2 * len(self._heap)
