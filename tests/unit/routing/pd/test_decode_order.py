"""The header between the two passes is read as it was written, and nothing else is accepted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.routing.pd.decode_order import DecodeOrder

ADDRESSES_MAX = 64

_PLAIN = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters=";,"))
_ADDRESSES = st.lists(
    st.builds(
        lambda host, port: f"{host}:{port}",
        st.sampled_from(["10.0.0.1", "10.0.0.2", "[2001:db8::1]"]),
        st.integers(1, 65535),
    ),
    unique=True,
    max_size=ADDRESSES_MAX,
).map(tuple)
_ORDERS = st.builds(DecodeOrder, st.integers(1, 99), _PLAIN, _PLAIN, _ADDRESSES)


@given(_ORDERS)
def test_a_round_trip_changes_nothing(order: DecodeOrder) -> None:
    header = order.to_header()
    assert header.isascii()
    assert header.isprintable()
    assert DecodeOrder.from_header(header) == order


@given(_ORDERS)
def test_the_groups_are_disjoint_and_together_complete(order: DecodeOrder) -> None:
    groups = [order.attempt_group(attempt) for attempt in range(1, order.attempts + 1)]
    dealt = [address for group in groups for address in group]
    assert len(dealt) == len(set(dealt))
    assert set(dealt) == set(order.addresses)
    # No group is larger than another by more than one.
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


@given(_ORDERS, st.integers(-3, 1000))
def test_an_attempt_beyond_the_limit_has_an_empty_group(order: DecodeOrder, attempt: int) -> None:
    if not 1 <= attempt <= order.attempts:
        assert order.attempt_group(attempt) == ()


def test_the_best_of_each_group_comes_first() -> None:
    order = DecodeOrder(3, "p", "id", ("a:1", "b:1", "c:1", "d:1", "e:1"))
    assert order.attempt_group(1) == ("a:1", "d:1")
    assert order.attempt_group(2) == ("b:1", "e:1")
    assert order.attempt_group(3) == ("c:1",)


def test_the_header_has_four_fields() -> None:
    order = DecodeOrder(2, "2001:db8::7", "0a1b", ("10.0.0.1:1", "[2001:db8::1]:2"))
    assert order.to_header() == "2;2001:db8::7;0a1b;10.0.0.1:1,[2001:db8::1]:2"


def test_only_the_best_of_a_large_pool_are_named() -> None:
    addresses = tuple(f"10.0.{n // 250}.{n % 250}:30000" for n in range(1000))
    header = DecodeOrder(9, "p", "id", addresses).to_header()
    # A header must stay far below the proxies' limit of 60 KiB for all of them.
    assert len(header) < 2000
    assert DecodeOrder.from_header(header).addresses == addresses[:ADDRESSES_MAX]


@pytest.mark.parametrize(
    "header",
    [
        "",
        ";",
        ";;;",
        "2",
        "2;h;p",
        "2;h;p;a:1;",
        "2;h;p;a:1;more",
        "0;h;p;a:1",
        "-1;h;p;a:1",
        "+1;h;p;a:1",
        " 1;h;p;a:1",
        "1.0;h;p;a:1",
        "100;h;p;a:1",
        "²;h;p;a:1",
        "one;h;p;a:1",
        "9" * 5000 + ";h;p;a:1",
    ],
    ids=lambda header: header[:20],
)
def test_a_malformed_header_is_refused(header: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (of whichever kind)
        DecodeOrder.from_header(header)


@given(st.text() | st.text(";,0123456789:. a"))
def test_any_header_is_an_order_or_a_value_error(header: str) -> None:
    try:
        order = DecodeOrder.from_header(header)
    except ValueError:
        return
    assert 1 <= order.attempts <= 99
    assert all(order.addresses)
    assert header.count(";") == 3


@pytest.mark.parametrize("header", ["2;h;p;", "2;h;p;,,"])
def test_an_order_without_addresses_has_empty_groups(header: str) -> None:
    order = DecodeOrder.from_header(header)
    assert order.addresses == order.attempt_group(1) == order.attempt_group(2) == ()
