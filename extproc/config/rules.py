"""Rules of the configuration that span keys or need more than a type.

Separate from the schema because a type cannot express them.
"""

import re
from collections.abc import Iterator
from typing import Final

from msgspec import UNSET, Struct, UnsetType

from extproc.config.discovery import ClusterSection, InferencePoolConfig
from extproc.config.models import TOKEN_POLICIES, ModelConfig, QueueConfig
from extproc.config.schema import Config
from extproc.config.worker_urls import listed_url_problems, normalised
from extproc.headers import (
    DEBUG_HEADER,
    DECODE_ORDER_HEADER,
    DESTINATION_HEADER,
    PASS_KEY,
    REQUEST_ID_HEADER,
    RETRY_HEADER,
)
from extproc.label_selectors import parse_selector
from extproc.worker_url import parse_kv_endpoint

__all__ = ["API_KEY", "rule_problems"]

API_KEY: Final = re.compile(r"[\x21-\x7e]+")
_HEADERS_WITH_A_MEANING: Final = (
    DEBUG_HEADER,
    DECODE_ORDER_HEADER,
    DESTINATION_HEADER,
    PASS_KEY,
    REQUEST_ID_HEADER,
    RETRY_HEADER,
)
_ANY_HEADER_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_HEADER_NAME: Final = re.compile(r"x-[a-z0-9-]{1,60}")
_LISTEN_HOST: Final = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
_NAMESPACE: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_UNIX_SOCKET_MAX_BYTES: Final = 107
_PORT_MAX: Final = 65_535
_BUSY_RETRIES_MAX: Final = 2
_BODIES_BUFFERED_MIN: Final = 2


def rule_problems(config: Config) -> Iterator[str]:
    """Every broken rule as `key: sentence`."""
    yield from _model_problems(config)
    yield from _discovery_problems(config)
    yield from _port_problems(config)
    yield from _header_problems(config)
    yield from _timeout_problems(config)
    yield from _retry_problems(config)
    yield from _credential_problems(config)
    for key, host in (("host", config.server.host), ("admin_host", config.server.admin_host)):
        if not _LISTEN_HOST.fullmatch(host):
            yield f"server.{key}: expected an IP address (IPv6 without brackets) or a name"
    if config.server.max_buffered_bytes < _BODIES_BUFFERED_MIN * config.server.max_body_bytes:
        yield (
            "server.max_buffered_bytes: must be at least twice server.max_body_bytes "
            f"({config.server.max_body_bytes}), or the largest bodies would never be accepted"
        )
    socket_path = config.server.unix_socket
    if socket_path is not None:
        if not socket_path.startswith("/"):
            yield "server.unix_socket: expected an absolute path"
        if "\0" in socket_path:
            yield "server.unix_socket: a NUL cannot be part of a path"
        if len(socket_path.encode()) > _UNIX_SOCKET_MAX_BYTES:
            yield f"server.unix_socket: longer than {_UNIX_SOCKET_MAX_BYTES} bytes"


def _model_problems(config: Config) -> Iterator[str]:
    if not config.models:
        yield "models: at least one model is needed, or nothing could be routed"
    seen: dict[str, int] = {}
    for index, model in enumerate(config.models):
        if not model.id.strip() or model.id != model.id.strip():
            yield f"models[{index}].id: must not be blank or padded with blanks"
        if any(ord(char) < 0x20 or ord(char) > 0x7E for char in model.id):
            # It travels in a header.
            yield f"models[{index}].id: only printable ASCII can be sent in a header"
        if model.id in seen:
            yield f"models[{index}].id: {model.id!r} is already models[{seen[model.id]}]"
        seen.setdefault(model.id, index)
        asks = model.tokens_from == "engine"
        if model.policy in TOKEN_POLICIES and model.tokenizer_path is None and not asks:
            yield f"models[{index}].tokenizer_path: needed by the policy {model.policy!r}"
        if model.pd.min_prefill_tokens:
            key = f"models[{index}].pd.min_prefill_tokens"
            if model.pd.protocol == "sglang":
                yield f"{key}: an SGLang decode worker cannot prefill, hence only with 'nixl'"
            if model.policy not in TOKEN_POLICIES:
                yield f"{key}: the policy {model.policy!r} does not know a prompt's tokens"
        yield from _kv_event_problems(config, model, f"models[{index}].kv_events")
        yield from _queue_problems(config, model.queue, f"models[{index}].queue")


def _queue_problems(config: Config, queue: QueueConfig, path: str) -> Iterator[str]:
    for key in ("tenant_header", "priority_header"):
        name = getattr(queue, key)
        if not _ANY_HEADER_NAME.fullmatch(name) or name in _HEADERS_WITH_A_MEANING:
            yield f"{path}.{key}: expected the lower-case name of a header of the gateway"
    if len(set(queue.priority_classes)) < len(queue.priority_classes):
        yield f"{path}.priority_classes: each class can be given only once"
    if queue.default_class not in queue.priority_classes:
        yield f"{path}.default_class: not one of priority_classes"
    if queue.max_requests and queue.max_wait_secs >= config.server.step_deadline_secs:
        yield (
            f"{path}.max_wait_secs: must be shorter than server.step_deadline_secs "
            f"({config.server.step_deadline_secs:g})"
        )


def _kv_event_problems(config: Config, model: ModelConfig, path: str) -> Iterator[str]:
    if model.kv_events and model.policy not in TOKEN_POLICIES:
        yield f"{path}: the policy {model.policy!r} looks at no KV events"
    section = config.discovery.static_urls
    configured = set() if isinstance(section, UnsetType) else set(normalised(section.urls))
    seen: dict[str | None, int] = {}
    for index, entry in enumerate(model.kv_events):
        key = f"{path}[{index}]"
        for name, text in (
            ("endpoint", entry.endpoint),
            ("replay_endpoint", entry.replay_endpoint),
        ):
            if text is None:
                continue
            try:
                if parse_kv_endpoint(text)[1] + entry.dp_size - 1 > _PORT_MAX:
                    yield f"{key}.{name}: the port of the last rank is over {_PORT_MAX}"
            except ValueError as error:
                yield f"{key}.{name}: {error}"
        url = None if entry.url is None else next(iter(normalised([entry.url])), "")
        if url is not None and config.discovery.backend != "static_urls":
            yield f"{key}.url: only with the backend 'static_urls'; leave it out for all workers"
        elif url is not None and url not in configured:
            yield f"{key}.url: not one of discovery.static_urls.urls"
        if url in seen:
            yield f"{key}.url: the same workers as {path}[{seen[url]}]"
        seen.setdefault(url, index)


def _discovery_problems(config: Config) -> Iterator[str]:
    discovery = config.discovery
    sections: dict[str, Struct | UnsetType] = {
        "static_urls": discovery.static_urls,
        "dns": discovery.dns,
        "k8s": discovery.k8s,
        "k8s_pods": discovery.k8s_pods,
        "inference_pool": discovery.inference_pool,
    }
    if sections[discovery.backend] is UNSET:
        key = discovery.backend
        yield f"discovery.{key}: this section is needed for backend {key!r}"
    for other, section in sections.items():
        if other != discovery.backend and section is not UNSET:
            yield f"discovery.{other}: without effect, since the backend is {discovery.backend!r}"
    if discovery.listed is not None:
        yield from listed_url_problems(config)
    elif discovery.cluster is not None:
        yield from _cluster_problems(f"discovery.{discovery.backend}", discovery.cluster)


def _cluster_problems(path: str, section: ClusterSection) -> Iterator[str]:
    if section.namespace and not _NAMESPACE.fullmatch(section.namespace):
        yield f"{path}.namespace: expected the name of a namespace, or nothing for all of them"
    pool = isinstance(section, InferencePoolConfig)
    if pool and not section.namespace:
        yield f"{path}.namespace: expected the namespace of the pool"
    plain = pool or getattr(section, "label_selector", None) is not None
    halves = [section.prefill_selector is not None, section.decode_selector is not None]
    if not plain and not any(halves):
        yield f"{path}.label_selector: needed, or both prefill_selector and decode_selector"
    elif any(halves) and not all(halves):
        missing = "decode_selector" if halves[0] else "prefill_selector"
        yield f"{path}.{missing}: prefill_selector and decode_selector belong together"
    parsed = {}
    for key in ("label_selector", "prefill_selector", "decode_selector"):
        text = getattr(section, key, None)
        if text is None:
            continue
        try:
            parsed[key] = parse_selector(text)
        except ValueError as error:
            yield f"{path}.{key}: {error}"
    both = parsed.get("prefill_selector")
    if both is not None and both == parsed.get("decode_selector"):
        yield f"{path}.decode_selector: selects the same as prefill_selector"


def _port_problems(config: Config) -> Iterator[str]:
    owners: dict[int, str] = {}
    for key, port in (
        ("server.port", config.server.port),
        ("server.admin_port", config.server.admin_port),
        ("envoy.port", config.envoy.port),
        ("envoy.admin_port", config.envoy.admin_port),
    ):
        if port in owners:
            yield f"{key}: {port} is already the value of {owners[port]}"
        owners.setdefault(port, key)


def _header_problems(config: Config) -> Iterator[str]:
    envoy = config.envoy
    names = {"cluster_header": envoy.cluster_header, "model_header": envoy.model_header}
    for key, name in names.items():
        if not _HEADER_NAME.fullmatch(name) or name.startswith("x-envoy-"):
            yield (
                f"envoy.{key}: expected a lower-case name that begins with x- and not with x-envoy-"
            )
        if name in _HEADERS_WITH_A_MEANING:
            yield f"envoy.{key}: {name} has another meaning"
    if envoy.cluster_header == envoy.model_header:
        yield "envoy.model_header: must differ from envoy.cluster_header"
    path = envoy.endpoints_file
    if path is not None and not (path.startswith("/") and path.endswith(".json")):
        yield "envoy.endpoints_file: expected an absolute path that ends in .json"
    if path is None and envoy.endpoints == "file":
        yield "envoy.endpoints_file: must be set with envoy.endpoints: file"
    if path is not None and envoy.endpoints not in (None, "file"):
        yield f"envoy.endpoints_file: has no effect with envoy.endpoints: {envoy.endpoints}"
    if envoy.fail_open_host is not None:
        if not envoy.has_ads:
            yield "envoy.fail_open_host: has no effect without envoy.endpoints: ads"
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,253}:[0-9]{1,5}", envoy.fail_open_host):
            yield "envoy.fail_open_host: expected host:port"
    if not re.fullmatch(r"[A-Za-z0-9_.|:-]{1,200}", envoy.cluster):
        yield "envoy.cluster: expected letters, digits and any of _ . | : -"


def _retry_problems(config: Config) -> Iterator[str]:
    proxy = config.proxy
    if proxy.retry_busy and proxy.fallback_workers > _BUSY_RETRIES_MAX:
        yield (
            f"proxy.fallback_workers: at most {_BUSY_RETRIES_MAX} with proxy.retry_busy, so that "
            "full workers do not get each request several times"
        )


def _timeout_problems(config: Config) -> Iterator[str]:
    if config.server.step_deadline_secs >= config.envoy.message_timeout_secs:
        yield (
            "server.step_deadline_secs: must be shorter than envoy.message_timeout_secs "
            f"({config.envoy.message_timeout_secs:g})"
        )
    if config.envoy.stream_idle_timeout_secs <= config.proxy.request_timeout_secs:
        yield (
            "envoy.stream_idle_timeout_secs: must be longer than proxy.request_timeout_secs "
            f"({config.proxy.request_timeout_secs:g})"
        )


def _credential_problems(config: Config) -> Iterator[str]:
    workers, server = config.workers, config.server
    if server.admin_token_file is not None and server.admin_token_env is not None:
        yield "server.admin_token_env: not beside admin_token_file, only one can be given"
    if workers.api_key is not None and workers.api_key_file is not None:
        yield "workers.api_key_file: only one of api_key and api_key_file can be given"
    if workers.api_key is not None and not API_KEY.fullmatch(workers.api_key):
        yield "workers.api_key: expected printable ASCII without blanks"
    if workers.forward_api_key and workers.api_key is None and workers.api_key_file is None:
        yield "workers.forward_api_key: needs workers.api_key or workers.api_key_file"
    extproc = config.envoy.extproc
    tls = server.tls
    if server.unix_socket is None and tls is not None:
        if extproc.ca_file is None:
            yield (
                "envoy.extproc.ca_file: needed with server.tls, or Envoy could not verify this "
                "service"
            )
        if tls.client_ca_file is not None and extproc.cert_file is None:
            yield "envoy.extproc.cert_file: needed with server.tls.client_ca_file"
    if (extproc.cert_file is None) != (extproc.key_file is None):
        yield "envoy.extproc.key_file: cert_file and key_file belong together"
