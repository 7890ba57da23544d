"""Routing: from a parsed request to the workers that serve it.

Begin with `router`: it resolves the model, asks the model's `chooser` (or `rank_chooser`) for a
worker, and lets `dispatch` make the `decision` and the `lease`. Models with prefill and decode
workers go through `pd`. A `claim` is everything that a request takes on a worker; `ranks` follows
the data-parallel ranks of workers, and `placement` weighs what they hold of a prompt.
While all workers of a model are full (`spare_capacity` is 0), requests may wait in a `wait_queue`.
`pool_signals` tells autoscalers how busy the pools are; `demand` is what clients have asked for.
`polled_load` asks vLLM for its load. `token_proof` compares the tokens of engines with ours, and
`engine_prompts` asks for those that only an engine can make.
Nothing here knows ext_proc messages: `server` turns decisions into replies.
"""

__all__ = [
    "chooser",
    "claim",
    "decision",
    "demand",
    "dispatch",
    "engine_prompts",
    "gateway_watch",
    "json_members",
    "lease",
    "local_endpoints",
    "outcomes",
    "pd",
    "placement",
    "polled_load",
    "pool_signals",
    "rank",
    "rank_chooser",
    "ranks",
    "request",
    "router",
    "spare_capacity",
    "subset",
    "token_proof",
    "wait_queue",
]
