"""Writes a small tokenizer folder of a model, without any download.

The service and the simulated workers read the same folder, as a router and an engine read the
files of the model they serve. Common words of the demo are one token each.
"""

from pathlib import Path
from typing import Final

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from extproc.demo.workload import WORDS

__all__ = ["write_model_folder"]

_BEGIN, _END = "<|begin|>", "<|end|>"
_VOCABULARY_SIZE: Final = 1200
_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '" + _BEGIN + "' + message.role + '\n' + message.content + '" + _END + "\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + _BEGIN + "assistant\n' }}{% endif %}"
)


def write_model_folder(folder: Path) -> Path:
    """Make the folder with tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE,
        show_progress=False,
        special_tokens=[_BEGIN, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    said = " ".join(WORDS)
    tokenizer.train_from_iterator([said, " " + said], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END,
        "model_max_length": 131_072,
    }
    (folder / "tokenizer_config.json").write_bytes(msgspec.json.encode(config))
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    return folder
