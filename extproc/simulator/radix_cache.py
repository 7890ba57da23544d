"""A rank's prefix cache: the pages it holds, their memory tier, and its events.

It does no I/O and is fast enough for benchmarks with millions of pages in simulated time.
The caller passes the time. A page is any hashable value: benchmarks pass one opaque id per
page, the worker passes the page's token ids (`pages_of`).

The cache is a tree of single pages. Two facts keep the work per request small: only leaves
are evicted, so pinning and touching the deepest page of a request holds and refreshes all
pages before it; and a page that loses its last child takes over that child's time of use.

A page is in device memory or, after a demotion, in host memory, never in both; an engine may
keep a host copy of a device page, which makes no difference to consumers. Pages on the
device are closed under prefixes, and so are all pages together, after every single event.
Pages that do not fit because all others are pinned are not kept: capacities are never
exceeded.
"""

from collections.abc import Sequence

import msgspec

from extproc.simulator.cache_events import (
    DEFAULT_NAMESPACE,
    CacheEvent,
    Cleared,
    Medium,
    Namespace,
    Page,
    Removed,
    Stored,
)
from extproc.simulator.radix_nodes import (
    LeafQueue,
    Node,
    Root,
    is_gpu_leaf,
    is_host_leaf,
    root_of,
)

__all__ = ["Lease", "Match", "RadixCache"]


class Match(msgspec.Struct, frozen=True):
    """Number of leading prompt tokens that are held, by tier; `host` continues `gpu`."""

    gpu: int
    host: int

    @property
    def tokens(self) -> int:
        return self.gpu + self.host


class Lease:
    """A request's hold on its pages, until it is released.

    `cached` is the match at the time of `acquire`; its host part is on the device now.
    """

    __slots__ = ("_depth", "_node", "_root", "cached")

    def __init__(self, root: Root) -> None:
        self.cached = Match(0, 0)
        self._root = root
        self._node: Node = root
        self._depth = 0  # number of pages up to and including the node


class RadixCache:
    """The pages of one rank, evicted least recently used first, and only from the leaves.

    Capacities are in tokens; with `host_capacity_tokens` 0 evicted pages are lost. Events
    collect until `take_events`; with `record_events` False there are no events. As in an
    engine, the first event says that the cache is empty.
    """

    def __init__(
        self,
        *,
        capacity_tokens: int,
        page_size: int,
        host_capacity_tokens: int = 0,
        record_events: bool = True,
    ) -> None:
        self.page_size = page_size
        self._capacity = capacity_tokens // page_size
        self._host_capacity = host_capacity_tokens // page_size
        self._records = record_events
        self._events: list[CacheEvent] = []
        self.flush()

    @property
    def used_tokens(self) -> int:
        """Tokens in device memory, pinned ones included."""
        return self._gpu_pages * self.page_size

    @property
    def host_used_tokens(self) -> int:
        return self._host_pages * self.page_size

    def take_events(self) -> list[CacheEvent]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def flush(self) -> None:
        """Empty the cache; earlier leases hold nothing then and may still be released."""
        self._roots: dict[Namespace, Root] = {}
        self._gpu_pages = 0
        self._host_pages = 0
        self._gpu_leaves = LeafQueue(is_gpu_leaf)
        self._host_leaves = LeafQueue(is_host_leaf)
        if self._records:
            self._events.append(Cleared())

    def match(self, pages: Sequence[Page], namespace: Namespace = DEFAULT_NAMESPACE) -> Match:
        """The match of these pages now; changes nothing."""
        node: Node | None = self._roots.get(namespace)
        gpu = host = 0
        for page in pages:
            if node is None or (node := node.children.get(page)) is None:
                break
            if node.on_gpu:
                gpu += 1
            else:
                host += 1
        return Match(gpu * self.page_size, host * self.page_size)

    def acquire(
        self, pages: Sequence[Page], now: float, namespace: Namespace = DEFAULT_NAMESPACE
    ) -> Lease:
        """Hold the cached part of these pages; host pages are moved back to the device.

        The order of eviction is as good as the `now` of this and the other methods.
        """
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Root(namespace)
        lease = Lease(root)
        root.pins += 1
        gpu = self._descend(lease, pages)
        lease._node.used_at = now
        self._promote(lease, pages, now)
        lease.cached = Match(gpu * self.page_size, (lease._depth - gpu) * self.page_size)
        return lease

    def insert(self, lease: Lease, pages: Sequence[Page], now: float) -> None:
        """Store and hold these pages, which begin with those that the lease holds."""
        if not self._is_live(lease):
            return
        self._descend(lease, pages)
        lease._node.used_at = now
        self._promote(lease, pages, now)
        new = pages[lease._depth :]
        # A host page that does not fit on the device ends the chain that can be stored.
        if new and new[0] not in lease._node.children:
            self._append(lease, new[: self._make_room(len(new))], now)

    def release(self, lease: Lease, now: float, pages: Sequence[Page] | None = None) -> None:
        """Release the lease; `pages`, of prompt and output together, are stored as by `insert`."""
        if not self._is_live(lease):
            return
        if pages is not None:
            self.insert(lease, pages, now)
        lease._node.used_at = now
        self._unpin(lease._node)
        self._forget_if_empty(lease._root)

    def _is_live(self, lease: Lease) -> bool:
        return self._roots.get(lease._root.namespace) is lease._root

    def _descend(self, lease: Lease, pages: Sequence[Page]) -> int:
        """Move the lease down to the last of the pages on the device; returns its depth."""
        node = lease._node
        depth = lease._depth
        for page in pages[depth:]:
            child = node.children.get(page)
            if child is None or not child.on_gpu:
                break
            node = child
            depth += 1
        self._move(lease, node, depth)
        return depth

    def _move(self, lease: Lease, node: Node, depth: int) -> None:
        if node is lease._node:
            return
        node.pins += 1
        left, lease._node, lease._depth = lease._node, node, depth
        self._unpin(left)

    def _promote(self, lease: Lease, pages: Sequence[Page], now: float) -> None:
        """Move the host pages that continue the lease to the device, as many as fit."""
        wanted: list[Node] = []
        node = lease._node
        for page in pages[lease._depth :]:
            child = node.children.get(page)
            if child is None:
                break
            wanted.append(child)
            node = child
        if not wanted:
            return
        wanted[-1].used_at = now
        self._host_pages -= len(wanted)
        for node in wanted:  # in neither memory, so that eviction cannot choose them
            node.on_host = False
        room = self._make_room(len(wanted))
        self._take_back(wanted[room:])
        if chain := wanted[:room]:
            self._enter_gpu(chain)
            self._record_stored(lease._root, chain, "GPU")
            self._record_removed([node.hash for node in reversed(chain)], "CPU_PINNED")
            self._move(lease, chain[-1], lease._depth + room)
            chain[-1].used_at = now

    def _take_back(self, chain: list[Node]) -> None:
        """Put the pages that did not fit on the device back on the host, if they fit there."""
        self._host_pages += len(chain)
        for node in chain:
            node.on_host = True
        if chain and not chain[-1].children:
            self._host_leaves.push(chain[-1])
        self._drop_from_host(self._host_pages - self._host_capacity)

    def _append(self, lease: Lease, pages: Sequence[Page], now: float) -> None:
        """Add new pages below the lease; the caller has made room for them."""
        node = lease._node
        chain = []
        for page in pages:
            child = Node(node, page, hash((node.hash, page)), now)
            node.children[page] = child
            node.gpu_children += 1
            chain.append(child)
            node = child
        self._gpu_pages += len(chain)
        if chain:
            self._record_stored(lease._root, chain, "GPU")
            self._move(lease, node, lease._depth + len(chain))

    def _make_room(self, pages: int) -> int:
        """Evict until this number of pages fits on the device; returns how many fit."""
        missing = pages - (self._capacity - self._gpu_pages)
        if missing > 0:
            self._evict(missing)
        return min(pages, self._capacity - self._gpu_pages)

    def _evict(self, count: int) -> None:
        victims: list[Node] = []
        node = self._gpu_leaves.pop()
        while node is not None:
            victims.append(node)
            parent = self._leave_gpu(node)
            if len(victims) == count:
                self._offer(parent)
                break
            leaves = self._gpu_leaves
            node = leaves.pop_or(parent) if is_gpu_leaf(parent) else leaves.pop()
        if not victims:
            return
        # The deepest come first: pages that do not fit on the host leave before their parents.
        lost = max(0, len(victims) - self._host_capacity)
        self._drop_from_host(len(victims) - lost + self._host_pages - self._host_capacity)
        self._demote(victims[lost:])
        self._record_removed([node.hash for node in victims], "GPU")
        for node in victims[:lost]:
            self._detach(node)

    def _demote(self, nodes: list[Node]) -> None:
        """Put these pages, the deepest first, into host memory."""
        self._host_pages += len(nodes)
        chain: list[Node] = []
        for node in reversed(nodes):
            node.on_host = True
            if chain and node.parent is not chain[-1]:
                self._record_stored(root_of(chain[0]), chain, "CPU_PINNED")
                chain = []
            chain.append(node)
            if not node.children:
                self._host_leaves.push(node)
        if chain:
            self._record_stored(root_of(chain[0]), chain, "CPU_PINNED")

    def _drop_from_host(self, count: int) -> None:
        dropped: list[int] = []
        while len(dropped) < count and (node := self._host_leaves.pop()):
            self._host_pages -= 1
            dropped.append(node.hash)
            self._detach(node)
        self._record_removed(dropped, "CPU_PINNED")

    def _enter_gpu(self, chain: list[Node]) -> None:
        self._gpu_pages += len(chain)
        for node in chain:
            node.on_gpu = True
            assert node.parent is not None  # noqa: S101  # roots are never on the host
            node.parent.gpu_children += 1

    def _leave_gpu(self, node: Node) -> Node:
        """Remove the page from the device; returns its parent, which may be a leaf now."""
        node.on_gpu = False
        self._gpu_pages -= 1
        parent = node.parent
        assert parent is not None  # noqa: S101  # roots are never leaves
        parent.gpu_children -= 1
        if node.used_at > parent.used_at:
            parent.used_at = node.used_at
        return parent

    def _detach(self, node: Node) -> None:
        """Remove a page without children from the tree."""
        parent = node.parent
        assert parent is not None  # noqa: S101  # roots are never leaves
        node.parent = None
        del parent.children[node.page]
        if isinstance(parent, Root):
            self._forget_if_empty(parent)
        elif parent.on_host and not parent.children:
            parent.used_at = max(parent.used_at, node.used_at)
            self._host_leaves.push(parent)

    def _forget_if_empty(self, root: Root) -> None:
        if not root.children and not root.pins and self._roots.get(root.namespace) is root:
            del self._roots[root.namespace]

    def _unpin(self, node: Node) -> None:
        node.pins -= 1
        self._offer(node)

    def _offer(self, node: Node) -> None:
        """Queue a page for eviction if it is an unpinned leaf on the device."""
        if is_gpu_leaf(node):
            self._gpu_leaves.push(node)

    def _record_stored(self, root: Root, chain: list[Node], medium: Medium) -> None:
        if not self._records:
            return
        parent = chain[0].parent
        self._events.append(
            Stored(
                hashes=[node.hash for node in chain],
                parent=None if parent is None or parent is root else parent.hash,
                pages=[node.page for node in chain],
                medium=medium,
                namespace=root.namespace,
            )
        )

    def _record_removed(self, hashes: list[int], medium: Medium) -> None:
        if self._records and hashes:
            self._events.append(Removed(hashes=hashes, medium=medium))
