"""The token ids of a model: which exist, their text, and the ids with a special meaning."""

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer

__all__ = ["Vocabulary"]

# Models with these tokens answer /v1/responses in a format of their own, without a template.
_HARMONY_TOKENS: Final = ("<|channel|>", "<|constrain|>", "<|call|>")


class Vocabulary:
    """The ids of one tokenizer.

    `first_token` is the id of the token that begins a text (bos), None if the model has no such
    token. `harmony`: the model uses OpenAI's harmony format.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens: dict[str, str]) -> None:
        self._tokenizer = tokenizer
        ids = set(tokenizer.get_vocab(with_added_tokens=True).values())
        self._end = max(ids, default=-1) + 1
        # Few vocabularies have gaps, and a set of all ids is large.
        self._gaps = frozenset(range(self._end)) - ids
        begins = special_tokens.get("bos_token")
        self.first_token = None if begins is None else tokenizer.token_to_id(begins)
        self.harmony = all(tokenizer.token_to_id(token) is not None for token in _HARMONY_TOKENS)

    def __contains__(self, one: int) -> bool:
        return 0 <= one < self._end and one not in self._gaps

    def text(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text that ids of this vocabulary stand for."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
