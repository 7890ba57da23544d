"""What the tokenization room raises; no text quotes a prompt."""

__all__ = [
    "EncodeFailedError",
    "EncoderBusyError",
    "TextTooLongError",
    "TokenizerError",
    "UnknownTokenError",
    "UnmappableError",
]


class TokenizerError(Exception):
    """A tokenizer that can not be loaded; the text names the file and what is wrong with it."""


class TextTooLongError(ValueError):
    """More text than the settings allow."""


class UnknownTokenError(ValueError):
    """A token id that the vocabulary does not have."""


class EncodeFailedError(Exception):
    """The tokenizer refused a text; its own words would quote it."""


class EncoderBusyError(Exception):
    """Too many long texts are waiting; to be tried again."""


class UnmappableError(Exception):
    """A request that does not map to tokens; `why` is one of the reasons."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why
