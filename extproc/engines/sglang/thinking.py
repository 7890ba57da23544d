"""What a reasoning parser of SGLang (0.5.23) changes in a prompt.

The engine is started with one (`--reasoning-parser`) and says so in its server_info. It decides
whether a client may switch thinking, and how thoughts of earlier answers are written again.
"""

from typing import Final

from msgspec import Struct

__all__ = ["NO_PARSER", "OTHER_PARSER", "ReasoningParser", "parser_named"]


class ReasoningParser(Struct, frozen=True):
    """A parser: the marks around thoughts.

    `switched`: thinking is turned on and off by a variable of the chat template, or is always on.
    Others change the effort. Without a parser (`NO_PARSER`), thoughts are left out.
    """

    start: str = ""
    end: str = ""
    switched: bool = True
    exists: bool = True

    def written(self, thoughts: str) -> str:
        """Thoughts of an earlier answer as they are put before its text."""
        return f"{self.start}{thoughts}\n{self.end}"


NO_PARSER: Final = ReasoningParser(exists=False)
# One whose marks are not in the table.
OTHER_PARSER: Final = ReasoningParser(switched=False)

_THINK: Final = ReasoningParser("<think>", "</think>")
_WITH_THINK: Final = (
    "deepseek-r1", "deepseek-v3", "deepseek-v4", "deepseek-v41", "dots", "gigachat35", "glm45",
    "granite_thinking_parser", "interns1", "iquest_q1", "kimi_k2", "ling3", "mimo", "minimax",
    "minimax-append-think", "nanbeige", "nemotron_3", "poolside_v1", "qwen3", "qwen3-thinking",
    "step3", "step3p5",
)  # fmt: skip
_PARSERS: Final = {
    **dict.fromkeys(_WITH_THINK, _THINK),
    "gemma4": ReasoningParser("<|channel>thought\n", "<channel|>"),
    "kimi": ReasoningParser("◁think▷", "◁/think▷"),
    "cohere_command4": ReasoningParser("<|START_THINKING|>", "<|END_THINKING|>"),
    "minimax-m3": ReasoningParser("<mm:think>", "</mm:think>"),
}


def parser_named(name: str | None) -> ReasoningParser:
    """The parser of this name, in any case; NO_PARSER without a name."""
    return _PARSERS.get(name.lower(), OTHER_PARSER) if name else NO_PARSER
