"""The tokenizer as it is, with ids as the bytes of an uint32 array."""

from array import array
from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer

from extproc.tokenization.errors import EncodeFailedError

__all__ = ["PlainEncoder", "packed"]

_UINT32: Final = "I"


class PlainEncoder:
    """Safe to use from several threads. All raise EncodeFailedError for what can not be encoded.

    `encode_batch_fast` computes no offsets, and unlike `encode` it lets other threads run
    meanwhile (tokenizers 0.23). It runs in the calling thread: how many texts are encoded side
    by side is decided by whoever calls, so the library's own pool stays off.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def many(self, texts: Sequence[str], *, with_special: bool = False) -> list[bytes]:
        """`with_special`: with what the post-processor adds."""
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=with_special)
        except BaseException as error:
            raise _refused(error) from None
        return [packed(encoding.ids) for encoding in encodings]

    def few(self, words: Sequence[str]) -> list[bytes]:
        """Some microseconds of work, in which other threads need not run.

        Letting them run costs more than that while many requests are served.
        """
        encode = self._tokenizer.encode
        try:
            return [packed(encode(word, add_special_tokens=False).ids) for word in words]
        except BaseException as error:
            raise _refused(error) from None


def packed(ids: Sequence[int]) -> bytes:
    return array(_UINT32, ids).tobytes()


def _refused(error: BaseException) -> BaseException:
    """What to raise for what the library has raised; its panics are no Exceptions."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return EncodeFailedError("the tokenizer refused a text")
    return error
