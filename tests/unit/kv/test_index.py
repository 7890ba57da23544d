"""Tests the index against a model that keeps whole prompts and compares every page."""

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from extproc.kv.index import PrefixIndex
from extproc.kv.prefix_hash import PrefixHasher, TokenIds
from extproc.kv.rank_pages import Overlap, RankPages

_PAGE = 2
# Few different tokens, so that prompts share prefixes and branch often.
_PROMPTS = st.lists(st.integers(0, 1), min_size=2, max_size=12)


def _ids(*tokens: int) -> TokenIds:
    return np.array(tokens, dtype=np.uint64)


def _name(tokens: tuple[int, ...]) -> int:
    """The engine's id of a page: any function of all tokens up to the end of the page."""
    return hash(tokens) & (2**64 - 1)


def _index(max_pages: int = 1_000_000) -> PrefixIndex:
    return PrefixIndex(PrefixHasher(secret=3), max_pages)


class _Model(RuleBasedStateMachine):
    """Three ranks with pages of two tokens, and events in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.index = _index()
        self.ranks = [self.index.add(f"worker-{n}", _PAGE) for n in range(3)]
        # For each rank: prefix -> tiers it is on.
        self.held: list[dict[tuple[int, ...], set[int]]] = [{}, {}, {}]

    def _known(self, who: int, prefix: tuple[int, ...]) -> bool:
        """Whether the page is held, or held pages follow it."""
        return any(other[: len(prefix)] == prefix for other in self.held[who])

    @rule(who=st.integers(0, 2), prompt=_PROMPTS, skip=st.integers(0, 3), tier=st.integers(0, 2))
    def store(self, who: int, prompt: list[int], skip: int, tier: int) -> None:
        """Store the pages of a prompt from `skip` on as one chain; its parent may be unknown."""
        pages = len(prompt) // _PAGE
        skip = min(skip, pages - 1)
        prefixes = [tuple(prompt[: (n + 1) * _PAGE]) for n in range(pages)]
        self.index.store(
            self.ranks[who],
            [_name(prefix) for prefix in prefixes[skip:]],
            _name(prefixes[skip - 1]) if skip else None,
            _ids(*prompt[skip * _PAGE : pages * _PAGE]),
            _PAGE,
            tier,
        )
        known = not skip or self._known(who, prefixes[skip - 1])
        for prefix in prefixes[skip:]:
            known = known or self._known(who, prefix)
            if known:
                self.held[who].setdefault(prefix, set()).add(tier)

    @rule(who=st.integers(0, 2), data=st.data(), tier=st.sampled_from([None, 0, 1, 2]))
    def remove(self, who: int, data: st.DataObject, tier: int | None) -> None:
        """Remove any page: in the middle of a prompt, too, and one that is not held."""
        choices = [*self.held[who], (9, 9)]
        prefix = data.draw(st.sampled_from(choices))
        self.index.remove(self.ranks[who], [_name(prefix)], tier)
        tiers = self.held[who].get(prefix, set())
        tiers.difference_update({0, 1, 2} if tier is None else {tier})
        if not tiers:
            self.held[who].pop(prefix, None)

    @rule(who=st.integers(0, 2))
    def clear(self, who: int) -> None:
        self.index.clear(self.ranks[who])
        self.held[who].clear()

    @rule(who=st.integers(0, 2))
    def restart_as_another(self, who: int) -> None:
        self.index.drop(self.ranks[who])
        self.ranks[who] = self.index.add("again", _PAGE)
        self.held[who].clear()

    @precondition(lambda self: self.index.retired_pages)
    @rule(pages=st.integers(1, 3))
    def scrub(self, pages: int) -> None:
        self.index.scrub(pages)

    @rule(prompt=_PROMPTS)
    def match(self, prompt: list[int]) -> None:
        self._check(prompt)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=4))
    def match_what_a_rank_holds(self, data: st.DataObject, more: list[int]) -> None:
        held = [prefix for pages in self.held for prefix in pages]
        self._check([*data.draw(st.sampled_from(held)), *more])

    def _check(self, prompt: list[int]) -> None:
        found = self.index.match(_ids(*prompt), self.ranks)
        prefixes = [tuple(prompt[: n * _PAGE]) for n in range(1, len(prompt) // _PAGE + 1)]
        for who, rank_pages in enumerate(self.ranks):
            held = self.held[who]
            pages = 0
            while pages < len(prefixes) and prefixes[pages] in held:
                pages += 1
            assert found.get(rank_pages, Overlap(0, 0, 0)).pages == pages

    @invariant()
    def pages_are_counted(self) -> None:
        for rank_pages, held in zip(self.ranks, self.held, strict=True):
            assert rank_pages.page_count == len(held)
            assert rank_pages.pages_below[1] == sum(0 not in tiers for tiers in held.values())
            assert rank_pages.pages_below[2] == sum(min(tiers) == 2 for tiers in held.values())
        assert self.index.page_count == sum(len(held) for held in self.held)

    def teardown(self) -> None:
        """Check that nothing is left once all ranks are dropped and swept out."""
        for rank_pages in self.ranks:
            self.index.drop(rank_pages)
        while self.index.scrub(2):
            pass
        assert self.index.page_count == 0
        assert (self.index.missing_pages, self.index.retired_pages) == (0, 0)
        tables = self.index._ownership
        assert [len(table) for table in (tables.held, *tables.below)] == [0, 0, 0, 0]


_Model.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestAgainstModel: Any = _Model.TestCase


def _chain(index: PrefixIndex, rank_pages: RankPages, tokens: TokenIds, tier: int = 0) -> list[int]:
    size = rank_pages.page_size
    ids = [_name(tuple(tokens[: n + size].tolist())) for n in range(0, len(tokens), size)]
    index.store(rank_pages, ids, None, tokens, size, tier)
    return ids


def test_each_rank_has_its_own_longest_prefix() -> None:
    index = _index()
    tokens = np.arange(640, dtype=np.uint64)
    ranks = [index.add(str(pages), 16) for pages in range(41)]
    for pages, rank_pages in enumerate(ranks):
        if pages:
            _chain(index, rank_pages, tokens[: pages * 16])
    found = index.match(tokens, ranks)
    assert {int(rank_pages.worker): overlap.pages for rank_pages, overlap in found.items()} == {
        pages: pages for pages in range(1, 41)
    }


def test_workers_with_different_page_sizes_are_matched_together() -> None:
    index = _index()
    tokens = np.arange(100, dtype=np.uint64)
    one, sixteen = index.add("one", 1), index.add("sixteen", 16)
    _chain(index, one, tokens[:50])
    _chain(index, sixteen, tokens[:96])
    found = index.match(tokens, [one, sixteen])
    assert (found[one].pages, found[sixteen].pages) == (50, 6)


def test_bigram_pages_match_one_token_further() -> None:
    index = _index()
    rank_pages = index.add("eagle", 4, bigram=True)
    tokens = np.arange(1, 20, dtype=np.uint64)
    units = tokens[:-1] | tokens[1:] << np.uint64(32)
    index.store(rank_pages, [1, 2], None, units[:8], 4)
    index.store(rank_pages, [3], 2, units[8:12], 4)
    # 13 tokens make 12 units: three pages; 12 tokens only two.
    assert index.match(tokens[:13], [rank_pages])[rank_pages].pages == 3
    assert index.match(tokens[:12], [rank_pages])[rank_pages].pages == 2


def test_namespaces_do_not_match_each_other() -> None:
    index = _index()
    rank_pages = index.add("w", 2)
    salted = index.hasher.seed("tenant")
    index.store(rank_pages, [1], None, _ids(1, 2), 2, seed=salted)
    assert not index.match(_ids(1, 2), [rank_pages])
    assert index.match(_ids(1, 2), [rank_pages], salted)[rank_pages].pages == 1
    # Children continue from their parent, so they stay in its namespace.
    index.store(rank_pages, [2], 1, _ids(3, 4), 2)
    assert index.match(_ids(1, 2, 3, 4), [rank_pages], salted)[rank_pages].pages == 2


def test_an_overlap_counts_each_tier() -> None:
    index = _index()
    rank_pages = index.add("w", 1)
    ids = _chain(index, rank_pages, np.arange(10, dtype=np.uint64))
    index.store(rank_pages, ids[6:], ids[5], np.arange(6, 10, dtype=np.uint64), 1, tier=1)
    index.remove(rank_pages, ids[:5:-1], tier=0)
    index.store(rank_pages, ids[9:], ids[8], _ids(9), 1, tier=2)
    index.remove(rank_pages, ids[9:], tier=1)
    assert index.match(np.arange(10, dtype=np.uint64), [rank_pages])[rank_pages] == (10, 6, 9)


def test_a_dropped_rank_is_gone_at_once_and_a_new_rank_inherits_nothing() -> None:
    index = _index()
    tokens = np.arange(64, dtype=np.uint64)
    old = index.add("old", 1)
    _chain(index, old, tokens)
    index.drop(old)
    index.drop(old)
    young = index.add("young", 1)
    assert not index.match(tokens, [old, young])
    while index.scrub(10):
        assert not index.match(tokens, [index.add("next", 1)])
    assert not index.match(tokens, [index.add("last", 1)])
    # Late events of a dropped rank change nothing.
    index.store(old, [1], None, _ids(1), 1)
    assert index.page_count == 0


def test_pages_over_the_limit_are_kept_out_and_counted() -> None:
    index = _index(max_pages=3)
    rank_pages = index.add("w", 1)
    ids = _chain(index, rank_pages, np.arange(5, dtype=np.uint64))
    assert index.match(np.arange(5, dtype=np.uint64), [rank_pages])[rank_pages].pages == 3
    assert (index.page_count, index.counts.over_limit, index.counts.orphans) == (3, 1, 1)
    # A page that is held may still move to another tier.
    index.store(rank_pages, ids[2:3], ids[1], _ids(2), 1, tier=1)
    index.remove(rank_pages, ids[2:3], tier=0)
    assert index.match(np.arange(5, dtype=np.uint64), [rank_pages])[rank_pages] == (3, 2, 3)


def test_a_prefix_held_under_two_ids_stays_until_both_are_removed() -> None:
    index = _index()
    rank_pages = index.add("w", 1)
    for names in ([1, 2], [11, 12]):
        index.store(rank_pages, names, None, _ids(5, 6), 1)
    index.remove(rank_pages, [2, 1])
    assert index.match(_ids(5, 6), [rank_pages])[rank_pages].pages == 2
    index.remove(rank_pages, [12, 11])
    assert not index.match(_ids(5, 6), [rank_pages])


@pytest.mark.parametrize(
    ("ids", "tokens", "block_size"),
    [([1, 2], 3, 2), ([1], 0, 0), ([1], 2, -2), ([], 3, 1)],
)
def test_wrong_sizes_store_nothing(ids: list[int], tokens: int, block_size: int) -> None:
    index = _index()
    rank_pages = index.add("w", 2)
    index.store(rank_pages, ids, None, np.ones(tokens, dtype=np.uint64), block_size)
    assert index.page_count == 0
    assert index.counts.mismatched == len(ids)


def test_removals_of_unknown_pages_are_counted() -> None:
    index = _index()
    rank_pages = index.add("w", 2)
    index.remove(rank_pages, [1, 2, 3])
    assert index.counts.unknown_removals == 3


def test_a_page_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        _index().add("w", 0)
