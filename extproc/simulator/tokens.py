"""From text to token ids: the tokenizer of a real model, or one that needs no file.

Without a file a token is a byte of the text in UTF-8, so a test can count tokens by eye. The
text of a chat is the same in both cases, and no template: role and content of one message
after the other, then the role of the answer. A template would make the simulator a second
engine; clients that care for it send `input_ids`.

An output of n tokens has the ids of the first n tokens of its text: what a next turn repeats
of it is found in the cache, although its text makes more tokens than were produced.
"""

from collections.abc import Sequence

import tokenizers

from extproc.simulator.answers import text_of

__all__ = ["Tokenizer"]


class Tokenizer:
    """`path` names a `tokenizer.json`; raises ValueError when it is none."""

    def __init__(self, path: str | None = None) -> None:
        self._model: tokenizers.Tokenizer | None = None
        if path is not None:
            try:
                self._model = tokenizers.Tokenizer.from_file(path)
            except Exception as error:  # the library raises nothing narrower
                raise ValueError(f"tokenizer_path: {path}: {error}") from error

    def encode(self, text: str, *, special_tokens: bool = False) -> Sequence[int]:
        """At least one token; `special_tokens` adds those that the model's file asks for."""
        if self._model is None:
            return text.encode() or b"\0"
        ids: list[int] = self._model.encode(text, add_special_tokens=special_tokens).ids
        return ids or [0]

    def output(self, produced: int) -> Sequence[int]:
        """The ids of an output of so many tokens."""
        return self.encode(text_of(produced))[:produced]
