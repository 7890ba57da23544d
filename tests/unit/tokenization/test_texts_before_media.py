"""Of a text that something unknown follows, only tokens are kept that do not depend on it."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from extproc.tokenization.certain_end import CertainEnd
from extproc.tokenization.media import common_beginning, text_before_media
from extproc.tokenization.pieces import split_plan
from extproc.tokenization.text_encoder import TextEncoder
from tests.unit.tokenization import small_tokenizers as small
from tests.unit.tokenization.test_texts_in_pieces import _BITS, _TEXTS, _TOKENS, CACHE_BYTES, SAFE

_ends: dict[str, tuple[CertainEnd, Tokenizer]] = {}

# Of vLLM 0.32 and SGLang 0.5.23, as their models name them.
PLACEHOLDERS = [
    "(<audio>./</audio>)", "(<image>./</image>)", "(<video>./</video>)", "</img>",
    "<IMG_CONTEXT>", "<audio>", "<audio_soft_token>", "<im_patch>", "<image>",
    "<image_soft_token>", "<img>", "<so_embedding>", "<start_of_image>", "<video>",
    "<vision><|image_pad|></vision>", "<|AUDIO|>", "<|IMAGE_START|><|IMAGE_PLACEHOLDER|>",
    "<|IMAGE_START|><|image@placeholder|>", "<|VIDEO_START|>", "<|VISION_START|><|IMAGE_PAD|>",
    "<|audio_1|>", "<|audio_bos|><|AUDIO|><|audio_eos|>", "<|audio_start|><|audio_pad|>",
    "<|audio|>", "<|begin_of_audio|><|pad|><|end_of_audio|>", "<|begin_of_image|><|image|>",
    "<|begin_of_video|>", "<|endoftext10|>", "<|file|>", "<|image_1|>", "<|image_pad|>",
    "<|image|>", "<|imgpad|>", "<|img|><|imgpad|><|endofimg|>", "<|kimi_k25_video_placeholder|>",
    "<|media_begin|>image<|media_content|>", "<|media_pad|>", "<|media_placeholder|>",
    "<|media_start|>image", "<|mimo_audio_start|>", "<|pad|>", "<|patch|>", "<|video_pad|>",
    "<|video|>", "<|vision_start|><|IMAGE|>", "<|vision_start|><|image_pad|><|vision_end|>",
    "Audio 1: ", "Picture 2: ", "[IMG]", "[unused18][unused19][unused20]", "]<]image[>[",
]  # fmt: skip


@pytest.mark.parametrize("kind", SAFE)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=_TEXTS, after=st.sampled_from([*_BITS, *_TOKENS]) | st.text(max_size=5), cut=st.data())
def test_the_tokens_stay_whatever_follows(
    kind: str, text: str, after: str, cut: st.DataObject
) -> None:
    if kind not in _ends:
        tokenizer = SAFE[kind]()
        _ends[kind] = (CertainEnd(split_plan(json.loads(tokenizer.to_str()), False)), tokenizer)
    certain, tokenizer = _ends[kind]
    # Also within an added token.
    known = text[: cut.draw(st.integers(0, len(text)))]
    end = certain.of(known)
    beginning = tokenizer.encode(known[:end], add_special_tokens=False).ids
    for whole in (known, known + after, text):
        ids = tokenizer.encode(whole, add_special_tokens=False).ids
        assert ids[: len(beginning)] == beginning


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<|im_start|>user\nlook at ", "<|im_start|>user\nlook at"),
        ("<|im_start|>user\nlook", "<|im_start|>user\n"),
        ("<|im_start|>user\nsome words\nthree", "<|im_start|>user\nsome words\n"),
        ("<|im_start|>user\n", "<|im_start|>"),
        ("<|im_end|>", "<|im_end|>"),
        # Another token may begin within what is known.
        ("one two <|im_", "one two"),
        ("one two<|im_", "one"),
        ("", ""),
        ("word", ""),
    ],
)
def test_a_text_is_kept_up_to_a_place_where_it_may_be_cut(text: str, kept: str) -> None:
    assert TextEncoder(small.qwen(), CACHE_BYTES).certain_beginning(text) == kept


def test_without_a_cache_the_same_is_kept() -> None:
    assert TextEncoder(small.qwen(), 0).certain_beginning("one two") == "one"


def test_nothing_is_kept_of_texts_that_cannot_be_cut() -> None:
    encoder = TextEncoder(small.sentencepiece_like("first"), CACHE_BYTES)
    assert encoder.certain_beginning("one two three") == ""


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_a_text_that_looks_like_a_placeholder_ends_the_beginning(placeholder: str) -> None:
    known = text_before_media(f"You see {placeholder} and X", f"You see {placeholder} and Y")
    assert known.strip("(] ") == "You see"


@pytest.mark.parametrize("text", ["<|im_start|>system\n", "a[0] < b (see image 3)", "<tool_call>"])
def test_other_texts_stay(text: str) -> None:
    assert text_before_media(f"{text}X", f"{text}Y") == text


def test_equal_renderings_say_nothing_of_the_place() -> None:
    assert text_before_media("equal", "equal") == ""


@given(st.text("ab", max_size=20), st.text("ab", max_size=20))
def test_the_common_beginning_is_the_longest(one: str, other: str) -> None:
    length = common_beginning(one, other)
    assert one[:length] == other[:length]
    assert one[length : length + 1] != other[length : length + 1] or one == other
