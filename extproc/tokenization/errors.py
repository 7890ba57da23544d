"""The exceptions of tokenization. Their texts never quote a prompt."""

from extproc.errors import ServiceError

__all__ = [
    "EncodeFailedError",
    "EncoderBusyError",
    "TextTooLongError",
    "TokenizerError",
    "UnknownTokenError",
    "UnmappableError",
]


class TokenizerError(ServiceError):
    """A tokenizer cannot be loaded; the text names the file and the fault."""


class TextTooLongError(ServiceError, ValueError):
    """A text is longer than the settings allow."""


class UnknownTokenError(ServiceError, ValueError):
    """A token id is not in the vocabulary."""


class EncodeFailedError(ServiceError):
    """The tokenizer refused a text. Its own error is not shown, since it can quote the text."""


class EncoderBusyError(ServiceError):
    """Too many long texts are waiting to be encoded; a later try can succeed."""


class UnmappableError(ServiceError):
    """The tokens of a request cannot be known; `reason` is one of `reasons`.

    `member` is the member of the body that is not understood, empty if it is not known.
    """

    def __init__(self, reason: str, member: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.member = member
