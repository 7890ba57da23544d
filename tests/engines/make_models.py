"""Writes the small models of the vectors: tokenizers, chat templates and configurations.

They are kept in the repository, since another version of the library may train another tokenizer,
and the vectors belong to these. Weights are not needed: engines make random ones.
"""

import json
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

MODELS: Final = Path(__file__).parent / "models"
MAX_MODEL_TOKENS: Final = 8192

_TEXTS: Final = (
    "You are a helpful assistant that answers the questions of people. What is the weather in "
    "Paris today? The weather of a city is sunny, and it will be 21 degrees at 10:30. Please write "
    "a function that reads a file and returns its lines. I think, therefore the answer is 42.",
    '{"type": "function", "function": {"name": "get_weather", "description": "the weather of a '
    'city", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, '
    '"required": ["city"]}}}',
    "system user assistant tool developer\n\nEnvironment rules, instructions and results\n",
    "def main():\n    for line in lines:\n        print(line)\n",
)
_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _special(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in texts]


def _byte_level(tokenizer: Tokenizer, vocabulary: int) -> Tokenizer:
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def _split(digits: str = "{1,3}") -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT.replace("{1,3}", digits)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def plain() -> Tokenizer:
    """No normalizer, no first token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _byte_level(tokenizer, 448)
    tokenizer.add_tokens(_special("<|begin|>", "<|end|>"))
    return tokenizer


def tools() -> Tokenizer:
    """Normalizes, takes digits one by one, and has tokens that are not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _split(digits="")
    _byte_level(tokenizer, 512)
    tokenizer.add_tokens(_special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    words = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    thoughts = ("<think>", "</think>")
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in (*words, *thoughts)])
    return tokenizer


def bos() -> Tokenizer:
    """Puts its first token before every text, as the template does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = _split()
    _byte_level(tokenizer, 480)
    first = "<|begin_of_text|>"
    tokenizer.add_tokens(
        _special(first, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A",
        pair=f"{first} $A {first}:1 $B:1",
        special_tokens=[(first, tokenizer.token_to_id(first))],
    )
    return tokenizer


def parts() -> Tokenizer:
    """Like `plain`, with other tokens; its template reads contents as lists of parts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _split()
    _byte_level(tokenizer, 464)
    tokenizer.add_tokens(_special("<s>", "</s>", "<turn>", "</turn>", "<image>"))
    return tokenizer


def seeing() -> Tokenizer:
    """Like `tools`, with tokens for images, which its template puts where they are."""
    tokenizer = tools()
    tokenizer.add_tokens(_special("<|vision_start|>", "<|vision_end|>", *_IMAGE_TOKENS))
    return tokenizer


def seeing_text() -> Tokenizer:
    """Like `seeing`, with a first token and a template that reads contents as texts."""
    tokenizer = seeing()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A",
        special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))],
    )
    return tokenizer


_IMAGE_TOKENS: Final = ("<|image_pad|>", "<|video_pad|>")
_CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "plain": {"eos_token": "<|end|>"},
    "tools": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "bos": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "parts": {"bos_token": "<s>", "eos_token": "</s>"},
    "seeing": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "seeing_text": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
}
_SHAPE: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_MODEL_TOKENS,
    "vocab_size": 576,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
_ARCHITECTURES: Final = {
    "plain": ("qwen3", "Qwen3ForCausalLM"),
    "tools": ("qwen3", "Qwen3ForCausalLM"),
    "bos": ("llama", "LlamaForCausalLM"),
    "parts": ("qwen3", "Qwen3ForCausalLM"),
    "seeing": ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    "seeing_text": ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
}
# What a model that reads images has besides.
_VISION: Final[dict[str, Any]] = {
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "vision_config": {
        "model_type": "qwen2_vl",
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": 64,
        "num_heads": 4,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
_VISION_TOKENS: Final = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|image_pad|>",
}
_PROCESSOR: Final[dict[str, Any]] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": 784,
    "max_pixels": 100352,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def main() -> None:
    for make in (plain, tools, bos, parts, seeing, seeing_text):
        name = make.__name__
        folder = MODELS / name
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = make()
        (folder / "tokenizer.json").write_text(tokenizer.to_str() + "\n", encoding="utf-8")
        known = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_MODEL_TOKENS,
            **_CONFIGS[name],
        }
        _write(folder / "tokenizer_config.json", known)
        kind, architecture = _ARCHITECTURES[name]
        shape = {"architectures": [architecture], "model_type": kind, **_SHAPE}
        ends = tokenizer.token_to_id(_CONFIGS[name]["eos_token"])
        if kind == "qwen2_vl":
            shape |= _VISION
            for member, token in _VISION_TOKENS.items():
                shape[member] = tokenizer.token_to_id(token)
            _write(folder / "preprocessor_config.json", _PROCESSOR)
        _write(folder / "config.json", {**shape, "eos_token_id": ends})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
