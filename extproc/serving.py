"""Builds the gRPC server and what its streams are served with, from a Config.

Separate from the wiring below it because a reload builds the second part again, for a server that
runs.
"""

from typing import Final
from uuid import uuid4

from extproc.build import Routing, Shared, forwarded_authorization
from extproc.config.models import TOKEN_POLICIES
from extproc.config.schema import Config
from extproc.routing.router import Router
from extproc.server.admission import Admission, AdmissionLimits
from extproc.server.grpc_server import ExtProcServer
from extproc.server.messages import RequestHeadTable, ResponseTable
from extproc.server.model_list import ModelList
from extproc.server.replies import ReplyBuilder
from extproc.server.session import SessionContext
from extproc.server.stream import Streams
from extproc.server.stream_settings import Extension, StreamSettings
from extproc.tokenization.encoder import EncoderSettings
from extproc.xds.service import DiscoveryService

__all__ = [
    "admission_limits",
    "build_server",
    "build_streams",
    "session_context",
    "stream_settings",
]

_EXTENSION_SHARE: Final = 0.5


def admission_limits(config: Config) -> AdmissionLimits:
    """How much may be in flight at once."""
    server = config.server
    return AdmissionLimits(
        max_requests=server.max_requests, max_buffered_bytes=server.max_buffered_bytes
    )


def session_context(
    config: Config, shared: Shared, router: Router, admission: Admission
) -> SessionContext:
    """What all sessions share. The admission counts requests of every configuration."""
    return SessionContext(
        admission=admission,
        builder=ReplyBuilder(config.envoy, forwarded_authorization(config, shared.api_key)),
        heads=RequestHeadTable(),
        responses=ResponseTable(),
        max_body_bytes=config.server.max_body_bytes,
        models_body=ModelList(router.model_ids, shared.registry.names),
        only_model=router.only_model,
        debug_headers=config.observability.debug_headers,
        prompt_max_bytes=_prompt_max_bytes(config),
        model_header=config.envoy.model_header,
        new_request_id=_new_request_id,
    )


def stream_settings(config: Config) -> StreamSettings:
    """The deadlines of streams."""
    return StreamSettings(
        step_deadline_seconds=config.routing_deadline_secs,
        body_deadline_seconds=config.proxy.request_timeout_secs,
        log_decisions=config.observability.log_level == "debug",
        extension=_extension(config),
    )


def _extension(config: Config) -> Extension | None:
    """Half of the time after which Envoy would take this service for hung may pass before.

    It is that of the second pass, the shorter one: a stream does not know its pass in time.
    """
    whole = config.envoy.message_timeout_secs
    after = _EXTENSION_SHARE * config.envoy.second_pass_hang_secs
    if after >= config.routing_deadline_secs:
        return None  # the service answers before
    return Extension(after_seconds=after, message_timeout_seconds=whole + config.extra_wait_secs)


def build_streams(config: Config, shared: Shared, router: Router) -> Streams:
    """What the gRPC server does with its streams."""
    context = session_context(config, shared, router, Admission(admission_limits(config)))
    return Streams(context, router, shared.metrics, stream_settings(config))


def build_server(
    config: Config, shared: Shared, routing: Routing, discovery: DiscoveryService | None = None
) -> ExtProcServer:
    """The gRPC server, with ADS if `discovery` is given."""
    services = () if discovery is None else (discovery.handler(),)
    return ExtProcServer(config.server, build_streams(config, shared, routing.router), services)


def _prompt_max_bytes(config: Config) -> int:
    if all(model.policy not in TOKEN_POLICIES for model in config.models):
        return 0
    return EncoderSettings().inline_body_bytes


def _new_request_id() -> str:
    return str(uuid4())
