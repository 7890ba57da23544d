"""Reads which LoRA adapters a worker has loaded, from its list of models.

vLLM and SGLang list an adapter in `/v1/models` as a model with a `parent`. An engine can load and
unload adapters while it runs, and a client that may do so decides about their names and number. So
both are bounded here, where they come in.
"""

from typing import Any, Final

import msgspec
from msgspec import Struct

__all__ = ["ADAPTERS_MAX", "NAME_MAX_CHARS", "ModelList", "is_name", "read_model_list"]

NAME_MAX_CHARS: Final = 256
# Of one worker; each adapter takes memory for its name in every worker that lists it.
ADAPTERS_MAX: Final = 1024
# Each model that is not an adapter becomes a metric series.
_MODELS_MAX: Final = 32


class _ModelCard(Struct):
    id: str
    parent: Any = None


class _ModelCards(Struct):
    data: list[_ModelCard]


class ModelList(Struct, frozen=True, kw_only=True):
    """The names in an answer to `/v1/models`: at most 32 models and ADAPTERS_MAX adapters.

    `left_out` is the number of adapters that were not taken.
    """

    models: tuple[str, ...]
    adapters: tuple[str, ...] = ()
    left_out: int = 0


def read_model_list(body: bytes) -> ModelList | None:
    """Read an answer to `/v1/models`; None if it is not a list of models.

    An adapter is a model whose parent is another model of the list. Names of adapters with
    characters that cannot be printed are left out.
    """
    try:
        cards = msgspec.json.decode(body, type=_ModelCards).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    roots = frozenset(card.id for card in cards if not isinstance(card.parent, str))
    models: dict[str, None] = {}
    adapters: dict[str, None] = {}
    for card in cards:
        if is_name(card.id):
            is_adapter = isinstance(card.parent, str) and card.parent in roots
            (adapters if is_adapter and card.id not in roots else models)[card.id] = None
    taken = tuple([name for name in adapters if name.isprintable()][:ADAPTERS_MAX])
    return ModelList(
        models=tuple(models)[:_MODELS_MAX], adapters=taken, left_out=len(adapters) - len(taken)
    )


def is_name(value: Any) -> bool:
    """True for a name of a model that can be used."""
    return isinstance(value, str) and 0 < len(value) <= NAME_MAX_CHARS
