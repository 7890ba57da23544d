"""Gives a request for a LoRA adapter the name by which the chosen engine finds it.

vLLM takes the adapter's own name as the model, and answers 404 to `model:adapter`. SGLang takes
`model:adapter`, and serves the model itself when it gets the adapter's own name. So the member
`model` is replaced where the client has chosen the other form. SGLang's own path `/generate` reads
the adapter from `lora_path` alone.
"""

import msgspec

from extproc.routing.request import GENERATE_PATH, Request
from extproc.workers.worker import Worker

__all__ = ["joined_members", "model_member"]


def model_member(request: Request, model: str, worker: Worker) -> bytes:
    """The JSON member that the body needs for this worker; empty if it is right as it is.

    `model` is the configured model that the request was resolved to.
    """
    adapter = request.adapter
    if adapter is None or adapter not in worker.adapters:
        return b""
    name = adapter
    if worker.spec.engine is not None and worker.engine.adapters_with_model:
        is_base = request.model is None or request.model in worker.model_ids
        if request.lora_path == adapter and is_base:
            return b""
        if request.endpoint.path == GENERATE_PATH:
            return b'"lora_path":' + msgspec.json.encode(adapter)
        name = f"{_base(model, worker)}:{adapter}"
    return b"" if request.model == name else b'"model":' + msgspec.json.encode(name)


def joined_members(*members: bytes) -> bytes:
    """JSON members in one text, without empty ones."""
    return b",".join([one for one in members if one])


def _base(model: str, worker: Worker) -> str:
    """The name of the model itself, where the configured model is the adapter."""
    if model not in worker.adapters:
        return model
    return next((one for one in worker.model_ids if one not in worker.adapters), model)
