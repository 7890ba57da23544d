"""Turns the prompts of a worker like vLLM into token ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from extproc.simulator.bodies import Prompt
from extproc.simulator.chats import chat
from extproc.simulator.tokens import Tokenizer
from extproc.simulator.vllm_anthropic import DISABLED, merge_system
from extproc.simulator.vllm_chats import ContentFormat, VllmChat, VllmChatError, VllmText
from extproc.simulator.vllm_template import VllmTemplate

__all__ = ["VllmTokenizer"]


class VllmTokenizer(Tokenizer):
    """`form` overrides how the template is given contents; `context_length` is the model's.

    Without a tokenizer every byte is a token, and a chat is its roles and texts.
    """

    def __init__(
        self, path: str | None, context_length: int, form: ContentFormat | None = None
    ) -> None:
        self._context_length = context_length
        self._form: ContentFormat | None = form
        self._chats: VllmTemplate | None = None
        super().__init__(path)

    def encode_prompt(self, prompt: Prompt, *, special_tokens: bool = False) -> Sequence[int]:
        """Raises VllmChatError if the chat is refused, or longer than the model takes."""
        if not isinstance(prompt, VllmText | VllmChat):
            return super().encode_prompt(prompt, special_tokens=special_tokens)
        try:
            ids = self._prompt_ids(prompt)
        except TypeError as error:  # a text that is not Unicode
            raise VllmChatError(str(error)) from error
        if len(ids) > self._context_length:
            raise VllmChatError(f"the model takes at most {self._context_length} tokens")
        return ids

    def _prompt_ids(self, prompt: VllmText | VllmChat) -> Sequence[int]:
        if isinstance(prompt, VllmText):
            return self._encoded(prompt)
        if self._chats is None:
            return self.encode(chat(_plain(prompt.messages)).text)
        prompt = self._with_rules_of(self._chats, prompt)
        text = VllmText(
            self._chats.render(prompt),
            special_tokens=prompt.special_tokens,
            truncate=prompt.truncate,
            side=prompt.side,
            limits_output=prompt.limits_output,
        )
        return self._encoded(text)

    @staticmethod
    def _with_rules_of(template: VllmTemplate, prompt: VllmChat) -> VllmChat:
        """A chat of `/v1/messages`, changed where the engine looks at the template first."""
        if not prompt.is_anthropic:
            return prompt
        messages = prompt.messages
        if template.merges_system:
            messages = merge_system(messages)
        effort = template.effort_of_disabled if prompt.effort == DISABLED else prompt.effort
        variables = prompt.variables
        if effort is not None:
            variables = {"enable_thinking": effort != "none"} | variables
            variables = variables | {"reasoning_effort": effort}
        return msgspec.structs.replace(prompt, messages=messages, variables=variables)

    def _encoded(self, prompt: VllmText) -> Sequence[int]:
        size = prompt.truncate
        if size is not None and size < 0:
            size = self._context_length - prompt.limits_output
        if not isinstance(prompt.text, str):
            return _cut(prompt.text, size, prompt.side or "left")
        if self._model is None:
            return _cut(self.encode(prompt.text), size, prompt.side or "left")
        if prompt.side is not None or size is None:
            ids = self.encode(prompt.text, special_tokens=prompt.special_tokens)
            return _cut(ids, size, prompt.side or "left")
        return self._truncated(self._model, prompt.text, size, prompt.special_tokens)

    @staticmethod
    def _truncated(
        model: tokenizers.Tokenizer, text: str, size: int, special_tokens: bool
    ) -> Sequence[int]:
        """The last tokens of the text, after those that the tokenizer puts before every text."""
        encoding = model.encode(text, add_special_tokens=False)
        added = model.num_special_tokens_to_add(is_pair=False) if special_tokens else 0
        encoding.truncate(max(0, size - added), direction="left")
        ids: list[int] = model.post_process(encoding, add_special_tokens=special_tokens).ids
        return ids

    def _load_template(self, path: Path, config: dict[str, Any]) -> None:
        self._chats = VllmTemplate(path, config, self._form)


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": str(one.get("role")), "content": one.get("content")} for one in messages]


def _cut(ids: Sequence[int], size: int | None, side: str) -> Sequence[int]:
    if size is None or size >= len(ids):
        return ids
    if size == 0:
        return []
    return ids[-size:] if side == "left" else ids[:size]
