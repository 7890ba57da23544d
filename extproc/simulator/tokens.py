"""Turns text into token ids: with a real model's tokenizer, or without any file.

Without a file a token is a byte of the text in UTF-8, so tests are easy to count. Without a
model's folder there is no template: a chat becomes role and content of each message, then the
role of the answer. A model's folder brings its template.

An output of n tokens has the ids of the first n tokens of its text. The next turn, which
repeats that text, therefore finds it in the cache.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from extproc.simulator.answers import text_of
from extproc.simulator.bodies import Prompt
from extproc.simulator.chat_template import ChatTemplate
from extproc.simulator.chats import Chat

__all__ = ["Tokenizer"]

_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"


class Tokenizer:
    """`path` names a `tokenizer.json`, or a folder with one and a chat template.

    Raises ValueError for anything else.
    """

    def __init__(self, path: str | None = None) -> None:
        self._model: tokenizers.Tokenizer | None = None
        self._template: ChatTemplate | None = None
        if path is None:
            return
        try:
            self._load(Path(path))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"tokenizer_path: {path}: {error}") from error

    def encode(self, text: str, *, special_tokens: bool = False) -> Sequence[int]:
        """At least one token; `special_tokens` adds the special tokens of the model's file."""
        return self._ids(text, special_tokens) or [0]

    def encode_prompt(self, prompt: Prompt, *, special_tokens: bool = False) -> Sequence[int]:
        """The ids of a prompt in any of its forms; raises ValueError if it is refused."""
        if isinstance(prompt, str):
            return self.encode(prompt, special_tokens=special_tokens)
        if isinstance(prompt, Chat):
            return self.encode_chat(prompt)
        if isinstance(prompt, list):
            return prompt
        raise TypeError("a prompt of another engine")

    def encode_chat(self, chat: Chat) -> Sequence[int]:
        """At least one token; raises ChatTemplateError if the template refuses the chat."""
        if self._template is None:
            return self.encode(chat.text)
        text, begun = self._template.render(chat)
        ids = [*self._ids(text, False)]
        if begun:  # encoded separately, as a text that begins with a BOS if the file says so
            continued = self._ids(begun, True)
            ids += continued[1:] if self._begins_with_bos(continued) else continued
        return ids or [0]

    def output(self, produced: int) -> Sequence[int]:
        """The ids of an output of this length."""
        return self.encode(text_of(produced))[:produced]

    def _load(self, path: Path) -> None:
        is_folder = path.is_dir()
        model = tokenizers.Tokenizer.from_file(str(path / _TOKENIZER_FILE if is_folder else path))
        model.no_truncation()
        model.no_padding()
        self._model = model
        if is_folder:
            file = path / _CONFIG_FILE
            raw = file.read_bytes() if file.exists() else b"{}"
            self._load_template(path, msgspec.json.decode(raw, type=dict[str, Any]))

    def _load_template(self, path: Path, config: dict[str, Any]) -> None:
        self._template = ChatTemplate(path, config)

    def _ids(self, text: str, special_tokens: bool) -> Sequence[int]:
        if self._model is None:
            return text.encode()
        ids: list[int] = self._model.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def _begins_with_bos(self, ids: Sequence[int]) -> bool:
        if self._model is None or self._template is None or self._template.bos_token is None:
            return False
        return bool(ids) and ids[0] == self._model.token_to_id(self._template.bos_token)
