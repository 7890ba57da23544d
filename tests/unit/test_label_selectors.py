"""The grammar of label selectors, with the meaning that the API server gives it."""

import pytest

from extproc.label_selectors import parse_selector

LABELS = {"app": "sglang", "role": "prefill", "example.com/tier": "gpu", "empty": ""}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("app=sglang", True),
        ("app==sglang", True),
        (" app = sglang , role == prefill ", True),
        ("app=other", False),
        ("app!=other", True),
        ("app!=sglang", False),
        ("missing!=anything", True),  # as in the API server: an absent label differs
        ("missing=anything", False),
        ("role in (prefill, decode)", True),
        ("role in (decode)", False),
        ("role notin (decode)", True),
        ("role notin (prefill,decode)", False),
        ("missing notin (a)", True),
        ("app", True),
        ("missing", False),
        ("!missing", True),
        ("!app", False),
        ("example.com/tier=gpu,app", True),
        ("empty=", True),
        ("app=", False),
        ("in in (a)", False),  # a label may have the name of an operator
    ],
)
def test_a_selector_matches_labels(text: str, matches: bool) -> None:
    assert parse_selector(text).matches(LABELS) is matches


def test_an_object_may_have_no_labels() -> None:
    assert not parse_selector("app").matches(None)
    assert parse_selector("!app").matches(None)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a=b,c=d", "c == d, a=b"),
        ("a=b", " a == b "),
        ("a in (x, y)", "a in (y,x)"),
        ("a in (x)", "a=x"),
        ("a notin (x)", "a!=x"),
    ],
)
def test_selectors_with_the_same_terms_are_equal(one: str, other: str) -> None:
    assert parse_selector(one) == parse_selector(other)


@pytest.mark.parametrize(
    "text",
    ["", "  ", ",", "a=b,", "=b", "a=b c", "a in", "a in (b", "a in b", "!", "-a=b", "a=(b)",
     "a=b,,c=d", "a=-b", "a in (-)", "a=" + "x" * 64, "a<3"],
)  # fmt: skip
def test_other_text_is_refused_with_a_message(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot|empty"):
        parse_selector(text)
