"""The workers: which are registered, their models and roles, their health and their load.

Begin with `registry`, which routing reads, and `manager`, which fills it: `source` delivers
discovery's events, `runtime_workers` adds those of operators, `source_health` says whether they are
current, `introspection` asks the engines, `membership` registers, changes and removes workers,
`vanished` holds those that were lost from sight, and each `observer` is notified. A `worker` has a
`circuit_breaker`, `pool_faults` tells a worker's fault from a request's, open `tickets` count its
requests, and `rank_load` estimates the load of one of its ranks. Only `introspection_client` and
`prefill_client` import aiohttp; `engine_calls` has their protocols, `vllm_answers` reads what vLLM
says, and `engine_tokenizer` asks for the tokens of a body. `adapters` reads which LoRA adapters a
worker has loaded, `adapter_watch` asks for them again, and `model_names` resolves the names of
models and adapters.
"""

__all__ = [
    "circuit_breaker",
    "configured_models",
    "engine_calls",
    "engine_tokenizer",
    "introspection_client",
    "manager",
    "membership",
    "model_names",
    "observer",
    "pool_faults",
    "prefill_client",
    "prefill_speed",
    "rank_load",
    "registry",
    "resolver",
    "runtime_workers",
    "source",
    "source_health",
    "tickets",
    "vllm_answers",
    "worker",
    "worker_warnings",
]
