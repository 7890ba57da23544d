"""The keys for separate prefill and decode workers: defaults, bounds and rules."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.config.models import PdModelConfig
from extproc.config.schema import PdConfig, StaticUrlsConfig
from tests.unit.configs import at, config, problem_of, problems_of, raw_config

A, B, C = (f"http://10.0.0.{n}:8000" for n in (1, 2, 3))
LIST = "discovery.static_urls"


def roles(
    prefill: list[str] | None = None,
    decode: list[str] | None = None,
    urls: tuple[str, ...] = (A, B, C),
) -> dict[str, Any]:
    section: dict[str, Any] = {"urls": list(urls)}
    if prefill is not None:
        section["prefill_urls"] = prefill
    if decode is not None:
        section["decode_urls"] = decode
    return raw_config(discovery={"backend": "static_urls", "static_urls": section})


def model(**pd: Any) -> dict[str, Any]:
    policy = pd.pop("policy", "min_ttft")
    return raw_config(models=[{"id": "m", "policy": policy, "tokenizer_path": "/m", "pd": pd}])


# -- defaults


def test_the_defaults_are_the_sglang_protocol_and_two_passes() -> None:
    found = config()
    assert found.pd == PdConfig()
    assert (found.pd.decode, found.pd.prefill_linger_secs) == ("two_pass", 1.0)
    assert (found.pd.response_timeout_secs, found.pd.prefill_timeout_secs) == (120.0, 90.0)
    assert found.models[0].pd == PdModelConfig()
    assert (found.models[0].pd.protocol, found.models[0].pd.min_prefill_tokens) == ("sglang", 0)
    section = found.discovery.static_urls
    assert isinstance(section, StaticUrlsConfig)
    assert (section.prefill_urls, section.decode_urls) == ([], [])


@pytest.mark.parametrize("decode", ["two_pass", "inline"])
@pytest.mark.parametrize("protocol", ["sglang", "nixl"])
def test_every_protocol_works_with_every_way_to_choose_the_decode_worker(
    decode: str, protocol: str
) -> None:
    found = config(pd={"decode": decode}, models=[{"id": "m", "pd": {"protocol": protocol}}])
    assert (found.pd.decode, found.models[0].pd.protocol) == (decode, protocol)


# -- types and bounds


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pd.decode", "three_pass"),
        ("pd.decode", None),
        ("pd.response_timeout_secs", 0),
        ("pd.response_timeout_secs", -1),
        ("pd.prefill_timeout_secs", 0),
        ("pd.prefill_timeout_secs", "120"),
        ("pd.prefill_timeout_secs", 604_801),
        ("pd.prefill_linger_secs", 0),
        ("pd.prefill_linger_secs", None),
        ("pd.unknown", 1),
        ("models[0].pd.protocol", "vllm"),
        ("models[0].pd.min_prefill_tokens", -1),
        ("models[0].pd.min_prefill_tokens", 1.5),
        ("models[0].pd.unknown", 1),
        ("models[0].pd", None),
        ("pd", []),
        (f"{LIST}.prefill_urls", A),
        (f"{LIST}.decode_urls", [1]),
    ],
)
def test_a_value_beyond_its_bounds_is_reported_with_its_key(key: str, value: object) -> None:
    assert problem_of(at(key, value)).startswith(key.removesuffix(".unknown"))


# -- roles of static workers


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (None, None),
        ([], []),
        ([A], [B]),
        ([A], [B, C]),
        # The other workers report their role themselves.
        ([A], None),
        (None, [B]),
        # Other spellings of the same workers.
        ([f"{A}/"], ["HTTP://10.0.0.2:8000"]),
    ],
)
def test_static_workers_may_have_roles(prefill: list[str] | None, decode: list[str] | None) -> None:
    found = config(**roles(prefill, decode))
    section = found.discovery.static_urls
    assert isinstance(section, StaticUrlsConfig)
    assert (section.prefill_urls, section.decode_urls) == (prefill or [], decode or [])


@pytest.mark.parametrize(
    ("prefill", "decode", "key"),
    [
        (["http://10.9.9.9:8000"], None, "prefill_urls[0]"),
        ([A, "http://10.0.0.1:8001"], None, "prefill_urls[1]"),
        (None, [A, "https://10.0.0.1:8000"], "decode_urls[1]"),
        ([""], None, "prefill_urls[0]"),
        (["not a url"], None, "prefill_urls[0]"),
        ([A, f"{A}/"], None, "prefill_urls[1]"),
        (None, [B, B], "decode_urls[1]"),
        ([A], [B, A], "decode_urls[1]"),
    ],
)
def test_a_role_needs_a_listed_worker_and_excludes_the_other_role(
    prefill: list[str] | None, decode: list[str] | None, key: str
) -> None:
    assert problem_of(roles(prefill, decode)).startswith(f"{LIST}.{key}: ")


def test_every_wrong_role_is_reported() -> None:
    found = problems_of(roles(["http://a"], ["http://b", "http://c"]))
    keys = [problem.partition(":")[0] for problem in found]
    assert keys == [
        f"{LIST}.prefill_urls[0]",
        f"{LIST}.decode_urls[0]",
        f"{LIST}.decode_urls[1]",
    ]


def test_the_problem_of_a_second_role_names_the_first() -> None:
    assert f"{LIST}.prefill_urls[0]" in problem_of(roles([A], [A]))


# -- prompts that a decode worker serves alone


def test_min_prefill_tokens_is_accepted_with_nixl() -> None:
    found = config(**model(protocol="nixl", min_prefill_tokens=64))
    assert found.models[0].pd.min_prefill_tokens == 64


@pytest.mark.parametrize("policy", ["min_ttft", "cache_aware_zmq"])
def test_min_prefill_tokens_is_refused_with_sglang(policy: str) -> None:
    problem = problem_of(model(policy=policy, min_prefill_tokens=1))
    assert problem.startswith("models[0].pd.min_prefill_tokens: ")
    assert "nixl" in problem


@pytest.mark.parametrize("policy", ["round_robin", "random", "power_of_two", "least_load"])
def test_min_prefill_tokens_is_refused_with_a_policy_without_tokens(policy: str) -> None:
    problem = problem_of(model(policy=policy, protocol="nixl", min_prefill_tokens=1))
    assert problem.startswith("models[0].pd.min_prefill_tokens: ")
    assert policy in problem


def test_both_problems_of_min_prefill_tokens_are_reported() -> None:
    found = problems_of(model(policy="round_robin", min_prefill_tokens=1))
    assert len(found) == 2


def test_zero_min_prefill_tokens_is_always_accepted() -> None:
    config(**model(policy="round_robin", min_prefill_tokens=0))


# -- times


@pytest.mark.parametrize(
    ("response", "idle", "silence"),
    [
        (120.0, 660.0, 120.0),
        (330.0, 660.0, 330.0),
        # Half of the proxy's idle time-out.
        (331.0, 660.0, 330.0),
        (1000.0, 400.0, 200.0),
    ],
)
def test_the_decode_time_limit_is_below_the_proxys_idle_time_out(
    response: float, idle: float, silence: float
) -> None:
    found = config(pd={"response_timeout_secs": response}, envoy={"stream_idle_timeout_secs": idle})
    assert found.decode_silence_secs == silence


@given(
    st.lists(st.sampled_from(["sglang", "nixl"]), min_size=1, max_size=4),
    st.floats(0.001, 1000),
    st.floats(0.001, 9.9),
)
def test_the_deadline_includes_the_prefill_only_with_nixl(
    protocols: list[str], prefill: float, step: float
) -> None:
    found = config(
        models=[{"id": f"m{n}", "pd": {"protocol": name}} for n, name in enumerate(protocols)],
        pd={"prefill_timeout_secs": prefill},
        server={"step_deadline_secs": step},
    )
    extra = prefill if "nixl" in protocols else 0.0
    assert found.extra_wait_secs == extra
    assert found.routing_deadline_secs == pytest.approx(step + extra)
