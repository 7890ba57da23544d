"""Loads the tokenizers of the configured models.

Separate from the wiring because it reads files for seconds: at the start, in `extproc check`, and
in a thread when a reload brings a new one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from msgspec import Struct

from extproc.clock import SystemClock
from extproc.config.models import ModelConfig
from extproc.config.schema import Config, TokenizationConfig
from extproc.errors import ConfigError
from extproc.routing.token_proof.asking import OurTokens
from extproc.tokenization.encoder import Encoded, EncoderSettings, PromptEncoder
from extproc.tokenization.errors import TokenizerError
from extproc.tokenization.prompts import NO_TEMPLATE_KWARGS, ContentFormat
from extproc.workers.worker import Worker

__all__ = ["LoadedEncoders", "load_encoders", "proven_models"]

_Key = tuple[str | None, str | None, str, str, bool, TokenizationConfig]


class LoadedEncoders(Struct, frozen=True):
    """Encoders by model id, made for `config`."""

    config: Config
    by_model: Mapping[str, PromptEncoder]


def load_encoders(config: Config, before: LoadedEncoders | None = None) -> dict[str, PromptEncoder]:
    """Load the configured tokenizers, by model id; raises ConfigError.

    Models with equal settings share a tokenizer and its cache, also with a model of `before`.
    Large vocabularies take seconds.
    """
    known = {} if before is None else _by_key(before)
    loaded: dict[_Key, PromptEncoder] = {}
    encoders: dict[str, PromptEncoder] = {}
    problems = []
    for index, model in enumerate(config.models):
        if model.tokenizer_path is None:
            continue
        if taken := sorted(NO_TEMPLATE_KWARGS.intersection(model.chat_template_kwargs)):
            problems.append(
                f"models[{index}].chat_template_kwargs: not for the template: {', '.join(taken)}"
            )
            continue
        key = _key(model, config)
        encoder = known.get(key) or loaded.get(key)
        if encoder is None:
            try:
                encoder = loaded[key] = _load(model, model.tokenizer_path, config.tokenization)
            except TokenizerError as error:
                problems.append(f"models[{index}].tokenizer_path: {error}")
                continue
        encoders[model.id] = encoder
    if problems:
        for encoder in loaded.values():
            encoder.close()
        raise ConfigError(problems)
    return encoders


def proven_models(config: Config, encoders: Mapping[str, PromptEncoder]) -> dict[str, OurTokens]:
    """How the tokens are made of the models whose workers are to be proven, by id."""
    return {
        model.id: _our_tokens(encoders[model.id])
        for model in config.models
        if model.proves_tokens and model.id in encoders
    }


def _our_tokens(encoder: PromptEncoder) -> OurTokens:
    async def encode(worker: Worker, path: str, body: bytes) -> Encoded:
        return await encoder.encode(await encoder.read(worker.engine.rules, path, body, None))

    return OurTokens(encode=encode, text_of=encoder.shown, source=encoder)


def content_format_of(
    given: Literal["auto", "string", "openai"],
) -> ContentFormat | None:
    """The format to use; None if it is found out from the template."""
    return None if given == "auto" else given


def _load(model: ModelConfig, path: str, settings: TokenizationConfig) -> PromptEncoder:
    return PromptEncoder.load(
        Path(path),
        EncoderSettings(
            template_name=model.chat_template_name,
            template_kwargs=model.chat_template_kwargs,
            content_format=content_format_of(model.chat_template_content_format),
            hides_unchosen_tools=model.exclude_tools_when_tool_choice_none,
            cache_bytes=settings.cache_bytes,
            inline_chars=settings.inline_chars,
            threads=settings.threads,
        ),
        SystemClock(),
    )


def _key(model: ModelConfig, config: Config) -> _Key:
    return (
        model.tokenizer_path,
        model.chat_template_name,
        repr(model.chat_template_kwargs),
        model.chat_template_content_format,
        model.exclude_tools_when_tool_choice_none,
        config.tokenization,
    )


def _by_key(before: LoadedEncoders) -> dict[_Key, PromptEncoder]:
    config, by_model = before.config, before.by_model
    return {
        _key(model, config): by_model[model.id] for model in config.models if model.id in by_model
    }
