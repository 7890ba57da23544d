"""The demo's conversations of several tenants: the same in every run and for every policy.

A tenant's conversations begin with the tenant's long system prompt. Each turn repeats all
earlier messages, as chat clients do. Conversations begin even if earlier ones are not yet
answered, so a fleet that is too slow builds up queues instead of slowing its clients down.
"""

from collections.abc import Iterator
from random import Random
from typing import Final

from msgspec import Struct

__all__ = ["WORDS", "Conversation", "Turn", "conversations"]

WORDS: Final = (
    *("about", "above", "after", "again", "always", "and", "answer", "apple", "around", "as"),
    *("basket", "before", "below", "bridge", "bright", "but", "by", "candle", "carry", "city"),
    *("clock", "cloud", "cold", "customer", "day", "deep", "door", "each", "early", "evening"),
    *("field", "find", "for", "from", "garden", "give", "glass", "green", "harbour", "help"),
    *("hill", "house", "in", "island", "keep", "kind", "lantern", "late", "light", "line"),
    *("long", "machine", "market", "morning", "mountain", "never", "night", "north", "of", "old"),
    *("on", "order", "paper", "path", "people", "question", "quiet", "rain", "read", "river"),
    *("road", "room", "sail", "sea", "ship", "short", "small", "stone", "story", "table"),
    *("tell", "the", "then", "tower", "train", "tree", "under", "valley", "village", "wait"),
    *("walk", "water", "weather", "when", "wind", "winter", "with", "wood", "write", "year"),
)

_TENANTS_PER_WORKER: Final = 3
_SKEW: Final = 0.5  # tenant n sends 1/n^power as much as the first one
_CONVERSATIONS_PER_WORKER_AND_SECOND: Final = 1.0
# No conversation begins after this share of the time, so that most of them can end.
_STARTS_SHARE: Final = 0.8
_SYSTEM_WORDS: Final = (1200, 2400)
_USER_WORDS: Final = (40, 200)
_REPLY_TOKENS: Final = (8, 16)
_TURNS: Final = (2, 5)
_THINK_SECONDS_MEAN: Final = 2.0
_THINK_SECONDS_LEAST: Final = 0.5


class Turn(Struct, frozen=True):
    """A question, the second after the start when it is due, and its answer's maximum length."""

    due_seconds: float
    text: str
    max_tokens: int


class Conversation(Struct, frozen=True):
    """Turns in order under the system prompt of a tenant; tenants are numbered from 0."""

    tenant: int
    system: str
    turns: list[Turn]


def conversations(workers: int, seconds: float, seed: int = 1) -> list[Conversation]:
    """All conversations for this many seconds and workers, in order of their beginning.

    The load grows with the workers. Some tenants are busier than others.
    """
    random = Random(seed)  # noqa: S311  # the same in every run
    tenants = _TENANTS_PER_WORKER * workers
    systems = [_sentence(random, _SYSTEM_WORDS) for _ in range(tenants)]
    shares = [(number + 1) ** -_SKEW for number in range(tenants)]
    found = []
    for start in _starts(random, workers, seconds):
        (tenant,) = random.choices(range(tenants), shares)
        turns = _turns(random, start, seconds)
        found.append(Conversation(tenant, systems[tenant], turns))
    return found


def _starts(random: Random, workers: int, seconds: float) -> Iterator[float]:
    now = 0.0
    while now < _STARTS_SHARE * seconds:
        yield now
        now += random.expovariate(_CONVERSATIONS_PER_WORKER_AND_SECOND * workers)


def _turns(random: Random, start: float, seconds: float) -> list[Turn]:
    turns: list[Turn] = []
    due = start
    for _ in range(random.randint(*_TURNS)):
        if due > seconds:
            break
        turns.append(Turn(due, _sentence(random, _USER_WORDS), random.randint(*_REPLY_TOKENS)))
        due += max(_THINK_SECONDS_LEAST, random.expovariate(1 / _THINK_SECONDS_MEAN))
    return turns


def _sentence(random: Random, words: tuple[int, int]) -> str:
    return " ".join(random.choices(WORDS, k=random.randint(*words)))
