"""The admin HTTP server, and the metrics that are read at a scrape.

Begin with `http`: it serves `/metrics`, `/healthz`, `/readyz` and `/workers`. `collector` reads the
state of workers, `pool_collector` that of pools and `kv_collector` that of ranks and tokenizers
when `/metrics` is requested, so that a worker that left has no series left. `access` asks for the
token where one is configured. `runtime_workers` adds and removes workers, the only change that this
server makes. `token_page` says the tokens of a request, and `client` asks a running service.
"""

__all__ = [
    "access",
    "client",
    "collector",
    "http",
    "kv_collector",
    "pool_collector",
    "runtime_workers",
    "token_page",
]
