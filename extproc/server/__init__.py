"""The ext_proc service that Envoy asks: messages of a gRPC stream in, replies out.

Begin with `session`: the state machine of a stream, free of I/O, with `route_session` for the
first pass and `decode_session` for the second. A session gets bytes, read by `messages` and
`bodies`, and returns `steps` with `replies`. `stream` carries them out: it owns the reads, the
writes, the lease and the calls of the router. `admission` limits what is in flight at once.
`grpc_server` has addresses, health and draining, with the `certificates` that it shows.
`model_list` is the answer to `/v1/models`.
"""

__all__ = [
    "admission",
    "admission_collector",
    "certificates",
    "grpc_server",
    "messages",
    "model_list",
    "replies",
    "session",
    "stream",
    "stream_settings",
]
