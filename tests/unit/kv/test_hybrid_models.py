"""The index against a model of vLLM's block pool: groups of layers, duplicate blocks and salts.

The model keeps blocks as vLLM does: a pool for all groups, a queue of free blocks of which the
first is taken and loses its hash, and several blocks with one hash.
"""

from collections import OrderedDict
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct

from extproc.kv.event_applier import EventApplier
from extproc.kv.index import PrefixIndex
from extproc.kv.prefix_hash import PrefixHasher

_SIZE = 2
_Key = tuple[int, str, tuple[int, ...]]  # group, salt, tokens up to the end of the block


class Group(Struct, frozen=True):
    kind: str
    window: int | None = None
    keeps_all: bool = False

    @property
    def needed(self) -> int | None:
        if self.kind == "mamba":
            return 1
        return None if self.window is None else max(1, -(-(self.window - 1) // _SIZE))

    def keeps(self, end: int, tokens: int) -> bool:
        """Whether the block that ends there is kept, after a prompt of so many tokens.

        Only what a request with the same prompt needs, which computes the last token again.
        """
        last = (tokens - 1) // _SIZE
        needed = self.needed
        return needed is None or self.keeps_all or last - needed < end <= last


FULL, WINDOW, STATE = Group("full_attention"), Group("sliding_window", 4), Group("mamba")
MODELS = (
    (FULL,),
    (WINDOW, FULL),
    (FULL, WINDOW),
    (Group("sliding_window", 2), FULL, Group("sliding_window", 7)),
    (FULL, Group("mla_attention")),
    (STATE, FULL),
    (Group("sliding_window", 4, keeps_all=True), FULL),
    (Group("chunked_local_attention"), FULL),
)


class Engine:
    """The block pool of one rank; `events` are those that it has not published yet."""

    def __init__(self, groups: tuple[Group, ...], blocks: int) -> None:
        self.groups = groups
        self.keys: list[_Key | None] = [None] * blocks
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self.cached: dict[_Key, list[int]] = {}
        self.events: list[dict[str, Any]] = []

    def reusable(self, salt: str, tokens: list[int]) -> int:
        """How many whole blocks of the prompt need not be computed."""
        found, before = len(tokens) // _SIZE, -1
        while found != before:
            before = found
            for number, group in enumerate(self.groups):
                if group.kind != "chunked_local_attention":
                    found = self._reusable(number, group.needed, salt, tokens, found)
        return found

    def _reusable(
        self, number: int, needed: int | None, salt: str, tokens: list[int], most: int
    ) -> int:
        held = [
            (number, salt, tuple(tokens[: end * _SIZE])) in self.cached
            for end in range(1, most + 1)
        ]
        for length in range(most, 0, -1):
            last = held[:length] if needed is None else held[max(0, length - needed) : length]
            if all(last):
                return length
        return 0

    def run(self, prompts: list[tuple[str, list[int]]]) -> None:
        """Requests that are computed at the same time: blocks of one are not reused by another."""
        known = [self.reusable(salt, tokens) for salt, tokens in prompts]
        used: list[list[int]] = []
        for (salt, tokens), reused in zip(prompts, known, strict=True):
            mine: list[int] = []
            for number, group in enumerate(self.groups):
                first = 0 if group.needed is None else max(0, reused - group.needed)
                for end in range(first + 1, reused + 1):
                    key = (number, salt, tuple(tokens[: end * _SIZE]))
                    for block in self.cached.get(key, [])[:1]:
                        self.free.pop(block, None)
                        mine.append(block)
            used.append(mine)
        for (salt, tokens), reused, mine in zip(prompts, known, used, strict=True):
            blocks = len(self.groups) * (len(tokens) // _SIZE - reused)
            if blocks > len(self.free):
                continue  # A request waits until there are blocks for all groups.
            stored = [
                self._compute(number, salt, tokens, reused, mine)
                for number in range(len(self.groups))
            ]
            if len(tokens) // _SIZE > reused:
                for number, keys in enumerate(stored):
                    self._publish(number, salt, tokens, reused * _SIZE, keys)
        for mine in used:
            for block in reversed(mine):
                self.free[block] = None

    def _compute(
        self, number: int, salt: str, tokens: list[int], reused: int, mine: list[int]
    ) -> list[_Key]:
        ends = range(reused + 1, len(tokens) // _SIZE + 1)
        stored: list[_Key] = []
        for end in ends:
            block, _ = self.free.popitem(last=False)
            self._forget(block)
            mine.append(block)
            if not self.groups[number].keeps(end, len(tokens)):
                continue
            key = (number, salt, tuple(tokens[: end * _SIZE]))
            self.keys[block] = key
            self.cached.setdefault(key, []).append(block)
            stored.append(key)
        return stored

    def _publish(
        self, number: int, salt: str, tokens: list[int], start: int, stored: list[_Key]
    ) -> None:
        group, parent = self.groups[number], tuple(tokens[:start])
        self.events.append(
            {
                "type": "BlockStored",
                "block_hashes": [_name(key) for key in stored],
                "parent_block_hash": _name((number, salt, parent)) if parent else None,
                # Also those of blocks that are skipped.
                "token_ids": tokens[start : len(tokens) // _SIZE * _SIZE],
                "block_size": _SIZE,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "extra_keys": [[salt] if salt and len(key[2]) == _SIZE else None for key in stored],
                "group_idx": number,
                "kv_cache_spec_kind": group.kind,
                "kv_cache_spec_sliding_window": group.window,
            }
        )

    def _forget(self, block: int) -> None:
        key, self.keys[block] = self.keys[block], None
        if key is None:
            return
        self.cached[key].remove(block)
        if not self.cached[key]:
            del self.cached[key]
        event = {"type": "BlockRemoved", "block_hashes": [_name(key)], "medium": "GPU"}
        self.events.append(event | {"group_idx": key[0]})

    def clear(self) -> None:
        self.keys = [None] * len(self.keys)
        self.cached.clear()
        self.events.append({"type": "AllBlocksCleared"})


def _name(key: _Key) -> int:
    """The same in all groups."""
    return hash(key[1:]) & (2**64 - 1)


class Belief:
    """What the index knows of the engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.index = PrefixIndex(PrefixHasher(secret=5), 1_000_000)
        self.pages = self.index.add("http://w:1", _SIZE)
        self.applier = EventApplier(
            self.index, self.pages, self.index.hasher.seed, lambda _: None, lambda: None
        )

    def read(self) -> None:
        for _ in self.applier.apply(msgspec.msgpack.encode([1.5, self.engine.events, 0])):
            pass
        self.engine.events = []

    def reusable(self, salt: str, tokens: list[int]) -> int:
        seed = self.index.hasher.seed(salt or None, None) if salt else 0
        found = self.index.match(np.array(tokens, np.uint64), [self.pages], seed)
        return found[self.pages].pages if self.pages in found else 0


_TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=12)
_PROMPT = st.tuples(st.sampled_from(["", "", "tenant"]), _TOKENS)


@settings(max_examples=400)
@given(
    groups=st.sampled_from(MODELS),
    blocks=st.integers(8, 40),
    steps=st.lists(st.one_of(st.lists(_PROMPT, min_size=1, max_size=3), st.none()), max_size=12),
    asked=st.lists(_PROMPT, min_size=1, max_size=6),
)
def test_what_is_believed_is_what_can_be_reused(
    groups: tuple[Group, ...],
    blocks: int,
    steps: list[list[tuple[str, list[int]]] | None],
    asked: list[tuple[str, list[int]]],
) -> None:
    engine = Engine(groups, blocks)
    belief = Belief(engine)
    for step in steps:
        if step is None:
            engine.clear()
        else:
            engine.run(step)
        belief.read()
        for salt, tokens in [*asked, *(step or [])]:
            assert belief.reusable(salt, tokens) == engine.reusable(salt, tokens)


def _after(engine: Engine, *prompts: list[int]) -> Belief:
    belief = Belief(engine)
    for prompt in prompts:
        engine.run([("", prompt)])
        belief.read()
    return belief


def test_the_full_attention_group_is_followed_whatever_its_number() -> None:
    engine = Engine((WINDOW, FULL), 40)
    belief = _after(engine, [0, 1, 0, 1, 0, 1])
    assert belief.reusable("", [0, 1, 0, 1, 0, 1]) == engine.reusable("", [0, 1, 0, 1, 0, 1]) == 2
    assert belief.pages.page_count == 3


def test_a_prefix_whose_window_is_gone_is_not_believed() -> None:
    engine = Engine((WINDOW, FULL), 40)
    belief = _after(engine, [0, 1] * 4)
    window = next(key for key in engine.cached if key[0] == 0 and len(key[2]) == 3 * _SIZE)
    engine._forget(engine.cached[window][0])
    belief.read()
    assert belief.reusable("", [0, 1] * 4) == engine.reusable("", [0, 1] * 4) == 0


def test_a_block_that_is_held_twice_stays_after_the_first_removal() -> None:
    engine = Engine((FULL,), 10)
    belief = Belief(engine)
    engine.run([("", [0, 1]), ("", [0, 1])])
    belief.read()
    (blocks,) = list(engine.cached.values())
    assert len(blocks) == 2
    engine._forget(blocks[0])
    belief.read()
    assert belief.reusable("", [0, 1]) == 1
    engine._forget(blocks[0])
    belief.read()
    assert belief.reusable("", [0, 1]) == 0
    assert belief.pages.repeats == {}


def test_salts_are_namespaces() -> None:
    engine = Engine((FULL,), 20)
    belief = Belief(engine)
    engine.run([("tenant", [0, 1, 0, 1])])
    belief.read()
    assert belief.reusable("tenant", [0, 1, 0, 1]) == 2
    assert belief.reusable("", [0, 1, 0, 1]) == belief.reusable("other", [0, 1, 0, 1]) == 0


@pytest.mark.parametrize("more", [(), (Group("sliding_window", 9, keeps_all=True),)])
def test_a_model_with_windows_only_is_followed_after_a_while(more: tuple[Group, ...]) -> None:
    engine = Engine((Group("sliding_window", 4, keeps_all=True), *more), 400)
    belief = _after(engine, *([[n % 2, 1, n // 2 % 2, n // 4 % 2, 5, n] for n in range(40)]))
    assert belief.reusable("", [0, 1, 0, 0, 5, 0]) == 3
    belief.index.drop(belief.pages)
    assert belief.index.page_count == 0


def test_blocks_of_the_offloading_connector_stay_on_the_host() -> None:
    engine = Engine((FULL,), 20)
    belief = _after(engine, [0, 1, 0, 1])
    names = [_name(key) for key in engine.cached]
    placed: dict[str, Any] = {"type": "BlockStored", "block_hashes": [*names, 77]}
    placed |= {"parent_block_hash": None, "token_ids": [], "block_size": 0, "medium": "CPU"}
    removed = {"type": "BlockRemoved", "block_hashes": names[::-1], "medium": "GPU"}
    engine.events = [placed | {"group_idx": 0}, removed | {"group_idx": 0}]
    belief.read()
    found = belief.index.match(np.array([0, 1, 0, 1], np.uint64), [belief.pages])
    assert found[belief.pages] == (2, 0, 2)
    assert belief.index.counts.orphans == 1


def test_a_dropped_rank_leaves_nothing_of_its_groups() -> None:
    belief = _after(Engine((WINDOW, FULL, STATE), 60), [0, 1] * 5, [1, 1] * 5)
    assert belief.index.page_count > belief.pages.page_count
    belief.index.drop(belief.pages)
    while belief.index.scrub(1000):
        pass
    assert (belief.index.page_count, belief.index.retired_pages) == (0, 0)
    assert len(belief.index._ownership.held) == 0
