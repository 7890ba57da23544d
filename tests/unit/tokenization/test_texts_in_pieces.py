"""Texts that are encoded in cached pieces have the ids of the whole text."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from extproc.tokenization import text_encoder
from extproc.tokenization.errors import EncodeFailedError, TokenizerError
from extproc.tokenization.pieces import PieceSplitter, SplitPlan, split_plan
from extproc.tokenization.text_encoder import TextEncoder
from tests.unit.tokenization import small_tokenizers as small

CACHE_BYTES = 1 << 20

SAFE: dict[str, Callable[[], Tokenizer]] = {
    "llama": small.llama,
    "qwen": small.qwen,
    "o200k": small.o200k,
    "gpt2": small.gpt2,
    "deepseek": small.deepseek,
    "word_piece": small.word_piece,
    "sentencepiece": lambda: small.sentencepiece_like("always"),
}

_TOKENS = [
    "<|begin_of_text|>", "<|eot_id|>", "<|reserved_special_token_1|>", "<|im_start|>",
    "<|im_end|>", "<think>", "</tool_call>", "<｜User｜>", "<｜end▁of▁sentence｜>", "[INST]",
    "<s>", "[CLS]", "<|endoftext|>", "    ", "  ",
]  # fmt: skip
_BITS = [
    " ", "\n", "\r", "\t", "\u00a0", "\u3000", "\u2028", "\x0b", "a", "b", "Z", " the", "The",
    " x y z", "\na", "\n a", "a\n", "1", "12345", "½", "'s", "'LL", "’", "é", "e\u0301",
    "\u0301", "A\u030a", "ﬁ", "ß", "İ", "你好", "ก็", "नमस्ते", "👩‍👩‍👧", "🇨🇭", "_", "▁", "Ġ",
    "/", "{\"", "<|", "|>", "<", ">", "[", "\x00", "\u200b", "\ufeff", "\U000e0001",
]  # fmt: skip
_TEXTS = st.lists(
    st.sampled_from(_TOKENS)
    | st.sampled_from(_BITS)
    | st.text(max_size=6)
    | st.text("abc XYZ\n'", max_size=12),
    max_size=40,
).map("".join)

_encoders: dict[str, tuple[Tokenizer, TextEncoder, PieceSplitter]] = {}


def _serialised(tokenizer: Tokenizer) -> dict[str, Any]:
    form: dict[str, Any] = json.loads(tokenizer.to_str())
    return form


def _encoder(kind: str) -> tuple[Tokenizer, TextEncoder, PieceSplitter]:
    """Tokenizer, encoder, and a splitter that cuts wherever it may."""
    if kind not in _encoders:
        tokenizer = SAFE[kind]()
        splitter = PieceSplitter(
            split_plan(_serialised(tokenizer), False), min_chars=1, stride_chars=1
        )
        _encoders[kind] = (tokenizer, TextEncoder(tokenizer, CACHE_BYTES), splitter)
    return _encoders[kind]


@pytest.mark.parametrize("kind", SAFE)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=_TEXTS)
def test_pieces_have_the_ids_of_the_whole(kind: str, text: str) -> None:
    tokenizer, encoder, splitter = _encoder(kind)
    assert encoder.cached
    pieces = splitter.split(text)
    assert "".join(pieces) == text
    encoded = [
        tokenizer.encode(piece, add_special_tokens=False, is_pretokenized=False).ids
        for piece in pieces
    ]
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert [one for ids in encoded for one in ids] == whole
    for with_special in (False, True):
        expected = tokenizer.encode(text, add_special_tokens=with_special).ids
        for _ in range(2):
            ids = encoder.encode(encoder.look_up(text, with_special))
            assert ids.dtype == "uint64"
            assert ids.tolist() == expected


@pytest.mark.parametrize("kind", ["llama", "qwen", "o200k", "gpt2"])
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.lists(st.sampled_from([*_BITS, *_TOKENS[:5]]), max_size=60).map("".join))
def test_places_next_to_a_look_ahead_are_cut_correctly(kind: str, text: str) -> None:
    tokenizer, _, splitter = _encoder(kind)
    encodings = tokenizer.encode_batch_fast(splitter.split(text), add_special_tokens=False)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert [one for encoding in encodings for one in encoding.ids] == whole


@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])
def test_a_longer_text_begins_with_the_pieces_of_its_beginning(kind: str) -> None:
    tokenizer, _, _ = _encoder(kind)
    splitter = PieceSplitter(
        split_plan(_serialised(tokenizer), False), min_chars=20, stride_chars=50
    )
    text = "<|im_end|>".join(f"{n} words and\nlines of text {n * n} " * n for n in range(1, 12))
    pieces = splitter.split(text)
    assert len(pieces) > 20
    for end in range(1, len(text), 37):
        begun = splitter.split(text[:end])
        assert begun[:-1] == pieces[: len(begun) - 1]


def test_long_texts_without_added_tokens_are_cut_and_found_in_the_cache() -> None:
    encoder = TextEncoder(small.llama(), CACHE_BYTES)
    text = "some words, and 12 more.\n" * 400
    encoder.encode(encoder.look_up(text, False))
    longer = encoder.look_up(text + "something new", False)
    assert longer.missing_chars < 1500
    assert encoder.segment_hits >= len(longer.known) - 2 > 5


def test_short_neighbours_share_a_piece() -> None:
    plan = SplitPlan(raw_tokens=("<a>", "<ab>", "<abc>", "b"))
    fine = PieceSplitter(plan, min_chars=1, stride_chars=1000)
    coarse = PieceSplitter(plan, min_chars=6, stride_chars=1000)
    text = "x<abc><ab<a>bb<abcdef"
    assert fine.split(text) == ["x<abc>", "<ab", "<a>", "b", "b", "<ab", "cdef"]
    assert coarse.split(text) == ["x<abc>", "<ab<a>", "bb<abcdef"]
    assert fine.split("") == []
    assert PieceSplitter(SplitPlan(), min_chars=1, stride_chars=1).split(text) == [text]


# -- what switches it off


def _changed(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    return Tokenizer.from_str(json.dumps({**_serialised(tokenizer), **parts}))


def _with_token(**flags: bool) -> Tokenizer:
    tokenizer = _changed(small.o200k())
    tokenizer.add_tokens([AddedToken("<odd>", **flags)])
    return tokenizer


def _truncating() -> Tokenizer:
    tokenizer = _changed(small.o200k())
    tokenizer.enable_truncation(max_length=512)
    return tokenizer


def _padding() -> Tokenizer:
    tokenizer = _changed(small.o200k())
    tokenizer.enable_padding()
    return tokenizer


def _splitting_special() -> Tokenizer:
    tokenizer = _changed(small.o200k())
    tokenizer.encode_special_tokens = True
    return tokenizer


def _dropping_out() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.5))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return tokenizer


UNSAFE: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "swallows blanks before": (small.blank_swallower, "an added token with lstrip"),
    "swallows blanks after": (lambda: _with_token(rstrip=True), "an added token with rstrip"),
    "whole words": (lambda: _with_token(single_word=True), "an added token with single_word"),
    "metaspace of a beginning": (small.mistral, "pre-tokenizer Metaspace"),
    "truncation": (_truncating, "truncation or padding"),
    "padding": (_padding, "truncation or padding"),
    "split special tokens": (_splitting_special, "split_special_tokens"),
    "dropout": (_dropping_out, "dropout"),
}


@pytest.mark.parametrize("kind", UNSAFE)
def test_an_unsafe_tokenizer_gets_whole_texts_and_a_warning(kind: str) -> None:
    make, reason = UNSAFE[kind]
    tokenizer = make()
    with structlog.testing.capture_logs() as logs:
        encoder = TextEncoder(tokenizer, CACHE_BYTES)
    assert (encoder.cached, encoder.unsafe) == (False, reason)
    assert logs == [{"event": "tokens_not_cached", "log_level": "warning", "reason": reason}]
    if kind == "dropout":
        return
    text = "Some <mask> text <odd> with<|im_end|> tokens <s> [INST] 12"
    for with_special in (False, True):
        expected = tokenizer.encode(text, add_special_tokens=with_special).ids
        for _ in range(2):
            ids = encoder.encode(encoder.look_up(text, with_special))
            assert ids.tolist() == expected
    assert len(encoder.cache) == encoder.segments == 0


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("pre_tokenizer", {"type": "FixedLength", "length": 5}, "pre-tokenizer FixedLength"),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}, {"type": "New"}]},
            "pre-tokenizer New",
        ),
        ("normalizer", {"type": "New"}, "normalizer New"),
        (
            "normalizer",
            {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "New"}]},
            "normalizer New",
        ),
        ("model", {"type": "New"}, "model New"),
        ("model", {"type": "BPE", "dropout": 0.1}, "dropout"),
    ],
)
def test_an_unknown_component_counts_as_unsafe(part: str, value: Any, reason: str) -> None:
    assert split_plan({**_serialised(small.o200k()), part: value}, False).unsafe == reason


def test_a_wrong_plan_is_found_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SplitPlan(raw_tokens=("o", " "), around=((), ()))
    monkeypatch.setattr(text_encoder, "split_plan", lambda *_: plan)
    with structlog.testing.capture_logs() as logs:
        encoder = TextEncoder(small.qwen(), CACHE_BYTES)
    assert encoder.unsafe == "pieces of a sample differ"
    assert logs[0]["event"] == "tokens_not_cached"
    text = "to be or not to be"
    ids = encoder.encode(encoder.look_up(text, False))
    assert ids.tolist() == small.qwen().encode(text, add_special_tokens=False).ids


def test_wrong_special_tokens_are_found_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "split_plan", lambda *_: SplitPlan(around=((1,), ())))
    with structlog.testing.capture_logs():
        encoder = TextEncoder(small.qwen(), CACHE_BYTES)
    assert encoder.unsafe == "special tokens around a sample differ"


def test_zero_bytes_turn_the_cache_off_without_a_warning() -> None:
    with structlog.testing.capture_logs() as logs:
        encoder = TextEncoder(small.qwen(), 0)
    assert (encoder.cached, encoder.unsafe, logs) == (False, "", [])


# -- where the plan comes from


def test_texts_are_not_cut_at_tokens_that_are_found_in_normalised_text() -> None:
    tokenizer = _changed(small.qwen())
    tokenizer.add_tokens([AddedToken("two words", normalized=True)])
    plan = split_plan(_serialised(tokenizer), False)
    assert "<|im_end|>" in plan.raw_tokens
    assert plan.normalized_tokens == ()
    assert plan.inner is None
    assert split_plan(_serialised(small.qwen()), False).inner is not None


@pytest.mark.parametrize(
    ("kind", "inner"),
    [
        ("llama", True),
        ("qwen", True),
        ("o200k", True),
        ("gpt2", True),
        ("deepseek", False),
        ("word_piece", False),
        ("sentencepiece", False),
    ],
)
def test_long_texts_are_cut_inside_for_known_expressions(kind: str, inner: bool) -> None:
    plan = split_plan(_serialised(_encoder(kind)[0]), False)
    assert (plan.inner is not None) is inner


def test_texts_are_not_cut_inside_with_prefix_spaces_or_unknown_expressions() -> None:
    form = _serialised(small.llama())
    split, byte_level = form["pre_tokenizer"]["pretokenizers"]
    for parts in (
        [{**split, "pattern": {"Regex": r"\s+|\S+"}}, byte_level],
        [{**split, "pattern": {"String": " "}}, byte_level],
        [{**split, "behavior": "Removed"}, byte_level],
        [{**split, "invert": True}, byte_level],
        [split, {**byte_level, "add_prefix_space": True}],
        [split, {**byte_level, "use_regex": True}],
        [split],
        [split, split, byte_level],
        [{**byte_level, "use_regex": False}],
    ):
        form["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
        assert split_plan(form, False).inner is None
    form = _serialised(small.llama())
    form["normalizer"] = {"type": "Lowercase"}
    assert split_plan(form, False).inner is None


def _single(single: Any, tokens: dict[str, list[int]]) -> dict[str, Any]:
    special = {name: {"id": name, "ids": ids, "tokens": [name]} for name, ids in tokens.items()}
    return {"type": "TemplateProcessing", "single": single, "special_tokens": special}


_A = {"Sequence": {"id": "A", "type_id": 0}}
_B = {"SpecialToken": {"id": "b", "type_id": 0}}
_E = {"SpecialToken": {"id": "e", "type_id": 0}}
_IDS = {"b": [7, 8], "e": [9]}


@pytest.mark.parametrize(
    ("post_processor", "around"),
    [
        (None, ((), ())),
        ({"type": "ByteLevel"}, ((), ())),
        ({"type": "BertProcessing", "sep": ["s", 2], "cls": ["c", 1]}, ((1,), (2,))),
        ({"type": "RobertaProcessing", "sep": ["s", 2], "cls": ["c", 1]}, ((1,), (2,))),
        (_single([_B, _A, _E], _IDS), ((7, 8), (9,))),
        (_single([_A], {}), ((), ())),
        (_single([_B, _A, _A], _IDS), None),
        (_single([_B], _IDS), None),
        (_single([_B, _A], {}), None),
        (_single([{"New": {}}, _A], _IDS), None),
        ({"type": "New"}, None),
        (
            {
                "type": "Sequence",
                "processors": [{"type": "ByteLevel"}, _single([_B, _A, _E], _IDS)],
            },
            ((7, 8), (9,)),
        ),
        (
            {"type": "Sequence", "processors": [_single([_B, _A], _IDS), _single([_A], {})]},
            None,
        ),
    ],
)
def test_the_plan_has_the_special_tokens_around_a_text(post_processor: Any, around: Any) -> None:
    form = {**_serialised(small.o200k()), "post_processor": post_processor}
    assert split_plan(form, False).around == around


def test_an_empty_text_has_only_special_tokens() -> None:
    encoder = TextEncoder(small.llama(), CACHE_BYTES)
    assert encoder.encode(encoder.look_up("", False)).tolist() == []
    assert encoder.encode(encoder.look_up("", True)).tolist() == small.llama().encode("").ids


def test_errors_of_the_tokenizer_do_not_quote_the_text() -> None:
    encoder = TextEncoder(small.llama(), CACHE_BYTES)
    with pytest.raises(EncodeFailedError) as caught:
        encoder.encode(encoder.look_up("my secret \ud800", False))
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_tokenizer_that_cannot_encode_is_refused_at_start() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(TokenizerError, match="cannot encode"):
        TextEncoder(tokenizer, CACHE_BYTES)
