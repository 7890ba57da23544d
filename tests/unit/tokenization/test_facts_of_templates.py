"""What vLLM tries out with a chat template when it starts."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from extproc.engines.vllm.chats import VllmChat
from extproc.tokenization.chat_template import ChatTemplates
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.prompts import ContentFormat, TemplateFacts, TemplateInput
from extproc.tokenization.tokenizer_files import TokenizerFiles

PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
GUARDED = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('late') }}{% endif %}{{ m.content }}{% endfor %}"
)


def templates(
    source: str, content_format: ContentFormat | None = None, *, hides: bool = False
) -> ChatTemplates:
    files = TokenizerFiles(
        Tokenizer(WordLevel({"x": 0}, "x")), {}, {"default": source}, {"default": Path("t.jinja")}
    )
    return ChatTemplates(files, content_format=content_format, hides_unchosen_tools=hides)


class SeeingChat:
    """A chat that remembers the facts about the template that it is given."""

    length = 1
    has_tools = has_media = harmony_is_special = with_special = False
    seen: TemplateFacts

    def for_template(
        self, template: TemplateFacts, default_kwargs: dict[str, Any]
    ) -> TemplateInput:
        self.seen = template
        return TemplateInput(messages=[{"role": "user", "content": "x"}])


def facts(source: str) -> TemplateFacts:
    chat = SeeingChat()
    with suppress(UnmappableError):
        templates(source).render(chat, 10_000)
    return chat.seen


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (PLAIN, False),
        (GUARDED, True),
        # In the engine's trial there is no clock.
        ("{{ strftime_now('%Y') }}" + PLAIN, True),
        ("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + PLAIN, False),
        (PLAIN + "{% generation %}{% endgeneration %}", True),
        ("{{ bos_token }}" + PLAIN, False),
    ],
)
def test_a_template_that_refuses_late_system_messages_is_noticed(source: str, wanted: bool) -> None:
    assert facts(source).wants_system_first is wanted


@pytest.mark.parametrize(
    ("source", "effort"),
    [
        (PLAIN, "low"),
        (PLAIN + "{% if enable_thinking %}<think>{% endif %}", "none"),
        (PLAIN + "{{ reasoning_effort }}", "none"),
        # Unknown efforts are as the highest.
        (PLAIN + "{{ {'low': 1, 'medium': 2}.get(reasoning_effort, 9) }}", "low"),
        (PLAIN + "{% if reasoning_effort == 'none' %}{{ raise_exception('') }}{% endif %}", "low"),
    ],
)
def test_the_effort_without_thinking_is_one_that_the_template_follows(
    source: str, effort: str
) -> None:
    assert facts(source).effort_without_thinking == effort


def test_a_configured_content_format_counts_more_than_the_detected_one() -> None:
    chat = VllmChat(messages=[{"role": "user", "content": "x"}])
    as_string = templates("{% for m in messages %}{{ m.content is string }}{% endfor %}")
    assert as_string.render(chat, 100).text == "True"
    as_parts = templates("{% for m in messages %}{{ m.content is string }}{% endfor %}", "openai")
    assert as_parts.render(chat, 100).text == "False"


def test_tools_are_hidden_only_if_the_engine_was_started_so() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    chat = VllmChat(messages=[{"role": "user", "content": "x"}], tools=tools, no_tool_wanted=True)
    source = "{{ 'tools' if tools else 'no tools' }}"
    assert templates(source).render(chat, 100).text == "tools"
    assert templates(source, hides=True).render(chat, 100).text == "no tools"
