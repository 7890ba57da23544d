"""Tests the index against brute force with what engines do: tiers, namespaces, page sizes, pairs.

test_index.py lets pages come and go in any order; here they keep the order of an engine, leaves
first, unless one evicts out of order on purpose. Then what lies where is no longer defined, and
only the number of pages is compared.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from extproc.kv.index import PrefixIndex
from extproc.kv.prefix_hash import PrefixHasher, TokenIds
from extproc.kv.rank_pages import Overlap, RankPages

_Page = tuple[str, tuple[int, ...]]  # namespace, all tokens up to its end
# Page size, and whether units are pairs; equal ones are matched in one walk.
_SHAPES = ((2, False), (2, False), (3, False), (2, True))
_NAMESPACES = ("", "tenant")
_WHO = st.integers(0, len(_SHAPES) - 1)
_TOKENS = st.lists(st.integers(0, 1), min_size=3, max_size=13)


class _Engine:
    """The pages that one rank holds, and their tiers."""

    def __init__(self, page_size: int, bigram: bool) -> None:
        self.page_size = page_size
        self.bigram = bigram
        self.tiers: dict[_Page, set[int]] = {}
        self.orderly = True

    def pages_of(self, namespace: str, tokens: list[int]) -> list[_Page]:
        count = (len(tokens) - self.bigram) // self.page_size
        ends = [(number + 1) * self.page_size + self.bigram for number in range(count)]
        return [(namespace, tuple(tokens[:end])) for end in ends]

    def units(self, page: _Page) -> list[int]:
        tokens = page[1][-self.page_size - self.bigram :]
        if self.bigram:
            return [one | two << 32 for one, two in pairwise(tokens)]
        return list(tokens)

    def parent(self, page: _Page) -> _Page | None:
        tokens = page[1][: -self.page_size]
        return (page[0], tokens) if len(tokens) >= self.page_size + self.bigram else None

    def children(self, page: _Page) -> list[_Page]:
        return [other for other in self.tiers if self.parent(other) == page]

    def best(self, page: _Page) -> int:
        return min(self.tiers[page])

    def overlap(self, namespace: str, tokens: list[int]) -> Overlap:
        reached = 0
        counts = [0, 0, 0]
        for page in self.pages_of(namespace, tokens):
            if page not in self.tiers:
                break
            reached = max(reached, self.best(page))
            for tier in range(reached, 3):
                counts[tier] += 1
        return Overlap(counts[2], counts[0], counts[1])


def _name(page: _Page) -> int:
    return hash(page) & (2**64 - 1)


class EnginesAndIndex(RuleBasedStateMachine):
    """Four ranks; with `limited` the index has room for a few pages only."""

    @initialize(limited=st.booleans())
    def begin(self, limited: bool) -> None:
        self.limit = 15 if limited else 1_000_000
        self.limited = limited
        self.index = PrefixIndex(PrefixHasher(secret=3), self.limit)
        self.engines = [_Engine(*shape) for shape in _SHAPES]
        self.ranks = [self._add(engine) for engine in self.engines]
        hasher = self.index.hasher
        self.seeds = {"": 0, "tenant": hasher.seed("tenant")}

    def _add(self, engine: _Engine) -> RankPages:
        return self.index.add("w", engine.page_size, bigram=engine.bigram)

    def _store(self, who: int, pages: list[_Page], tier: int) -> None:
        """Store a chain of pages with one event."""
        engine = self.engines[who]
        parent = engine.parent(pages[0])
        units = [unit for page in pages for unit in engine.units(page)]
        self.index.store(
            self.ranks[who],
            [_name(page) for page in pages],
            None if parent is None else _name(parent),
            np.array(units, np.uint64),
            engine.page_size,
            tier,
            self.seeds[pages[0][0]],
        )
        for page in pages:
            engine.tiers.setdefault(page, set()).add(tier)

    def _leave(self, who: int, page: _Page, tier: int) -> None:
        self.index.remove(self.ranks[who], [_name(page)], tier)
        tiers = self.engines[who].tiers[page]
        tiers.discard(tier)
        if not tiers:
            del self.engines[who].tiers[page]

    @rule(who=_WHO, namespace=st.sampled_from(_NAMESPACES), tokens=_TOKENS, again=st.booleans())
    def prefill(self, who: int, namespace: str, tokens: list[int], again: bool) -> None:
        """Store a prompt on the device, from the first missing page on, or `again` from the start.

        What lies further down already is brought back first, as an engine does.
        """
        pages = self.engines[who].pages_of(namespace, tokens)
        held = self.engines[who].tiers
        first = next((n for n, page in enumerate(pages) if 0 not in held.get(page, ())), None)
        if first is None or not self.engines[who].orderly:
            return
        self._store(who, pages if again else pages[first:], 0)

    @precondition(lambda self: any(engine.tiers for engine in self.engines))
    @rule(data=st.data(), whole=st.booleans())
    def demote(self, data: st.DataObject, whole: bool) -> None:
        """Move a leaf of its tier one tier down; with `whole` also the pages that become leaves."""
        who, leaf = self._any_page(data)
        engine = self.engines[who]
        tier = engine.best(leaf)
        page: _Page | None = leaf
        while page is not None and page in engine.tiers and engine.best(page) == tier < 2:
            if any(engine.best(child) <= tier for child in engine.children(page)):
                return
            self._store(who, [page], tier + 1)
            self._leave(who, page, tier)
            page = engine.parent(page) if whole else None

    @precondition(lambda self: any(engine.tiers for engine in self.engines))
    @rule(data=st.data(), copy=st.booleans())
    def promote(self, data: st.DataObject, copy: bool) -> None:
        """Move a page to its parent's tier; with `copy` it stays on the lower tier, too."""
        who, page = self._any_page(data)
        engine = self.engines[who]
        parent = engine.parent(page)
        tier = engine.best(page)
        better = 0 if parent is None else engine.best(parent) if parent in engine.tiers else tier
        if better < tier:
            self._store(who, [page], better)
            if not copy:
                self._leave(who, page, tier)

    @precondition(lambda self: any(engine.tiers for engine in self.engines))
    @rule(data=st.data(), in_order=st.booleans())
    def evict(self, data: st.DataObject, in_order: bool) -> None:
        who, page = self._any_page(data)
        engine = self.engines[who]
        if engine.children(page):
            if in_order:
                return
            engine.orderly = False
        for tier in sorted(engine.tiers[page], reverse=True):
            self._leave(who, page, tier)

    @rule(who=_WHO)
    def clear(self, who: int) -> None:
        self.index.clear(self.ranks[who])
        self._forget(who)

    @rule(who=_WHO)
    def restart_as_another(self, who: int) -> None:
        self.index.drop(self.ranks[who])
        self.ranks[who] = self._add(self.engines[who])
        self._forget(who)

    def _forget(self, who: int) -> None:
        self.engines[who].tiers.clear()
        self.engines[who].orderly = True

    @rule(pages=st.integers(1, 20))
    def scrub(self, pages: int) -> None:
        self.index.scrub(pages)

    @rule()
    def tidy(self) -> None:
        for _ in self.index.tidy():
            pass

    @rule(namespace=st.sampled_from(_NAMESPACES), tokens=_TOKENS)
    def match(self, namespace: str, tokens: list[int]) -> None:
        self._check(namespace, tokens)

    @precondition(lambda self: any(engine.tiers for engine in self.engines))
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=3))
    def match_what_a_rank_holds(self, data: st.DataObject, more: list[int]) -> None:
        _, (namespace, tokens) = self._any_page(data)
        self._check(namespace, [*tokens, *more])

    def _any_page(self, data: st.DataObject) -> tuple[int, _Page]:
        pages = [(who, page) for who, engine in enumerate(self.engines) for page in engine.tiers]
        return data.draw(st.sampled_from(pages))

    def _check(self, namespace: str, tokens: list[int]) -> None:
        prompt: TokenIds = np.array(tokens, np.uint64)
        found = self.index.match(prompt, self.ranks, self.seeds[namespace])
        for engine, rank_pages in zip(self.engines, self.ranks, strict=True):
            overlap = found.get(rank_pages, Overlap(0, 0, 0))
            true = engine.overlap(namespace, tokens)
            if self.limited:
                assert overlap.pages <= true.pages
            elif engine.orderly:
                assert overlap == true
            else:
                assert overlap.pages == true.pages

    @invariant()
    def the_limit_holds(self) -> None:
        index = self.index
        assert index.page_count == sum(rank_pages.page_count for rank_pages in self.ranks)
        assert index.page_count + index.missing_pages <= self.limit
        if not self.limited:
            assert index.page_count == sum(len(engine.tiers) for engine in self.engines)
            assert index.counts.over_limit == index.counts.orphans == 0
            assert index.counts.unknown_removals == 0


TestEnginesAndIndex: Any = EnginesAndIndex.TestCase
TestEnginesAndIndex.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
