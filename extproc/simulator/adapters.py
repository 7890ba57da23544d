"""The LoRA adapters of a worker, which are loaded and unloaded while it runs."""

from extproc.simulator.errors import ApiError

__all__ = ["Adapters"]


class Adapters:
    """The adapters that are loaded now, by name, with their paths."""

    def __init__(self, model: str, names: list[str]) -> None:
        self._model = model
        self.paths = {name: f"/adapters/{name}" for name in names}

    def resolve(self, model: str | None) -> str | None:
        """The adapter that this model name means, None for the base; ApiError 404 for others."""
        if model is None or model == self._model:
            return None
        if model not in self.paths:
            raise ApiError(404, f"The model `{model}` does not exist.")
        return model

    def check(self, adapter: str | None) -> None:
        """As SGLang: raises ApiError 400 for an adapter that is not loaded."""
        if adapter is not None and adapter not in self.paths:
            raise ApiError(400, f"Got LoRA adapter that has never been loaded: {adapter}")

    def load(self, name: str, path: str, *, in_place: bool = False) -> None:
        """Raises ApiError 400 for a name that is taken or empty."""
        if not name or not path:
            raise ApiError(400, "Both 'lora_name' and 'lora_path' must be provided.")
        if name == self._model:
            raise ApiError(400, f"The lora adapter '{name}' conflicts with a served base model.")
        if name in self.paths and not in_place:
            raise ApiError(400, f"The lora adapter '{name}' has already been loaded.")
        self.paths[name] = path

    def unload(self, name: str) -> None:
        """Raises ApiError 404 if it is not loaded."""
        if self.paths.pop(name, None) is None:
            raise ApiError(404, f"The lora adapter '{name}' cannot be found.")
