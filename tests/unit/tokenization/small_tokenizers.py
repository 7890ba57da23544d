"""Tokenizers of the usual kinds, trained on a few sentences, and model folders with them."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from extproc.tokenization.samples import sample_texts

TEMPLATES: Final = Path(__file__).parents[2] / "fixtures" / "tokenizers"

# The split expression that Llama 3 and GLM share, and Qwen's, which takes digits one by one.
LLAMA_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT: Final = LLAMA_SPLIT.replace("{1,3}", "")
O200K_SPLIT: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LLAMA_TOKENS: Final = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(250)),
)
CHATML_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THOUGHT_TOKENS: Final = ("<tool_call>", "</tool_call>", "<think>", "</think>")
MISTRAL_TOKENS: Final = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
DEEPSEEK_TOKENS: Final = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
)


def special(tokens: Sequence[str], **flags: bool) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False, **flags) for token in tokens]


def byte_level_bpe(
    split: str,
    tokens: Sequence[AddedToken],
    *,
    nfc: bool = False,
    vocabulary: int = 1200,
    texts: Sequence[str] = (),
) -> Tokenizer:
    """The GPT-4 family's kind; `texts` are what it learns from besides."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        texts=texts,
    )
    tokenizer.add_tokens(list(tokens))
    return tokenizer


@cache
def llama() -> Tokenizer:
    """Puts its first token before a text."""
    tokenizer = byte_level_bpe(LLAMA_SPLIT, special(LLAMA_TOKENS))
    first = LLAMA_TOKENS[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{first} $A",
                pair=f"{first} $A {first}:1 $B:1",
                special_tokens=[(first, tokenizer.token_to_id(first))],
            ),
        ]
    )
    return tokenizer


@cache
def qwen() -> Tokenizer:
    tokens = special(CHATML_TOKENS) + [
        AddedToken(token, normalized=False) for token in THOUGHT_TOKENS
    ]
    tokenizer = byte_level_bpe(QWEN_SPLIT, tokens, nfc=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


@cache
def o200k() -> Tokenizer:
    return byte_level_bpe(O200K_SPLIT, special(CHATML_TOKENS))


@cache
def gpt2() -> Tokenizer:
    """Tokens of runs of blanks, looked for in a second pass as usual for them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=1000,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(special(["<|endoftext|>"]))
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (8, 4, 3, 2)])
    return tokenizer


@cache
def deepseek() -> Tokenizer:
    """All its tokens belong to the second pass, and there is nothing to normalise."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.Split(Regex(r"[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
            pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=1000,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=True) for token in DEEPSEEK_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in THOUGHT_TOKENS])
    return tokenizer


def sentencepiece_like(scheme: str) -> Tokenizer:
    """Unigram behind Metaspace, a first token before a text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    _train(
        tokenizer,
        trainers.UnigramTrainer(vocab_size=600, unk_token="<unk>", show_progress=False),
        ["<unk>"],
    )
    tokenizer.add_tokens(special(MISTRAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


@cache
def mistral() -> Tokenizer:
    return sentencepiece_like("first")


@cache
def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _train(
        tokenizer,
        trainers.WordPieceTrainer(vocab_size=800, show_progress=False),
        ["[UNK]", "[CLS]", "[SEP]", "[PAD]"],
    )
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    return tokenizer


@cache
def blank_swallower() -> Tokenizer:
    """A token takes the blanks before it along."""
    tokens = [*special(CHATML_TOKENS), AddedToken("<mask>", lstrip=True, special=True)]
    return byte_level_bpe(LLAMA_SPLIT, tokens)


def _train(
    tokenizer: Tokenizer,
    trainer: Any,
    tokens: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> None:
    trainer.special_tokens = special(tokens)
    texts = [*texts, *sample_texts([])]
    texts += [path.read_text() for path in sorted(TEMPLATES.glob("*.jinja"))]
    tokenizer.train_from_iterator(texts, trainer)


# -- folders as they come with models


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def model_folder(folder: Path, tokenizer: Tokenizer, config: dict[str, Any] | None = None) -> Path:
    """Write `tokenizer.json`, and `tokenizer_config.json` if there is a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# family -> tokenizer, configuration; the template has the family's name.
FAMILIES: Final[dict[str, tuple[Any, dict[str, Any]]]] = {
    "llama": (
        llama,
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": {"__type": "AddedToken", "content": "<|eot_id|>", "special": True},
        },
    ),
    "parts": (llama, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "qwen": (qwen, {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "chatml": (o200k, {"eos_token": "<|im_end|>"}),
    "hermes": (o200k, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}),
    "mistral": (mistral, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "deepseek": (
        deepseek,
        {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
    ),
}


def family_folder(family: str, folder: Path) -> Path:
    """A model folder of one of FAMILIES."""
    make, config = FAMILIES[family]
    return model_folder(folder, make(), {**config, "chat_template": template(family)})
