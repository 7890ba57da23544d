"""Reads a model's tokenizer and chat templates from disk, as transformers reads them.

`tokenizer.json` is the tokenizer itself. The special tokens are in `tokenizer_config.json` or,
for old models, in `special_tokens_map.json`. Chat templates are files (`chat_template.jinja`,
`additional_chat_templates/*.jinja`) or, if there are no such files, entries of the configuration.
Tokens that only the configuration names are added to the tokenizer. Truncation and padding are
turned off, since the engine uses neither.
"""

import os
import stat
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct
from tokenizers import AddedToken, Tokenizer

from extproc.tokenization.errors import TokenizerError

__all__ = ["TokenizerFiles", "read_tokenizer"]

_TOKENIZER: Final = "tokenizer.json"
_CONFIG: Final = "tokenizer_config.json"
_MODEL_CONFIG: Final = "config.json"
_SPECIAL_TOKENS: Final = "special_tokens_map.json"
_TEMPLATE: Final = "chat_template.jinja"
_MORE_TEMPLATES: Final = "additional_chat_templates"

# The largest vocabularies take 40 MB.
_FILE_MAX_BYTES: Final = 256 * 1024 * 1024

_NAMED_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_EXTRA_TOKENS: Final = ("extra_special_tokens", "additional_special_tokens")
_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")


class TokenizerFiles(Struct, frozen=True):
    """A tokenizer with its special tokens and chat templates.

    `special_tokens` are variables of a template, by name (`bos_token`, …). `templates` are the
    sources by name; `template_files` has the file of each, for error texts. `model_type` is that of
    the model's `config.json`, empty without such a file. `cleans_up_blanks`: the tokenizer leaves
    out blanks before some marks when it turns tokens into text.
    """

    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    templates: dict[str, str]
    template_files: dict[str, Path]
    model_type: str = ""
    cleans_up_blanks: bool = False


def read_tokenizer(path: Path) -> TokenizerFiles:
    """Read a model's folder, or a tokenizer.json and the files beside it.

    Raises TokenizerError.
    """
    try:
        folder, file = (path, path / _TOKENIZER) if path.is_dir() else (path.parent, path)
        found = file.is_file()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    if not found:
        raise TokenizerError(f"{file}: no such file; a folder with {_TOKENIZER} is needed")
    try:
        if file.stat().st_size > _FILE_MAX_BYTES:
            raise ValueError(f"larger than {_FILE_MAX_BYTES} bytes")
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        # The library raises bare exceptions.
        raise TokenizerError(f"{file}: not a tokenizer: {error}") from error
    config_file = folder / _CONFIG
    config = _json_object(config_file)
    special_file = config_file
    if "added_tokens_decoder" not in config:
        more = _json_object(folder / _SPECIAL_TOKENS)
        if more:
            config, special_file = {**config, **more}, folder / _SPECIAL_TOKENS
    named, extra = _special_tokens(config, special_file)
    _complete(tokenizer, config, config_file, [*named.values(), *extra])
    templates, template_files = _templates(folder, config, config_file)
    special_tokens = {name: token.content for name, token in named.items()}
    return TokenizerFiles(
        tokenizer,
        special_tokens,
        templates,
        template_files,
        model_type=_model_type(folder / _MODEL_CONFIG),
        cleans_up_blanks=config.get("clean_up_tokenization_spaces") is True,
    )


def _model_type(file: Path) -> str:
    """The model's type; empty if the file is missing or is not a model's configuration."""
    try:
        found = _json_object(file).get("model_type")
    except TokenizerError:
        # Tokens do not need this file.
        return ""
    return found if type(found) is str else ""


def _json_object(file: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no such file."""
    try:
        content = _content(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise TokenizerError(f"{file}: not a JSON object: {error}") from error


# -- special tokens


def _special_tokens(
    config: dict[str, Any], file: Path
) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The special tokens with a name, which templates can use, and those without."""
    named = {}
    for name in (*_NAMED_TOKENS, *config):
        value = config.get(name)
        # Some models name further tokens, as strings.
        if name in _NAMED_TOKENS or (name.endswith("_token") and type(value) is str):
            token = _token(value, file, name)
            if token is not None:
                named[name] = token
    extra = []
    for key in _EXTRA_TOKENS:
        value = config.get(key)
        if type(value) is dict:
            for name, content in value.items():
                token = _token(content, file, f"{key}.{name}")
                if token is not None:
                    named[name] = token
        elif type(value) is list:
            extra += [token for one in value if (token := _token(one, file, key)) is not None]
    return named, extra


def _token(value: Any, file: Path, key: str) -> AddedToken | None:
    """A token from a string, or from an object with its flags."""
    if value is None:
        return None
    if type(value) is str:
        return AddedToken(value, special=True, normalized=False)
    content = value.get("content") if type(value) is dict else None
    if type(content) is not str:
        raise TokenizerError(f"{file}: `{key}` is neither a token nor null")
    flags = {flag: value[flag] for flag in _FLAGS if type(value.get(flag)) is bool}
    return AddedToken(content, **{"special": True, "normalized": False, **flags})


def _complete(
    tokenizer: Tokenizer, config: dict[str, Any], file: Path, special: list[AddedToken]
) -> None:
    """Add the tokens that only the configuration knows, in the order of their ids."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    if type(listed) is not dict or not all(index.isdecimal() for index in listed):
        raise TokenizerError(f"{file}: `added_tokens_decoder` does not map ids to tokens")
    tokens = [
        _token(listed[index], file, f"added_tokens_decoder.{index}")
        for index in sorted(listed, key=int)
    ]
    for token in (*tokens, *special):
        if token is not None and token.content and token.content not in known:
            tokenizer.add_tokens([token])
            known.add(token.content)
    tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
    tokenizer.no_truncation()
    tokenizer.no_padding()


# -- chat templates


def _templates(
    folder: Path, config: dict[str, Any], config_file: Path
) -> tuple[dict[str, str], dict[str, Path]]:
    files = {}
    # A pipe, a folder or a link to nothing is reported: without its template a model has no tokens.
    if os.path.lexists(folder / _TEMPLATE):
        files["default"] = folder / _TEMPLATE
    for file in sorted((folder / _MORE_TEMPLATES).glob("*.jinja")):
        files[file.stem] = file
    if files:
        return {name: _text(file) for name, file in files.items()}, files
    given = config.get("chat_template")
    if given is None:
        templates: dict[str, str] = {}
    elif type(given) is str:
        templates = {"default": given}
    else:
        try:
            templates = {one["name"]: one["template"] for one in given}
            well_formed = all(
                type(name) is str and type(text) is str for name, text in templates.items()
            )
        except (TypeError, KeyError):
            well_formed = False
        if not well_formed:
            raise TokenizerError(
                f"{config_file}: `chat_template` is neither a template nor a list of objects "
                "with `name` and `template`"
            )
    return templates, dict.fromkeys(templates, config_file)


def _content(file: Path) -> bytes:
    """Raises TokenizerError, and OSError only if there is no such file."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            # A pipe would be waited for without end.
            raise TokenizerError(f"{file}: not a regular file")
        if status.st_size > _FILE_MAX_BYTES:
            raise TokenizerError(f"{file}: larger than {_FILE_MAX_BYTES} bytes")
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read: {error.strerror}") from error


def _text(file: Path) -> str:
    try:
        return _content(file).decode()
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeError as error:
        raise TokenizerError(f"{file}: not UTF-8") from error
