"""Adding members to a request body leaves every other byte as it is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.routing.json_members import with_members

MEMBER = b'"routed_dp_rank":3'


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{}", b'{"routed_dp_rank":3}'),
        (b" { \n } \n", b' {"routed_dp_rank":3} \n'),
        (b'{"a":1}', b'{"a":1,"routed_dp_rank":3}'),
        (b'{"a": {"b": {}} }', b'{"a": {"b": {}},"routed_dp_rank":3}'),
        (b'{"a":"}"}\n', b'{"a":"}","routed_dp_rank":3}\n'),
        # Numbers no parser of ours would spell the same way again.
        (
            b'{"x":1.50e+3,"y":9007199254740993}',
            b'{"x":1.50e+3,"y":9007199254740993,"routed_dp_rank":3}',
        ),
    ],
)
def test_members_are_added_after_the_clients_own(body: bytes, expected: bytes) -> None:
    assert with_members(body, MEMBER) == expected
    assert with_members(bytearray(body), MEMBER) == expected


def test_the_added_member_overrides_the_clients() -> None:
    assert json.loads(with_members(b'{"routed_dp_rank":0}', MEMBER))["routed_dp_rank"] == 3


@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        ),
    ),
    st.sampled_from((None, 1)),
)
def test_any_object_gets_one_member_more(
    given_object: dict[str, object], indent: int | None
) -> None:
    body = json.dumps(given_object, indent=indent).encode()
    expected = given_object | {"routed_dp_rank": 3}
    assert json.loads(with_members(body, MEMBER)) == expected
