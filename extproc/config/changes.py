"""Compares two configurations: what can change while the service runs, and what needs a restart.

Separate from the schema, so that a reviewer sees all keys with their answers in one table. A test
holds that every key of the schema is in it.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from extproc.config.schema import Config

__all__ = ["HOW_CHANGED", "Changes", "How", "compare"]

# `live_while_set`: a new value is applied, but setting or removing the key needs a restart.
How = Literal["live", "restart", "live_while_set"]


def _keys(how: How, section: str, names: str) -> dict[str, How]:
    return {f"{section}{name}": how for name in names.split()}


# By key as in docs/configuration.md. A section stands here if it can be absent or is a list.
HOW_CHANGED: Final[Mapping[str, How]] = MappingProxyType(
    {
        # The servers are set up once.
        **_keys(
            "restart",
            "server.",
            "host port unix_socket admin_host admin_port admin_token_file admin_token_env "
            "max_body_bytes tls",
        ),
        **_keys(
            "live",
            "server.",
            "max_requests max_buffered_bytes step_deadline_secs drain_secs watch_secs",
        ),
        **_keys("live", "server.tls.", "cert_file key_file"),
        **_keys("live_while_set", "server.tls.", "client_ca_file"),
        **_keys("live", "observability.", "log_level debug_headers"),
        **_keys("restart", "observability.", "log_format"),
        "models[]": "live",
        **_keys(
            "live",
            "models[].",
            "id policy tokenizer_path chat_template_name chat_template_kwargs "
            "first_byte_timeout_secs ready_without_workers token_proof tokens_from engine "
            "chat_template_content_format exclude_tools_when_tool_choice_none",
        ),
        **_keys(
            "live",
            "models[].cache_aware.",
            "cache_threshold balance_abs_threshold balance_rel_threshold",
        ),
        **_keys("live", "models[].min_ttft.", "prefill_tokens_per_second"),
        "models[].kv_events[]": "live",
        **_keys(
            "live",
            "models[].kv_events[].",
            "url endpoint replay_endpoint topic block_size dp_size",
        ),
        **_keys("live", "models[].pd.", "protocol min_prefill_tokens"),
        **_keys(
            "live",
            "models[].queue.",
            "max_requests max_wait_secs worker_requests_max worker_waiting_max default_class "
            "priority_classes",
        ),
        # Envoy's filter forwards them.
        **_keys("restart", "models[].queue.", "tenant_header priority_header"),
        **_keys("live", "models[].circuit_breaker.", "threshold cool_down_secs"),
        **_keys("restart", "discovery.", "backend static_urls dns k8s k8s_pods inference_pool"),
        **_keys(
            "restart",
            "discovery.k8s.",
            "namespace kubeconfig label_selector prefill_selector decode_selector port_name port "
            "address_family",
        ),
        **_keys(
            "restart",
            "discovery.k8s_pods.",
            "namespace kubeconfig label_selector prefill_selector decode_selector port_name port "
            "address_family bootstrap_port_annotation ranks_from",
        ),
        **_keys(
            "restart",
            "discovery.inference_pool.",
            "namespace name kubeconfig prefill_selector decode_selector address_family "
            "bootstrap_port_annotation",
        ),
        **_keys("live", "discovery.static_urls.", "urls prefill_urls decode_urls dns_ttl_secs"),
        **_keys("restart", "discovery.static_urls.", "dns_lookup_family"),
        **_keys(
            "restart",
            "discovery.dns.",
            "urls prefill_urls decode_urls address_family ttl_min_secs ttl_max_secs leave_secs "
            "nameservers",
        ),
        **_keys(
            "live",
            "discovery.",
            "introspection_retry_secs introspection_interval_secs generating_check_secs "
            "mass_removal_hold_secs runtime_workers_max",
        ),
        **_keys("live", "workers.", "api_key api_key_file forward_api_key ca_file"),
        **_keys(
            "live",
            "proxy.",
            "request_timeout_secs first_byte_timeout_secs connect_timeout_secs fallback_workers",
        ),
        # Envoy's cluster must have the filter that reports busy answers.
        **_keys("restart", "proxy.", "retry_busy"),
        **_keys("live", "active_load.", "stale_request_timeout_secs"),
        **_keys("restart", "load.", "release"),
        **_keys("live", "load.", "estimated_stream_secs"),
        **_keys("live", "kv.", "max_pages ranks_per_worker_max"),
        **_keys("restart", "kv.", "replay_timeout_secs replay_retry_secs"),
        **_keys("live", "tokenization.", "cache_bytes inline_chars threads"),
        **_keys(
            "live",
            "pd.",
            "decode response_timeout_secs prefill_timeout_secs prefill_linger_secs",
        ),
        # Envoy reads these from its own file, at its start.
        **_keys(
            "restart",
            "envoy.",
            "host port admin_port fail_open message_timeout_secs hang_timeout_secs "
            "stream_idle_timeout_secs worker_idle_timeout_secs max_heap_mb max_connections "
            "destination cluster cluster_header model_header access_log endpoints_file "
            "endpoints eds_settle_secs fail_open_host",
        ),
        **_keys("restart", "envoy.extproc.", "host ca_file cert_file key_file"),
    }
)


class Changes(Struct, frozen=True):
    """The keys that differ, as their paths in the file, in the order of the schema.

    `restart` are those that cannot be applied while the service runs.
    """

    live: tuple[str, ...]
    restart: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.live or self.restart)


class _Difference(Struct, frozen=True):
    """One key that differs. `switched`: it has a value in only one of the configurations."""

    key: str
    path: str
    switched: bool = False


def compare(old: Config, new: Config) -> Changes:
    """Return which keys differ, and which of them need a restart."""
    live: list[str] = []
    restart: list[str] = []
    for one in _differences(old, new, "", ""):
        how = HOW_CHANGED[one.key]
        applied = how == "live" or (how == "live_while_set" and not one.switched)
        (live if applied else restart).append(one.path)
    return Changes(tuple(live), tuple(restart))


def _differences(old: Struct, new: Struct, key: str, path: str) -> Iterator[_Difference]:
    """The keys of two sections of one type that differ."""
    for field in msgspec.structs.fields(type(old)):
        name = field.encode_name
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before == after:
            continue
        inner_key = f"{key}.{name}" if key else name
        inner_path = f"{path}.{name}" if path else name
        if isinstance(before, Struct) and isinstance(after, Struct):
            yield from _differences(before, after, inner_key, inner_path)
        elif _is_sections(before) or _is_sections(after):
            yield from _in_list(before, after, f"{inner_key}[]", inner_path)
        else:
            switched = (before is None) != (after is None)
            yield _Difference(inner_key, inner_path, switched)


def _is_sections(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Struct)


def _in_list(old: list[Struct], new: list[Struct], key: str, path: str) -> Iterator[_Difference]:
    """The differences of two lists of sections: those with ids are compared by their ids."""
    before = {_identity(one, index): one for index, one in enumerate(old)}
    after = {_identity(one, index): one for index, one in enumerate(new)}
    if list(before) != list(after):
        # Some were added, removed or put in another order.
        yield _Difference(key, path)
    for index, (identity, one) in enumerate(after.items()):
        if identity in before:
            yield from _differences(before[identity], one, key, f"{path}[{index}]")


def _identity(section: Struct, index: int) -> object:
    return getattr(section, "id", index)
