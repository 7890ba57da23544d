"""Texts that are encoded word by word have the tokens of the whole text."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.tokenization.caches import WordCache
from extproc.tokenization.pieces import WordPlan, split_plan
from extproc.tokenization.plain_encoder import PlainEncoder, packed
from extproc.tokenization.text_encoder import TextEncoder
from extproc.tokenization.word_encoder import _NEW_MAX, WordEncoder
from tests.unit.tokenization.small_tokenizers import (
    LLAMA_SPLIT,
    byte_level_bpe,
    gpt2,
    llama,
    o200k,
    qwen,
    special,
)

# Blanks and line breaks of every kind, digits, marks, what composes, and words.
LETTERS = " \n\r\t\u00a0\u2028\x1caZé\u0301ß中٣12.,'(<|im_start|>)-\U0001f600"
TEXTS = st.text(alphabet=LETTERS, max_size=60) | st.lists(
    st.sampled_from([" the", "the", "\n", " ", "  ", "n't", " 'S", "1234", " 56", "é", "e\u0301",
                     ".", " (x)", "\n\n", "\nAnd", " \nAnd", "<|end|>", "_a", "\t", "\u00a0b"]),
    max_size=20,
).map("".join)  # fmt: skip


def _words(tokenizer: Any, plain: PlainEncoder | None = None) -> WordEncoder:
    return WordEncoder(plain or PlainEncoder(tokenizer), _plan(tokenizer), 1 << 20)


@cache
def _plan(tokenizer: Any) -> WordPlan:
    plan = split_plan(json.loads(tokenizer.to_str()), False).words
    assert plan is not None
    return plan


@pytest.fixture(scope="module", params=[llama, qwen, o200k, gpt2])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(scope="module")
def words(tokenizer: Any) -> WordEncoder:
    """One for all examples, so that each finds words of others."""
    return _words(tokenizer)


@settings(max_examples=300)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_words_have_the_tokens_of_the_text(
    tokenizer: Any, words: WordEncoder, texts: list[str]
) -> None:
    fresh = _words(tokenizer)
    whole = [packed(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    assert words.encode(texts) == whole
    for _ in range(2):  # new, and known
        assert fresh.encode(texts) == whole


@given(number=st.integers(0, 10**12), before=TEXTS, after=TEXTS)
def test_new_numbers_have_the_tokens_of_the_text(number: int, before: str, after: str) -> None:
    tokenizer = llama()
    words = _words(tokenizer)
    text = f"{before}x ({number}), {after}"
    expected = [packed(tokenizer.encode(text, add_special_tokens=False).ids)]
    assert words.encode([text]) == expected


class _Counting(PlainEncoder):
    texts: list[str]

    def few(self, words: Sequence[str]) -> list[bytes]:
        self.texts += words
        return super().few(words)


def test_numbers_are_cached_by_their_groups_of_digits() -> None:
    tokenizer = llama()
    plain = _Counting(tokenizer)
    plain.texts = []
    words = _words(tokenizer, plain)
    words.encode(["a 123 b (456), c 78 d"])
    plain.texts.clear()
    words.encode(["a 12345678 b (78456), d 456"])
    assert plain.texts == ["784", "56"]


@pytest.mark.parametrize("token", ["a b", "x\ny", "<s> ", "\n\n"])
def test_texts_are_not_cut_into_words_if_an_added_token_could_be_cut(token: str) -> None:
    tokenizer = byte_level_bpe(LLAMA_SPLIT, special([token]))
    assert TextEncoder(tokenizer, 1 << 20)._words is None


def test_a_text_of_only_new_words_is_encoded_as_a_whole() -> None:
    tokenizer = llama()
    encoder = TextEncoder(tokenizer, 1 << 20)
    text = " ".join(f"w{number:x}x" for number in range(2 * _NEW_MAX))
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    assert encoder.encode(encoder.look_up(text, False)).tolist() == expected
    assert 0 < encoder.cache_bytes - encoder.cache.bytes < 20_000


def test_recently_used_words_stay_in_the_cache() -> None:
    cache = WordCache(100 * 240 * 2)
    for number in range(1000):
        cache.put(f"w{number}", b"1234")
        assert cache.get(["w0"]) == [b"1234"]
        assert cache.size_bytes <= 200 * 240
    assert cache.get(["w999", "w1"]) == [b"1234", None]


def test_long_words_are_not_cached_and_zero_bytes_cache_no_words() -> None:
    cache = WordCache(1 << 20)
    cache.put("x" * 1000, b"1234")
    assert cache.get(["x" * 1000]) == [None]
    none = WordCache(0)
    none.put("a", b"1234")
    assert none.get(["a"]) == [None]


def test_an_unknown_expression_has_no_plan_for_words() -> None:
    plan = split_plan(
        {
            "model": {"type": "BPE"},
            "added_tokens": [],
            "pre_tokenizer": {"type": "Whitespace"},
        },
        False,
    )
    assert plan.words is None
