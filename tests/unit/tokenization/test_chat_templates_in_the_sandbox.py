"""Chat templates run as in transformers, and errors in them become reasons."""

import json
import re
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers.utils.chat_template_utils import render_jinja_template

from extproc.engines.sglang.chats import SglangChat
from extproc.tokenization.chat_template import ChatTemplates
from extproc.tokenization.errors import TokenizerError, UnmappableError
from extproc.tokenization.tokenizer_files import TokenizerFiles

MAX_CHARS = 100_000
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f"}}]


def _templates(
    special_tokens: dict[str, str] | None = None, name: str | None = None, **sources: str
) -> ChatTemplates:
    files = TokenizerFiles(
        Tokenizer(models.WordLevel({}, unk_token="")),
        special_tokens or {},
        sources,
        dict.fromkeys(sources, Path("/m/x.jinja")),
    )
    return ChatTemplates(files, template_name=name)


def _chat(*contents: Any, **fields: Any) -> SglangChat:
    messages = [{"role": "user", "content": content} for content in contents or ("hi",)]
    return SglangChat(messages=messages, **fields)


def _text(source: str, chat: SglangChat | None = None, **special_tokens: str) -> str:
    templates = _templates(special_tokens, default=source)
    return templates.render(chat or _chat(), MAX_CHARS).text


def _reason_of(source: str, chat: SglangChat | None = None, max_chars: int = MAX_CHARS) -> str:
    with pytest.raises(UnmappableError) as caught:
        _templates(default=source).render(chat or _chat(), max_chars)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value.reason


SOURCES = [
    "  {% if true %}  \n  x\n  {% endif %}  \n y\n",
    "{%- for m in messages -%}\n{{ loop.index0 }}{{ loop.last }}{{ loop.nextitem is defined }}"
    "{% endfor %}",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.s = ns.s ~ m.content|upper %}{% endfor %}{{ ns.n }}{{ ns.s }}{{ ns.missing }}",
    "{% generation %}{% set x = 5 %}{{ messages[0].content }}{% endgeneration %}{{ x }}",
    "{% for m in messages %}{% generation %}{{ m.role }}{{ loop.index }}{% endgeneration %}"
    "{% endfor %}",
    "{{ {'ü': '<&>\"', 'n': none, 'b': [1.50, true]} | tojson }}",
    "{{ {'b': 1, 'a': [1, {'c': 2}]} | tojson(indent=2) }}",
    "{{ {'b': 1, 'a': 'ü'} | tojson(ensure_ascii=true, sort_keys=true) }}",
    "{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':')) }}",
    "{{ messages[0].missing }}|{{ messages[0]['missing'] }}|{{ nothing }}|{{ messages[0].items }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "{{ messages[0].get('content') }}{{ messages[0].get('x', 'y') }}{{ messages[0].keys()|list }}",
    "{{ messages[0].content.upper().split('I')[0].strip() }}{{ 'a-b'.replace('-', '+') }}",
    "{{ '{}-{a}'.format(1, a=2) }}{{ 'x'.join(['a', 'b']) }}{{ 'abc'[::-1] }}",
    "{{ messages[0].content.startswith('h') and messages[0].content is string }}",
    "{% macro m(x) %}<{{ x }}>{{ caller() if caller }}{% endmacro %}{{ m(1) }}"
    "{% call m(2) %}c{% endcall %}",
    "{{ bos_token }}{{ eos_token is defined }}{{ tools is none }}{{ documents is none }}"
    "{{ add_generation_prompt }}",
    "{{ dict(a=1) }}{{ range(3)|list }}{{ messages|length }}{{ messages[-1:]|map(attribute='role')"
    "|join }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
    "{{ 7 // 2 }}{{ 1 / 3 }}{{ 'a' ~ 1 ~ none }}{{ [1] + [2] }}{{ 'x' * 3 }}",
    "{# a comment #}{% raw %}{{ x }}{% endraw %}",
    "{{ messages[0].content | trim | e }}{{ '<' | safe }}{{ 'a b' | urlencode }}",
]


@pytest.mark.parametrize("source", SOURCES)
def test_a_template_gives_the_same_text_as_with_transformers(source: str) -> None:
    chat = _chat("hi", " <you> ", "thére", "x")
    # Its annotation is wrong.
    rendered: Any = render_jinja_template(
        [chat.messages],
        chat_template=source,
        add_generation_prompt=True,
        bos_token="<s>",
    )
    expected = rendered[0][0]
    # Addresses of objects are printed by no real template, and differ.
    address = re.compile(r"0x[0-9a-f]+")
    assert address.sub("", _text(source, chat, bos_token="<s>")) == address.sub("", expected)


def test_strftime_now_gives_the_current_date() -> None:
    form = "%d %b %Y"
    before = datetime.now().strftime(form)
    found = _text("{{ strftime_now('%d %b %Y') }}")
    assert found in (before, datetime.now().strftime(form))


def test_special_tokens_can_be_overridden_by_the_client() -> None:
    chat = _chat(template_kwargs={"bos_token": "!", "x": {"y": [1]}})
    assert _text("{{ bos_token }}{{ x.y[0] }}", chat, bos_token="<s>") == "!1"


def test_a_chat_with_tools_uses_the_template_for_tools() -> None:
    templates = _templates(default="d", tool_use="t")
    assert templates.render(_chat(), MAX_CHARS).text == "d"
    assert templates.render(_chat(tools=TOOLS), MAX_CHARS).text == "t"
    templates = _templates(default="d", other="o")
    assert templates.render(_chat(tools=TOOLS), MAX_CHARS).text == "d"
    named = _templates(name="other", default="d", other="o", tool_use="t")
    assert named.render(_chat(), MAX_CHARS).text == "o"
    assert named.render(_chat(tools=TOOLS), MAX_CHARS).text == "o"


def test_without_a_template_the_reason_is_no_chat_template() -> None:
    for templates in (_templates(), _templates(tool_use="t")):
        with pytest.raises(UnmappableError) as caught:
            templates.render(_chat(), MAX_CHARS)
        assert caught.value.reason == "no_chat_template"
    assert _templates(tool_use="t").render(_chat(tools=TOOLS), MAX_CHARS).text == "t"


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{ x", "{% endfor %}", "{{ x | nosuchfilter }}", "{% generation %}", "{% x %}"],
)
def test_a_template_that_does_not_compile_is_refused_at_start(source: str) -> None:
    with pytest.raises(TokenizerError, match=r"/m/x\.jinja \(default\): the chat template does"):
        _templates(default=source)


def test_an_unknown_template_name_is_refused_with_the_known_names() -> None:
    with pytest.raises(TokenizerError, match="'rag' does not exist, only default, tool_use"):
        _templates(name="rag", default="a", tool_use="b")
    with pytest.raises(TokenizerError, match="no templates"):
        _templates(name="rag")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('the secret ' ~ messages[0].content) }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ nothing.something }}",
        "{{ messages[0].content + 5 }}",
        "{{ nothing() }}",
        "{{ nothing | tojson }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].__class__ }}{{ messages[0].content.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages[0].pop('role') }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}{{ 1 / 0 }}",
        "{{ range(1000000) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include 'other' %}",
    ],
)
def test_every_error_in_a_template_becomes_a_reason(source: str) -> None:
    assert _reason_of(source) == "template_error"


def test_the_sandbox_hides_internal_attributes() -> None:
    source = (
        "[{{ ''.__class__ }}{{ messages.__class__ }}{{ messages[0].__len__ }}{{ ''.format.x }}]"
    )
    assert _text(source) == "[]"
    source = "{% set ns = namespace() %}[{{ ns.__class__ }}{% for x in [1] %}{{ loop._length }}"
    assert _text(source + "{% endfor %}]") == "[]"
    assert _text("{{ '{0.__class__}'.format(1) is string }}") == "True"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in messages[1:] %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 1000001 }}",
        "{% for m in messages %}{% for n in messages %}{{ m.content }}{% endfor %}{% endfor %}",
    ],
)
def test_an_output_over_the_limit_is_too_long(source: str) -> None:
    assert _reason_of(source, _chat(*["0123456789"] * 200)) == "too_long"


def test_an_output_of_exactly_the_limit_is_allowed() -> None:
    chat = _chat("x" * 100)
    templates = _templates(default="{{ messages[0].content }}")
    assert templates.render(chat, 100).text == "x" * 100
    with pytest.raises(UnmappableError):
        templates.render(chat, 99)


def test_rendering_does_not_change_the_messages() -> None:
    chat = _chat("a", "b", tools=[{**TOOLS[0]}])
    before = json.dumps([chat.messages, chat.tools])
    _text("{% set messages = messages[1:] %}{% set tools = none %}{{ messages }}", chat)
    assert json.dumps([chat.messages, chat.tools]) == before


def test_a_low_effort_is_unsupported_where_the_template_renames_it() -> None:
    source = "{{ low_effort }}{{ truncate_history_thinking }}"
    assert _reason_of(source, _chat(effort="low")) == "unsupported"
    assert _text(source, _chat(effort="high")) == ""


def _tool(name: str, size: int = 10) -> dict[str, Any]:
    function = {"name": name, "description": "x" * size}
    return {"type": "function", "function": function, "defer_loading": None}


def test_texts_of_tools_are_cached_by_object_and_format() -> None:
    source = "{% for t in tools %}{{ t | tojson }}{{ t | tojson(indent=1) }}{% endfor %}"
    templates = _templates(default=source)
    tools = [_tool("a"), _tool("b"), _tool("a")]
    expected = "".join(json.dumps(t) + json.dumps(t, indent=1) for t in tools)
    for _ in range(2):
        assert templates.render(_chat(tools=tools), MAX_CHARS).text == expected
    for n in range(500):
        fresh = [_tool(str(n))]
        expected = json.dumps(fresh[0]) + json.dumps(fresh[0], indent=1)
        assert templates.render(_chat(tools=fresh), MAX_CHARS).text == expected
    tools[0]["function"]["name"] = "changed by this test only"
    assert "changed" not in templates.render(_chat(tools=tools), MAX_CHARS).text


def test_the_cache_of_texts_of_tools_is_bounded() -> None:
    templates = _templates(default="{% for t in tools %}{{ t | tojson }}{% endfor %}")
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for n in range(200):
        templates.render(_chat(tools=[_tool(str(n), 200_000)]), 1_000_000)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 20_000_000
