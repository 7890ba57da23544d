"""Model folders are read as in transformers, and faults in them are named."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from extproc.tokenization.errors import TokenizerError
from extproc.tokenization.tokenizer_files import TokenizerFiles, read_tokenizer
from tests.unit.tokenization.small_tokenizers import blank_swallower, model_folder, o200k


def _read(folder: Path, config: dict[str, Any] | None = None) -> TokenizerFiles:
    return read_tokenizer(model_folder(folder, o200k(), config))


def test_a_model_is_named_by_its_folder_or_by_its_tokenizer_file(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, o200k(), {"chat_template": "x", "eos_token": "<|im_end|>"})
    for path in (folder, folder / "tokenizer.json"):
        files = read_tokenizer(path)
        assert files.templates == {"default": "x"}
        assert files.special_tokens == {"eos_token": "<|im_end|>"}


def test_a_tokenizer_without_other_files_has_no_templates(tmp_path: Path) -> None:
    files = _read(tmp_path)
    assert (files.templates, files.special_tokens) == ({}, {})


# -- templates


def test_the_configuration_can_name_several_templates(tmp_path: Path) -> None:
    given = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    files = _read(tmp_path, {"chat_template": given})
    assert files.templates == {"default": "a", "tool_use": "b"}
    assert files.template_files["tool_use"] == tmp_path / "tokenizer_config.json"


def test_template_files_win_over_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "readme").write_text("x")
    (tmp_path / "chat_template.jinja").write_text("file\n")
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools ü")
    files = _read(tmp_path, {"chat_template": "configuration"})
    assert files.templates == {"default": "file\n", "tool_use": "tools ü"}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.chat_template == files.templates


def test_additional_template_files_work_without_a_default(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("r")
    files = _read(tmp_path, {"chat_template": "configuration"})
    assert files.templates == {"rag": "r"}
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template == files.templates


# -- special tokens and added tokens


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": "<|endoftext|>", "eos_token": None, "image_token": "<|im_start|>"},
        {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False}},
        {"pad_token": "<new>", "additional_special_tokens": ["<more>", "<|im_end|>"]},
        {"extra_special_tokens": {"video_token": "<video>"}},
        {
            "added_tokens_decoder": {
                "2001": {"content": "<b>", "special": True, "normalized": False},
                "2000": {"content": "<a> ", "special": False, "normalized": True},
            },
            "unk_token": "<unk>",
        },
        {"add_bos_token": True, "bos_token": "<|endoftext|>", "chat_template": None},
    ],
)
def test_variables_and_tokens_are_those_of_transformers(
    config: dict[str, Any], tmp_path: Path
) -> None:
    files = _read(tmp_path, config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert files.special_tokens == tokenizer.special_tokens_map
    assert files.tokenizer.get_vocab() == tokenizer.get_vocab()
    text = "<new> <more>a<video> <a> b<b><unk> <|endoftext|> x<|im_start|>"
    assert files.tokenizer.encode(text).ids == tokenizer.encode(text)


def test_special_tokens_of_old_models_are_read_from_their_map(tmp_path: Path) -> None:
    given = {
        "bos_token": {"content": "<|endoftext|>", "lstrip": False, "normalized": False},
        "eos_token": "<|im_end|>",
    }
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(given))
    files = _read(tmp_path, {"eos_token": "<|im_start|>"})
    assert files.special_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert files.special_tokens == tokenizer.special_tokens_map
    files = _read(tmp_path, {"eos_token": "<|im_start|>", "added_tokens_decoder": {}})
    assert files.special_tokens == {"eos_token": "<|im_start|>"}


def test_truncation_and_padding_are_turned_off(tmp_path: Path) -> None:
    tokenizer = blank_swallower()
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=8)
    folder = model_folder(tmp_path, tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    text = "a text of more than four tokens"
    ids = read_tokenizer(folder).tokenizer.encode(text).ids
    assert ids == tokenizer.encode(text).ids
    assert ids == PreTrainedTokenizerFast.from_pretrained(folder).encode(text)


def test_split_special_tokens_is_passed_to_the_tokenizer(tmp_path: Path) -> None:
    files = _read(tmp_path, {"split_special_tokens": True})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "a<|im_end|>b"
    assert files.tokenizer.encode(text).ids == tokenizer.encode(text)
    assert len(files.tokenizer.encode(text).ids) > 3


# -- what is wrong, and in which file


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: no such file"),
        ("tokenizer.json", "{", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", '{"model": {"type": "None"}}', "tokenizer.json: not a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not a JSON object"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: not a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 5}', "`chat_template` is neither"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "`chat_template` is nei"),
        ("tokenizer_config.json", '{"chat_template": [5]}', "`chat_template` is neither"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "x", "template": 5}]}',
            "`chat_template` is neither",
        ),
        ("tokenizer_config.json", '{"eos_token": 5}', "`eos_token` is neither a token nor null"),
        ("tokenizer_config.json", '{"eos_token": {}}', "`eos_token` is neither a token nor null"),
        (
            "tokenizer_config.json",
            '{"extra_special_tokens": [5]}',
            "`extra_special_tokens` is neither a token nor null",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": [5]}', "`added_tokens_decoder` does"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": "y"}}',
            "`added_tokens_decoder` does not map ids to tokens",
        ),
        ("special_tokens_map.json", "5", "special_tokens_map.json: not a JSON object"),
    ],
)
def test_the_error_names_a_broken_file(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path, o200k())
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(TokenizerError) as caught:
        read_tokenizer(folder)
    assert str(folder / name) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such file"):
        read_tokenizer(tmp_path / "missing")


def test_a_template_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, o200k())
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: not UTF-8"):
        read_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").mkdir()
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: not a regular file"):
        read_tokenizer(folder)
