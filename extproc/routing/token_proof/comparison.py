"""Compares the tokens of a probe: names the first difference and its likely cause.

Everything here is pure. The texts that it makes are of probes and of the engine's answer to one;
they are short, however long the answer is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, TypeAlias

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from extproc.routing.token_proof.probes import Probe
from extproc.routing.token_proof.traits import (
    CHAT,
    CONTINUED,
    MESSAGES,
    PARTS,
    RESPONSES,
    TEXT,
    THINKING,
    TOOLS,
)

__all__ = ["FIXES", "Cause", "Difference", "Ids", "compare", "likely_cause"]

Ids: TypeAlias = NDArray[np.uint64]
Cause: TypeAlias = Literal[
    "other_tokenizer",
    "first_token",
    "special_tokens",
    "other_template",
    "generation_prompt",
    "tools",
    "content_parts",
    "last_message",
    "template_arguments",
    "other_api",
    "other_engine",
]
# What to look at, for each cause.
FIXES: Final[Mapping[str, str]] = {
    "other_tokenizer": "models[].tokenizer_path must be the tokenizer that the engine loads",
    "first_token": "add_bos_token and the post-processor of models[].tokenizer_path must be those "
    "of the engine's model",
    "special_tokens": "the added tokens of models[].tokenizer_path must be those of the engine's "
    "model",
    "other_template": "models[].tokenizer_path must have the chat template of the engine; see its "
    "--chat-template, models[].chat_template_name and models[].chat_template_kwargs",
    "generation_prompt": "models[].tokenizer_path must have the chat template of the engine; see "
    "its --chat-template",
    "tools": "the engine's chat template for tools, or its version, is another one; see its "
    "--chat-template and --tool-call-parser, and models[].exclude_tools_when_tool_choice_none",
    "content_parts": "models[].chat_template_content_format must be the engine's "
    "--chat-template-content-format",
    "last_message": "the engine continues a last message of the assistant in another way; compare "
    "its version",
    "template_arguments": "models[].chat_template_kwargs must be the engine's "
    "--default-chat-template-kwargs",
    "other_engine": "the engine renders by other rules than those of its name: compare what the "
    "worker is, and its version, with what /workers shows",
    "other_api": "the engine translates this API in another way; compare its version",
}

# So many kinds of requests differ, while plain chats do not, if the rules are another engine's.
_KINDS_OF_OTHER_ENGINE: Final = 3
# Tokens shown on each side of the first difference, and characters of each text.
_SHOWN: Final = 4
_SHOWN_CHARS: Final = 80
_OF_TRAIT: Final[dict[int, Cause]] = {
    TOOLS: "tools",
    PARTS: "content_parts",
    CONTINUED: "last_message",
    THINKING: "template_arguments",
    RESPONSES: "other_api",
    MESSAGES: "other_api",
}


class Difference(Struct, frozen=True):
    """A probe whose tokens differ.

    `position` is that of the first difference, `ours` and `engines` the numbers of tokens, and the
    texts a few tokens before it and after it, joined. `first_only`: without the first token of one
    side, both are equal.
    """

    probe: str
    trait: int
    position: int
    ours: int
    engines: int
    our_text: str
    engines_text: str
    first_only: bool

    @property
    def text(self) -> str:
        """In one sentence."""
        return (
            f"probe {self.probe}: token {self.position} differs: {self.our_text!r} here "
            f"({self.ours} tokens), {self.engines_text!r} in the engine ({self.engines} tokens)"
        )


def compare(
    probe: Probe, ours: Ids, engines: Ids, text_of: Callable[[Sequence[int]], str]
) -> Difference | None:
    """The difference of two answers for a probe, None if they are equal.

    `text_of` gives the text of ids, whether they are in the vocabulary or not.
    """
    if np.array_equal(ours, engines):
        return None
    shorter = min(len(ours), len(engines))
    unequal = np.flatnonzero(ours[:shorter] != engines[:shorter])
    position = int(unequal[0]) if len(unequal) else shorter
    return Difference(
        probe=probe.name,
        trait=probe.trait,
        position=position,
        ours=len(ours),
        engines=len(engines),
        our_text=_around(ours, position, text_of),
        engines_text=_around(engines, position, text_of),
        first_only=np.array_equal(ours[1:], engines) or np.array_equal(ours, engines[1:]),
    )


def _around(ids: Ids, position: int, text_of: Callable[[Sequence[int]], str]) -> str:
    begin = max(0, position - _SHOWN)
    text = text_of([int(one) for one in ids[begin : position + _SHOWN]])
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"


def likely_cause(differences: Sequence[Difference], equal: frozenset[str]) -> Cause:
    """The cause that explains most of at least one difference.

    `equal` are the names of the probes whose tokens were equal.
    """
    by_name = {one.probe: one for one in differences}
    first = differences[0]
    if first.first_only:
        return "first_token"
    if "text" in by_name:
        return "other_tokenizer"
    if "text_with_marks" in by_name:
        return "special_tokens"
    chats = [one for one in differences if one.trait == CHAT]
    if chats:
        at_end = all(one.position == min(one.ours, one.engines) for one in chats)
        return "generation_prompt" if at_end else "other_template"
    if first.trait == TEXT:
        return "other_tokenizer"
    # Continued and other chats: what all of them share is the template.
    if "chat" not in equal and "conversation" not in equal:
        return "other_template"
    if len({one.trait for one in differences}) >= _KINDS_OF_OTHER_ENGINE:
        return "other_engine"
    return _OF_TRAIT[first.trait]
