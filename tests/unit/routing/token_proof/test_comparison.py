"""The first difference of a probe is named, and what probably causes it."""

from collections.abc import Sequence

import numpy as np
import pytest

from extproc.routing.token_proof.comparison import FIXES, Difference, compare, likely_cause
from extproc.routing.token_proof.probes import PROBES, Probe

BY_NAME = {probe.name: probe for probe in PROBES}


def text_of(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def of(name: str, ours: str, engines: str) -> Difference:
    found = compare(BY_NAME[name], codes(ours), codes(engines), text_of)
    assert found is not None
    return found


def codes(text: str) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    return np.array([ord(letter) for letter in text], np.uint64)


def test_equal_tokens_are_no_difference() -> None:
    assert compare(BY_NAME["chat"], codes("abc"), codes("abc"), text_of) is None


@pytest.mark.parametrize(
    ("ours", "engines", "position", "our_text", "engines_text"),
    [
        ("abcdefghij", "abcdefGhij", 6, "cdefghij", "cdefGhij"),
        ("abc", "xbc", 0, "abc", "xbc"),
        ("abcd", "ab", 2, "abcd", "ab"),
        ("", "abcdef", 0, "", "abcd"),
        ("abc", "", 0, "abc", ""),
    ],
)
def test_the_first_difference_is_named_with_the_tokens_around_it(
    ours: str, engines: str, position: int, our_text: str, engines_text: str
) -> None:
    found = of("chat", ours, engines)
    assert (found.position, found.our_text, found.engines_text) == (
        position,
        our_text,
        engines_text,
    )
    assert (found.ours, found.engines) == (len(ours), len(engines))
    assert f"token {position} differs" in found.text


def test_long_tokens_are_shown_in_part() -> None:
    def long_text(ids: Sequence[int]) -> str:
        return "x" * 1000 * len(ids)

    found = compare(BY_NAME["chat"], codes("a"), codes("b"), long_text)
    assert found is not None
    assert len(found.our_text) == len(found.engines_text) == 81
    assert len(found.text) < 300


@pytest.mark.parametrize(
    ("differences", "cause"),
    [
        ([("text", "hello", "hallo"), ("chat", "x", "y")], "other_tokenizer"),
        ([("text", "hello", "<hello"), ("chat", "x", "y")], "first_token"),
        ([("chat", "<<hello", "<hello")], "first_token"),
        ([("text_with_marks", "a<s>b", "a!b")], "special_tokens"),
        ([("chat", "user: hi", "human: hi"), ("tools", "t", "u")], "other_template"),
        ([("chat", "hi assistant", "hi"), ("conversation", "ho as", "ho")], "generation_prompt"),
        ([("tools", "-tool", "-function"), ("tool_history", "-a", "-b")], "tools"),
        ([("parts", "-a b", "-a\nb")], "content_parts"),
        ([("tools", "-a", "-b"), ("parts", "-a", "-b"), ("continued", "-a", "-")], "other_engine"),
        ([("continued", "-one", "-one<end>")], "last_message"),
        ([("thinking", "-<think>", "-")], "template_arguments"),
        ([("responses", "-a", "-b")], "other_api"),
        ([("messages", "-a", "-b")], "other_api"),
    ],
)
def test_the_likely_cause_is_named(differences: list[tuple[str, str, str]], cause: str) -> None:
    found = [of(*one) for one in differences]
    equal = frozenset(BY_NAME) - {one.probe for one in found}
    assert likely_cause(found, equal) == cause
    assert FIXES[cause]


def test_other_chats_differ_for_their_template_where_plain_chats_were_not_compared() -> None:
    assert likely_cause([of("tools", "-a", "-b")], frozenset({"text"})) == "other_template"


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_probes_are_small_and_have_unique_names(probe: Probe) -> None:
    assert sum(one.name == probe.name for one in PROBES) == 1
    assert len(str(probe.body)) < 1500
    assert "model" not in probe.body
