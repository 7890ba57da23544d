"""What the tests ask of real engines: chats that share beginnings, as agents' do."""

import random
from typing import Any, Final

__all__ = ["TOOLS", "Talk", "words"]

_TEXT: Final = (
    "the weather of a city is sunny and it will be warm in Paris today please write function "
    "that reads file returns its lines I think therefore answer question people helpful"
)
TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "the weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


def words(seed: str, count: int) -> str:
    """That many words, the same for the same seed."""
    chosen = random.Random(seed)
    known = _TEXT.split()
    return " ".join(chosen.choice(known) for _ in range(count))


class Talk:
    """A conversation: each turn is the whole history and a new question."""

    def __init__(self, seed: str, *, system_words: int = 60, question_words: int = 25) -> None:
        self.seed = seed
        self.question_words = question_words
        system = words(f"{seed} system", system_words)
        self.messages: list[dict[str, Any]] = [
            {"role": "system", "content": f"{seed}. {system}"},
        ]
        self._turns = 0

    def question(self) -> list[dict[str, Any]]:
        """The messages of the next turn."""
        self._turns += 1
        asked = words(f"{self.seed} {self._turns}", self.question_words)
        self.messages.append({"role": "user", "content": asked})
        return list(self.messages)

    def answered(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})
