"""What the configuration says about a worker, by the models that the worker serves."""

from collections.abc import Collection, Sequence

import msgspec

from extproc.config.models import (
    TOKEN_POLICIES,
    CircuitBreakerConfig,
    ModelConfig,
    PdModelConfig,
)
from extproc.workers.introspection import Introspection, apply_introspection
from extproc.workers.kv_announcement import configured_kv_events
from extproc.workers.worker import KvEvents, WorkerSpec

__all__ = ["ConfiguredModels"]


class ConfiguredModels:
    """The configured models, looked up by what a worker serves."""

    def __init__(self, models: Sequence[ModelConfig]) -> None:
        self._by_id = {model.id: model for model in models}

    @property
    def ids(self) -> Collection[str]:
        """A view: it follows `replace`."""
        return self._by_id.keys()

    def replace(self, models: Sequence[ModelConfig]) -> "ConfiguredModels":
        """Take over other models; returns what was configured so far."""
        before = ConfiguredModels(list(self._by_id.values()))
        self._by_id.clear()
        self._by_id.update({model.id: model for model in models})
        return before

    def is_disaggregated(self, model: str) -> bool:
        """True if the configuration says that prefill and decode workers serve the model."""
        found = self._by_id.get(model)
        return found is not None and found.pd != PdModelConfig()

    def moved(self, spec: WorkerSpec, before: "ConfiguredModels") -> WorkerSpec:
        """The spec with the KV events of these models, where it had those of `before`."""
        found = self.with_adapters(spec, spec.adapters)
        if spec.kv_events is None or spec.kv_events == before._kv_events(spec):
            return msgspec.structs.replace(found, kv_events=self._kv_events(found))
        return found

    def with_adapters(self, spec: WorkerSpec, adapters: tuple[str, ...]) -> WorkerSpec:
        """The spec of a worker that has loaded these adapters; a configured one is a model, too."""
        models = [model for model in spec.model_ids if model not in set(spec.adapters)]
        models += [adapter for adapter in adapters if adapter in self._by_id]
        return msgspec.structs.replace(spec, adapters=adapters, model_ids=tuple(models))

    def token_model(self, spec: WorkerSpec) -> str | None:
        """The first model of the worker whose policy looks at tokens: it has ranks for that."""
        models = self._of(spec)
        return next((model.id for model in models if model.policy in TOKEN_POLICIES), None)

    def breaker_of(self, spec: WorkerSpec) -> CircuitBreakerConfig:
        """The breaker of the first configured model that the worker serves, else the defaults."""
        models = self._of(spec) or [ModelConfig(id="-")]
        return models[0].circuit_breaker

    def complete(self, spec: WorkerSpec, answer: Introspection) -> WorkerSpec:
        """The spec with the answer, and with the configured KV events if it named no others.

        An engine that does not say what it is has the configured one.

        What is configured for vLLM counts more: its own answer is new, and the configuration may
        know of ports that are mapped.
        """
        if spec.kv_events is not None and spec.kv_events == self._kv_events(spec):
            # Those of the models it served so far: they may not hold for its models now.
            spec = msgspec.structs.replace(spec, kv_events=None)
        spec = apply_introspection(spec, answer)
        if spec.engine is None and (models := self._of(spec)):
            spec = msgspec.structs.replace(spec, engine=models[0].engine)
        spec = self.with_adapters(spec, spec.adapters)
        if spec.kv_events is not None and not (spec.engine == "vllm" and self._kv_events(spec)):
            return spec
        return msgspec.structs.replace(spec, kv_events=self._kv_events(spec))

    def model_without_kv_events(self, spec: WorkerSpec) -> str | None:
        """A model of the worker whose policy needs KV events, where nothing says their place."""
        if spec.kv_events is None:
            for model in self._of(spec):
                if model.policy in TOKEN_POLICIES:
                    return model.id
        return None

    def _kv_events(self, spec: WorkerSpec) -> KvEvents | None:
        for model in self._of(spec):
            if found := configured_kv_events(model.kv_events, spec.url):
                return found
        return None

    def _of(self, spec: WorkerSpec) -> list[ModelConfig]:
        return [self._by_id[model] for model in spec.model_ids if model in self._by_id]
