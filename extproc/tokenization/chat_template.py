"""Renders chats with the model's chat template, as transformers does.

A template is compiled once and rendered for each chat. It comes with the model and is not
trusted: it runs in Jinja's immutable sandbox, and its output, its steps and its values are bounded
(see `template_limits`). Errors in a template become a reason. They can quote the prompt, so their
text is neither logged nor shown.
"""

import re
from typing import Any, Final

import jinja2
from jinja2 import meta, nodes
from msgspec import Struct, structs

from extproc.errors import ServiceError
from extproc.tokenization.content_format import content_format as detected_format
from extproc.tokenization.errors import TokenizerError, UnmappableError
from extproc.tokenization.media import text_before_media
from extproc.tokenization.open_end import cut_at_mark, marked
from extproc.tokenization.prompts import (
    Chat,
    ContentFormat,
    Message,
    TemplateFacts,
    TemplateInput,
)
from extproc.tokenization.reasons import (
    MULTIMODAL,
    NO_CHAT_TEMPLATE,
    TEMPLATE_ERROR,
    TEMPLATE_LIMIT,
    TOO_LONG,
)
from extproc.tokenization.template_budget import (
    SECONDS_MAX,
    STEPS_MAX,
    VALUE_MAX_LENGTH,
    TemplateLimitError,
    end_rendering,
    start_rendering,
)
from extproc.tokenization.template_environment import template_environment
from extproc.tokenization.template_limits import LimitedEnvironment
from extproc.tokenization.template_tree import check_source, limited
from extproc.tokenization.tokenizer_files import TokenizerFiles

__all__ = ["ChatTemplates", "RenderedChat", "iterates_over_parts"]

_DEFAULT: Final = "default"
_WITH_TOOLS: Final = "tool_use"
_MEDIA_WORDS: Final = ("image", "audio", "video", "vision")
_MESSAGE_NAMES: Final = frozenset({"message", "msg", "m"})
# A rendering with a share of the time has a larger one of the steps: long messages pay with steps
# for operations that take little time.
_STEPS_FOR_TIME: Final = 4.0
# A template with both words belongs to a family that uses another name for a low effort.
_LOW_EFFORT_WORDS: Final = ("low_effort", "truncate_history_thinking")
# What vLLM tries to find out how thinking is turned off.
_LOW_EFFORT: Final = "low"
_EFFORTS: Final = ("low", "medium", "high", "xhigh", "max")
_THINKING: Final = frozenset({"thinking", "enable_thinking"})
_HI_IN_PARTS: Final = ({"type": "text", "text": "Hi"},)
_SENTINEL: Final = "a late system's text"
_ADDED_FUNCTIONS: Final = ("raise_exception", "strftime_now")
# What the library changes when it turns tokens into text and cleans that up.
_CLEANED_UP: Final = re.compile(r" (?:[.?!,]|' |n't|'m|'s|'ve|'re)")
_GENERATION_TAG: Final = re.compile(r"\{%[-+]?\s*generation\b")


class RenderedChat(Struct, frozen=True):
    """The text to encode, and the beginning of the answer to continue it.

    `with_special`: the text is encoded with the special tokens that the tokenizer adds.
    `cut`: the text ends before an image, audio or video, so that it is not known what follows.
    `text_encoded_twice` is that of the input.
    """

    text: str
    continued: str
    with_special: bool
    cut: bool = False
    text_encoded_twice: bool = False


class ChatTemplates:
    """The compiled templates of one model.

    With `template_name`, this template is always used. Without it, `tool_use` is used for chats
    with tools if it exists, else `default`, as in transformers. `default_kwargs` are those of the
    engine (`--default-chat-template-kwargs`). Raises TokenizerError for a template that does not
    compile and for a name that does not exist.
    """

    def __init__(
        self,
        files: TokenizerFiles,
        *,
        template_name: str | None = None,
        default_kwargs: dict[str, Any] | None = None,
        content_format: ContentFormat | None = None,
        hides_unchosen_tools: bool = False,
    ) -> None:
        self._special_tokens = files.special_tokens
        self._cleans_up_blanks = files.cleans_up_blanks
        self._default_kwargs = default_kwargs or {}
        environment = template_environment()
        compiled = {
            name: _Template(environment, source, f"{files.template_files[name]} ({name})")
            for name, source in files.templates.items()
        }
        if template_name is not None and template_name not in compiled:
            known = (
                f"only {', '.join(sorted(compiled))}" if compiled else "the model has no templates"
            )
            raise TokenizerError(f"chat template {template_name!r} does not exist, {known}")
        self._default = compiled.get(template_name or _DEFAULT)
        self._with_tools = compiled.get(template_name or _WITH_TOOLS) or self._default
        for name, template in compiled.items():
            self._try(f"{files.template_files[name]} ({name})", template)
        if self._default is not None and self._with_tools is not None:
            found = {
                "shows_late_system": self._default.shows_late_system(),
                "wants_system_first": any(
                    template.fails_for_late_system()
                    for template in (self._default, self._with_tools)
                ),
                "effort_without_thinking": self._default.effort_without_thinking(
                    {**self._special_tokens, **self._default_kwargs}
                ),
                "hides_unchosen_tools": hides_unchosen_tools,
                "model_type": files.model_type,
            }
            if content_format is not None:
                found["content_format"] = content_format
            for template in compiled.values():
                template.facts = structs.replace(template.facts, **found)

    def _try(self, where: str, template: "_Template") -> None:
        """Raise TokenizerError for a template that has no bound even with a short chat."""
        variables = {
            "messages": [{"role": "user", "content": "x"}],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self._special_tokens,
            **self._default_kwargs,
        }
        try:
            template.render(variables, VALUE_MAX_LENGTH, 1.0)
        except _TemplateFailedError:
            # It may need other messages.
            pass
        except UnmappableError:
            raise TokenizerError(
                f"{where}: the chat template takes too many steps, too much time or too long "
                "values, even for a chat of one word"
            ) from None

    def render(self, chat: Chat, max_chars: int, *, share: float = 1.0) -> RenderedChat:
        """The text of a chat; raises UnmappableError.

        `share`: the part of the time of a rendering that it may take, which also limits its steps.
        """
        template = self._with_tools if chat.has_tools else self._default
        if template is None:
            raise UnmappableError(NO_CHAT_TEMPLATE)
        given = chat.for_template(template.facts, self._default_kwargs)
        if given.other_media is not None:
            return self._before_media(template, given, given.other_media, max_chars, share)
        messages, last = given.messages, None
        if given.open_end:
            messages, last = marked(messages)
        text = self._text(template, given, messages, max_chars, share)
        if last is not None:
            text = cut_at_mark(text, last)
        return RenderedChat(text, given.continued, given.with_special)

    def _before_media(
        self,
        template: "_Template",
        given: TemplateInput,
        other_media: list[Message],
        max_chars: int,
        share: float,
    ) -> RenderedChat:
        """The text before the first image, audio or video."""
        text = text_before_media(
            self._text(template, given, given.messages, max_chars, share),
            self._text(template, given, other_media, max_chars, share),
        )
        if self._cleans_up_blanks and (blank := _CLEANED_UP.search(text)) is not None:
            text = text[: blank.start()]
        if not text:
            raise UnmappableError(MULTIMODAL)
        return RenderedChat(
            text,
            "",
            given.with_special,
            cut=True,
            text_encoded_twice=given.text_encoded_twice,
        )

    def _text(
        self,
        template: "_Template",
        given: TemplateInput,
        messages: list[Message],
        max_chars: int,
        share: float,
    ) -> str:
        """The text for these messages; raises UnmappableError."""
        variables = {
            "messages": messages,
            "tools": given.tools,
            "documents": given.documents,
            "add_generation_prompt": given.generation_prompt,
            **self._special_tokens,
            **given.kwargs,
        }
        try:
            return template.render(variables, max_chars, share)
        except _TemplateFailedError:
            if given.tools is None or not given.functions_too:
                raise UnmappableError(TEMPLATE_ERROR) from None
        variables["tools"] = [tool["function"] for tool in given.tools]
        try:
            return template.render(variables, max_chars, share)
        except _TemplateFailedError:
            raise UnmappableError(TEMPLATE_ERROR) from None


class _TemplateFailedError(ServiceError):
    """A template raised an error, whose text is not kept."""


class _Template:
    def __init__(self, environment: LimitedEnvironment, source: str, where: str) -> None:
        try:
            check_source(source)
            self._source = source
            tree = environment.parse(source)
            self.facts = TemplateFacts(
                loops_over_parts=iterates_over_parts(source, tree),
                content_format=detected_format(tree),
                thinking_variables=_THINKING & meta.find_undeclared_variables(tree),
                names_developer='"developer"' in source or "'developer'" in source,
                renames_low_effort=all(word in source for word in _LOW_EFFORT_WORDS),
            )
            self._template = environment.from_string(limited(tree, environment))
        except Exception as error:
            # Python, too, refuses code that is nested too deep, with several kinds of errors.
            raise TokenizerError(
                f"{where}: the chat template does not compile: {error or type(error).__name__}"
            ) from error

    def fails_for_late_system(self) -> bool:
        """True if the template fails for a system's message after others, as vLLM tries it.

        The engine's trial has no functions and no variables beyond the messages.
        """
        return bool(_GENERATION_TAG.search(self._source)) or self._late_system("t") is None

    def _late_system(self, late: str) -> str | None:
        """The text of a chat in which a system's message is the third; None if that fails."""
        texts = (("system", "t"), ("user", "t"), ("system", late), ("user", "t"))
        messages = [{"role": role, "content": text} for role, text in texts]
        missing = {name: jinja2.Undefined(name=name) for name in _ADDED_FUNCTIONS}
        return self._trial({"messages": messages, "add_generation_prompt": False, **missing})

    def shows_late_system(self) -> bool:
        """True if a system's message after others is printed, as SGLang tries it."""
        text = None if _GENERATION_TAG.search(self._source) else self._late_system(_SENTINEL)
        return text is not None and _SENTINEL in text

    def effort_without_thinking(self, variables: dict[str, Any]) -> str:
        """The effort by which vLLM turns thinking off; it is low if the template ignores others."""
        content = "Hi" if self.facts.content_format == "string" else _HI_IN_PARTS
        variables = {
            "messages": [{"role": "user", "content": content}],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **variables,
        }
        without = self._trial({**variables, "reasoning_effort": "none", "enable_thinking": False})
        if without is None:
            return _LOW_EFFORT
        for effort in _EFFORTS:
            given = {**variables, "reasoning_effort": effort, "enable_thinking": True}
            if self._trial(given) == without:
                return _LOW_EFFORT
        return "none"

    def _trial(self, variables: dict[str, Any]) -> str | None:
        """The text of a trial; None if the template fails."""
        try:
            return self.render(variables, VALUE_MAX_LENGTH, 1.0)
        except (_TemplateFailedError, UnmappableError):
            return None

    def render(self, variables: dict[str, Any], max_chars: int, share: float) -> str:
        written: list[str] = []
        room = max_chars
        # Jinja's render() would rewrite errors with the lines of the template, which takes time.
        steps = int(STEPS_MAX * min(1.0, _STEPS_FOR_TIME * share))
        start_rendering(steps, SECONDS_MAX * share)
        try:
            context = self._template.new_context(variables)
            for piece in self._template.root_render_func(context):
                written.append(piece)
                room -= len(piece)
                if room < 0:
                    break
        except TemplateLimitError:
            raise UnmappableError(TEMPLATE_LIMIT) from None
        except Exception:
            raise _TemplateFailedError from None
        finally:
            end_rendering()
        if room < 0:
            raise UnmappableError(TOO_LONG)
        return "".join(written)


def iterates_over_parts(source: str, tree: nodes.Template) -> bool:
    """True if a template gets content as a list of parts, and not as their joined text.

    The rule is the engine's: the syntax tree has a loop over `content` of a variable named
    message, msg or m, or the source has a word for media. A trial of the template would be right
    more often than the engine, and would so give other tokens.
    """
    if any(word in source for word in _MEDIA_WORDS):
        return True
    return any(_is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node | None) -> bool:
    """`message.content` or `message["content"]`, also filtered, tested or sliced."""
    if isinstance(node, nodes.Filter | nodes.Test):
        return _is_content(node.node)
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Slice):
            return _is_content(node.node)
        named = isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    elif isinstance(node, nodes.Getattr):
        named = node.attr == "content"
    else:
        return False
    owner = node.node
    return named and isinstance(owner, nodes.Name) and owner.name in _MESSAGE_NAMES
