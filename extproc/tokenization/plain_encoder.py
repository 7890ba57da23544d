"""Encodes texts with the tokenizer alone, without any cache.

Ids are returned as the bytes of a uint32 array, the form in which they are cached.
"""

from array import array
from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer

from extproc.tokenization.errors import EncodeFailedError

__all__ = ["PlainEncoder", "packed"]

_UINT32: Final = "I"


class PlainEncoder:
    """Safe to use from several threads. Its methods raise EncodeFailedError.

    `encode_batch_fast` computes no offsets, and unlike `encode` it lets other threads run
    meanwhile (tokenizers 0.23). It runs in the calling thread: the caller decides how many texts
    are encoded at the same time, so the library's own pool stays off.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def many(self, texts: Sequence[str], *, with_special: bool = False) -> list[bytes]:
        """The ids of each text; `with_special` adds the special tokens of the post-processor."""
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=with_special)
        except BaseException as error:
            raise _refused(error) from None
        return [packed(encoding.ids) for encoding in encodings]

    def few(self, words: Sequence[str]) -> list[bytes]:
        """The ids of a few short words, without letting other threads run.

        This takes microseconds. Letting other threads run costs more than that under load.
        """
        encode = self._tokenizer.encode
        try:
            return [packed(encode(word, add_special_tokens=False).ids) for word in words]
        except BaseException as error:
            raise _refused(error) from None


def packed(ids: Sequence[int]) -> bytes:
    return array(_UINT32, ids).tobytes()


def _refused(error: BaseException) -> BaseException:
    """The error to raise for one of the library; its panics are not of the class Exception."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return EncodeFailedError("the tokenizer refused a text")
    return error
