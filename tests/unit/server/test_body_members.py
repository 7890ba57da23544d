"""Adding and removing members of a request body leaves every other byte as it is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import RouterError
from extproc.routing.json_members import with_members, without_steering
from extproc.steering import MEMBER_MAPS, STEERING_MEMBERS

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


# -- removing


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"routed_dp_rank":1}', b"{}"),
        (b' { "routed_dp_rank" : 1 } ', b" {  } "),
        (b'{"a":1,"routed_dp_rank":1}', b'{"a":1}'),
        (b'{"a":1 , "routed_dp_rank":1 }', b'{"a":1  }'),
        (b'{"routed_dp_rank":1,"a":1}', b'{"a":1}'),
        (b'{"routed_dp_rank":1,"bootstrap_room":2,"a":1}', b'{"a":1}'),
        (b'{"a":1,"routed_dp_rank":1 , "bootstrap_room":2}', b'{"a":1}'),
        (b'{"a":1,"routed_dp_rank":1,"b":2,"bootstrap_room":2}', b'{"a":1,"b":2}'),
        (b'{"routed_dp_rank":1,"routed_dp_rank":[2],"routed_dp_rank":"x"}', b"{}"),
        # Numbers that no parser of ours would spell the same way again.
        (b'{"x":1.50e+3,"bootstrap_room":9007199254740993}', b'{"x":1.50e+3}'),
        # Only at the top: a schema of a tool may have any names.
        (b'{"a":{"routed_dp_rank":1}}', b'{"a":{"routed_dp_rank":1}}'),
        (b'{"a":"\\"routed_dp_rank\\":1"}', b'{"a":"\\"routed_dp_rank\\":1"}'),
        # The map comes last when it had to be changed, and of two maps the last one counts.
        (b'{"vllm_xargs":{"kv_transfer_params":1},"a":2}', b'{"a":2,"vllm_xargs":{}}'),
        (b'{"vllm_xargs":{"a":1},"vllm_xargs":{"b":2}}', b'{"vllm_xargs":{"b":2}}'),
    ],
)
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_members_that_steer_are_cut_out(kind: type[bytes], body: bytes, expected: bytes) -> None:
    assert without_steering(kind(body)) == expected


names = st.sampled_from(sorted(STEERING_MEMBERS | {"a", "routed", "é"})) | st.text(max_size=3)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


def encoded(name: str, escaped: bool) -> str:
    return '"' + "".join(f"\\u{ord(c):04x}" for c in name) + '"' if escaped else json.dumps(name)


@given(
    members=st.lists(
        st.tuples(names, st.booleans(), values, st.sampled_from(["", " ", "\n\t "])), max_size=12
    )
)
def test_any_object_keeps_its_other_members_in_their_order(
    members: list[tuple[str, bool, object, str]],
) -> None:
    members = [
        one for one in members if one[0] not in MEMBER_MAPS and max(one[0], default="") < "𐀀"
    ]
    written = ",".join(
        f"{blank}{encoded(name, escaped)}{blank}:{blank}{json.dumps(value)}{blank}"
        for name, escaped, value, blank in members
    )
    body = f"{{{written}}}".encode()
    pairs = json.loads(without_steering(body), object_pairs_hook=list)
    kept = [name for name, *_ in members if name not in STEERING_MEMBERS]
    assert [name for name, _ in pairs] == kept


@pytest.mark.parametrize("repeats", [33, 50_000])
def test_a_member_that_is_repeated_very_often_is_refused(repeats: int) -> None:
    body = b'{"model":"m",' + b",".join([b'"routed_dp_rank":1'] * repeats) + b"}"
    with pytest.raises(RouterError) as refused:
        without_steering(body)
    assert refused.value.status == 400
