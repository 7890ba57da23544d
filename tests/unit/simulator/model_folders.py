"""Small model folders: a byte-level tokenizer, special tokens, a template."""

from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

BOS = "<s>"
MARKS = (BOS, "</s>", "<|im_start|>", "<|im_end|>")

CHATML = """
{%- if tools %}
    <|im_start|>tools
    {%- for tool in tools %}
{{ tool | tojson }}
    {%- endfor %}<|im_end|>
{% endif %}
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

PARTS = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'nobody' %}{{ raise_exception('nobody can speak') }}{% endif %}
    {{- '<|im_start|>' ~ message['role'] }}
    {%- if message['content'] is string %}{{ message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part.type == 'text' %}{{ part.text | trim }}
            {%- else %}[{{ part.type }}]{% endif %}
        {%- endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- for name, value in call.function.arguments | items %}
            {{- name }}={{ value | tojson }};
        {%- endfor %}
        {%- if loop.index == 2 %}{% break %}{% endif %}
    {%- endfor %}
{%- endfor %}
{%- generation %}{{ eos_token }}{% endgeneration %}
{%- if thinking is defined %}<think:{{ thinking }}:{{ effort or reasoning_effort }}>{% endif %}
"""


def model_folder(
    folder: Path,
    template: str | None = CHATML,
    *,
    adds_bos: bool = False,
    in_config: bool = False,
    **config: Any,
) -> str:
    """Write a folder whose tokens are bytes and a few marks; gives its path."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*MARKS])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
    }
    if in_config:
        config["chat_template"] = template
    elif template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_bytes(msgspec.json.encode(fields | config))
    return str(folder)
