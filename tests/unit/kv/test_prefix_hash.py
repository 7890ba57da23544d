"""Tests that whole prompts, pages and chains continued from a parent have the same sums."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.kv.prefix_hash import POSITION_MAX_TOKENS, PrefixHasher

_TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=200).map(
    lambda ids: np.array(ids, dtype=np.uint64)
)
_HASHER = PrefixHasher(secret=7)


@given(_TOKENS, st.integers(1, 70), st.integers(0, 2**64 - 1), st.integers(0, 1000))
def test_page_sums_are_the_sums_page_by_page(
    tokens: np.ndarray, page_size: int, start: int, position: int
) -> None:
    sums = _HASHER.page_sums(start, position, tokens, page_size)
    assert len(sums) == len(tokens) // page_size
    total = start
    for number, found in enumerate(sums.tolist()):
        page = tokens[number * page_size : (number + 1) * page_size]
        total = _HASHER.extend(total, position + number * page_size, page)
        assert found == total


def test_a_prompt_and_its_extension_by_token_zero_differ() -> None:
    zeros = np.zeros(64, dtype=np.uint64)
    assert len(set(_HASHER.page_sums(0, 0, zeros, 1).tolist())) == 64


def test_the_order_of_tokens_matters() -> None:
    one, other = np.array([1, 2], dtype=np.uint64), np.array([2, 1], dtype=np.uint64)
    assert _HASHER.extend(0, 0, one) != _HASHER.extend(0, 0, other)


def test_namespaces_have_different_seeds() -> None:
    seeds = {
        _HASHER.seed(),
        _HASHER.seed("a"),
        _HASHER.seed("a", "b"),
        _HASHER.seed(None, "a"),
        _HASHER.seed(None, 1),
        _HASHER.seed("1"),
    }
    assert len(seeds) == 6
    assert _HASHER.seed("a") == _HASHER.seed("a")


def test_each_process_has_keys_of_its_own() -> None:
    tokens = np.arange(10, dtype=np.uint64)
    assert PrefixHasher().extend(0, 0, tokens) != PrefixHasher().extend(0, 0, tokens)


def test_drawing_more_keys_does_not_change_the_first_ones() -> None:
    hasher = PrefixHasher(secret=7)
    tokens = np.arange(100_000, dtype=np.uint64)
    before = hasher.page_sums(0, 0, tokens[:64], 16).tolist()
    hasher.page_sums(0, 0, tokens, 16)
    assert hasher.page_sums(0, 0, tokens[:64], 16).tolist() == before


def test_positions_beyond_the_limit_are_refused() -> None:
    with pytest.raises(ValueError, match="more than"):
        _HASHER.extend(0, POSITION_MAX_TOKENS, np.ones(1, dtype=np.uint64))
