"""Makes conversations for benchmarks, and a model folder with realistic tokens for them.

Text and vocabulary come from the documentation that ships with Python, so that a token is a
few characters as in real models, and nothing has to be downloaded. The split pattern is that
of the Llama 3 family; the template writes ChatML.
"""

import json
import re
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import Any, Final

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

__all__ = ["Conversations", "write_model_folder"]

_VOCABULARY: Final = 16_000
_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MARKS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE: Final = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def write_model_folder(folder: Path) -> None:
    """Train a tokenizer, which takes some seconds, and write it with its template."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[*_MARKS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _MARKS[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


class Conversations:
    """Text that reads like turns of a chat; the same for the same seed."""

    def __init__(self, seed: int = 0) -> None:
        self._random = Random(seed)
        text = " ".join(re.sub(r"\s+", " ", topic) for topic in topics.values())
        self._sentences = [part for part in re.split(r"(?<=[.!?]) ", text) if 20 < len(part) < 400]

    def text(self, size_bytes: int) -> str:
        """Sentences of that many ASCII characters."""
        parts: list[str] = []
        length = 0
        while length < size_bytes:
            # A number makes every turn different from all others.
            sentence = f"{self._random.choice(self._sentences)} ({self._random.randrange(10**6)}) "
            parts.append(sentence)
            length += len(sentence)
        return "".join(parts).encode("ascii", "replace").decode()[:size_bytes]

    def messages(self, turns: int, size_bytes: int) -> list[dict[str, Any]]:
        """A system prompt, earlier turns and a last question, with this much text in all."""
        each = size_bytes // (2 * turns + 1)
        messages = [{"role": "system", "content": self.text(each)}]
        for _ in range(turns):
            messages.append({"role": "user", "content": self.text(each)})
            messages.append({"role": "assistant", "content": self.text(each)})
        return messages
