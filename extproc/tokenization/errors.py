"""What the tokenization room raises; no text quotes a prompt."""

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
    """A tokenizer that can not be loaded; the text names the file and what is wrong with it."""


class TextTooLongError(ServiceError, ValueError):
    """More text than the settings allow."""


class UnknownTokenError(ServiceError, ValueError):
    """A token id that the vocabulary does not have."""


class EncodeFailedError(ServiceError):
    """The tokenizer refused a text; its own words would quote it."""


class EncoderBusyError(ServiceError):
    """Too many long texts are waiting; to be tried again."""


class UnmappableError(ServiceError):
    """A request that does not map to tokens; `reason` is one of the reasons."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
