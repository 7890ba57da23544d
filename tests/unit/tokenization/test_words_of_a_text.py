"""Texts encoded word by word have the tokens of the whole, and words are kept within bounds."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.tokenization.pieces import _CUT_GPT_2, _CUT_GPT_4, _WORDS, split_plan
from extproc.tokenization.text_encoder import _NEW_WORDS_MAX, TextEncoder
from extproc.tokenization.word_cache import WordCache
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


@pytest.fixture(scope="module", params=[llama, qwen, o200k, gpt2])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> TextEncoder:
    return TextEncoder(tokenizer, 1 << 20)


@settings(max_examples=200)
@given(text=TEXTS)
def test_words_have_the_tokens_of_the_text(tokenizer: Any, encoder: TextEncoder, text: str) -> None:
    encoder.words = WordCache(1 << 20)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    for _ in range(2):  # new, and known
        assert encoder._find_words is not None
        assert b"".join(encoder._encode_new([text])) == b"".join(
            number.to_bytes(4, "little") for number in whole
        )


@pytest.mark.parametrize("cut", [_CUT_GPT_4, _CUT_GPT_2])
@given(text=TEXTS)
def test_words_end_where_a_text_can_be_cut(cut: re.Pattern[str], text: str) -> None:
    words = _WORDS[cut].findall(text)
    assert "".join(words) == text
    places = {match.end() for match in cut.finditer(text)}
    ends = [len("".join(words[:count])) for count in range(1, len(words))]
    assert set(ends) <= places


@pytest.mark.parametrize("token", ["a b", "x\ny", "<s> ", "\n\n"])
def test_tokens_that_could_be_cut_leave_texts_whole(token: str) -> None:
    tokenizer = byte_level_bpe(LLAMA_SPLIT, special([token]))
    assert TextEncoder(tokenizer, 1 << 20)._find_words is None


def test_a_text_of_new_words_only_is_encoded_as_a_whole() -> None:
    tokenizer = llama()
    encoder = TextEncoder(tokenizer, 1 << 20)
    text = " ".join(f"w{number:x}x" for number in range(2 * _NEW_WORDS_MAX))
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    assert encoder.encode(encoder.look_up(text, False)).tolist() == expected
    assert 0 < encoder.words.size_bytes < 20_000


def test_the_words_used_last_stay() -> None:
    cache = WordCache(100 * 240 * 2)
    for number in range(1000):
        cache.put(f"w{number}", b"1234")
        assert cache.get(["w0"]) == [b"1234"]
        assert cache.size_bytes <= 200 * 240
    assert cache.get(["w999", "w1"]) == [b"1234", None]


def test_long_words_and_words_without_room_are_not_kept() -> None:
    cache = WordCache(1 << 20)
    cache.put("x" * 1000, b"1234")
    assert cache.get(["x" * 1000]) == [None]
    none = WordCache(0)
    none.put("a", b"1234")
    assert none.get(["a"]) == [None]


def test_the_plan_of_an_unknown_expression_has_no_words() -> None:
    plan = split_plan(
        {
            "model": {"type": "BPE"},
            "added_tokens": [],
            "pre_tokenizer": {"type": "Whitespace"},
        },
        False,
    )
    assert plan.words is None
