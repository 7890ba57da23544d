"""Renders a chat to the text that the model reads, as vLLM 0.32 does with transformers 5."""

import copy
from pathlib import Path
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from extproc.simulator.chat_template import environment, template_source, template_variables
from extproc.simulator.vllm_chats import ContentFormat, VllmChat, VllmChatError, conversation

__all__ = ["VllmTemplate"]

_TAG: Final = "CONTINUE_FINAL_MESSAGE_TAG "
# Consumed before the template is rendered, or given to every template.
_ALWAYS_TAKEN: Final = frozenset(
    ("tools", "documents", "add_generation_prompt", "continue_final_message")
)
_EFFORTS: Final = ("low", "medium", "high", "xhigh", "max")
_probe_environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
)


class VllmTemplate:
    """The template of a model's folder; `form` overrides how contents are given to it.

    Raises ValueError if it cannot be parsed.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], form: ContentFormat | None = None
    ) -> None:
        self._special_tokens = template_variables(config)
        sources = template_source(folder, config)
        self._templates = {name: _Template(source, form) for name, source in sources.items()}
        self.merges_system = any(one.needs_system_first for one in self._templates.values())
        self.effort_of_disabled = self._effort_of_disabled()

    def render(self, chat: VllmChat) -> str:
        """Raises VllmChatError."""
        template = self._templates.get("default")
        if chat.tools is not None:
            template = self._templates.get("tool_use", template)
        if template is None:
            raise VllmChatError("the tokenizer folder has no chat template")
        if not chat.messages:
            raise VllmChatError("messages: at least one message is needed")
        return template.render(chat, self._special_tokens)

    def _effort_of_disabled(self) -> str:
        """The effort that disabled thinking stands for, by what the template makes of it."""

        def probe(effort: str) -> str | None:
            messages = [{"role": "user", "content": "Hi"}]
            variables = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
            try:
                return self.render(VllmChat(messages=messages, variables=variables))
            except VllmChatError:
                return None

        without = probe("none")
        ignored = without is None or any(probe(effort) == without for effort in _EFFORTS)
        return "low" if ignored else "none"


class _Template:
    def __init__(self, source: str, form: ContentFormat | None) -> None:
        try:
            tree = environment.parse(source)
            self._compiled = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error}") from error
        self._source = source
        self._taken = jinja2.meta.find_undeclared_variables(tree) | _ALWAYS_TAKEN
        self._form: ContentFormat = form or ("openai" if _reads_parts(tree) else "string")
        self._knows_developers = '"developer"' in source or "'developer'" in source
        self.needs_system_first = self._refuses_system_later()

    def render(self, chat: VllmChat, special_tokens: dict[str, Any]) -> str:
        if chat.variables.get("chat_template") is not None:
            raise VllmChatError("chat_template_kwargs: a template cannot be sent")
        given = {name: value for name, value in chat.variables.items() if name in self._taken}
        messages = conversation(chat.messages, self._form)
        if not self._knows_developers and any(one["role"] == "developer" for one in messages):
            messages = _with_one_system(messages)
        continues = bool(given.pop("continue_final_message", False))
        starts = bool(given.pop("add_generation_prompt", True))
        if continues and starts:
            raise VllmChatError("continue_final_message excludes add_generation_prompt")
        said = ""
        if continues:
            messages = copy.deepcopy(messages)
            said = self._mark_end(messages[-1])
        variables = {"documents": None, "tools": chat.tools} | special_tokens | given
        try:
            text = self._compiled.render(
                {"messages": messages, "add_generation_prompt": starts} | variables
            )
        # A template is a program: when it fails on a chat, the chat is refused.
        except Exception as error:
            raise VllmChatError(f"chat template: {error}") from error
        return self._cut(text, said) if continues else text

    def _mark_end(self, message: dict[str, Any]) -> str:
        """Mark the end of the message that the answer continues; returns what it says."""
        said = message.get("content")
        if said is None or "content" not in self._source:
            raise VllmChatError("continue_final_message: the last message has no content")
        if isinstance(said, str):
            message["content"] = said + _TAG
            return said
        for part in reversed(said):
            if "text" in part:
                text: str = part["text"]
                part["text"] = text + _TAG
                return text
        raise VllmChatError("continue_final_message: the last message has no text")

    @staticmethod
    def _cut(text: str, said: str) -> str:
        mark = _TAG.strip()
        if said.strip() not in text or mark not in text:
            raise VllmChatError("continue_final_message: the template drops the last message")
        at = text.rindex(mark)
        return text[:at] if text[at : at + len(_TAG)] == _TAG else text[:at].rstrip()

    def _refuses_system_later(self) -> bool:
        roles = ("system", "user", "system", "user")
        messages = [{"role": role, "content": "t"} for role in roles]
        try:
            template = _probe_environment.from_string(self._source)
            template.render(messages=messages, add_generation_prompt=False)
        except Exception:
            return True
        return False


def _with_one_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Developers' messages become the system's, and all of those one, at the beginning."""
    renamed = [
        {k: v for k, v in one.items() if k != "tools"} | {"role": "system"}
        if one["role"] == "developer"
        else one
        for one in messages
    ]
    system = [one for one in renamed if one["role"] == "system"]
    if len(system) == 1 and renamed[0] is system[0]:
        return renamed
    said = [text for one in system if (text := _text(one.get("content", "")))]
    others = [one for one in renamed if one["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(said)}, *others]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if "text" in part)


def _reads_parts(tree: jinja2.nodes.Template) -> bool:
    """True if the template loops over the parts of a message's content."""
    lists = _aliases(tree, {"messages"})
    items = {
        loop.target.name
        for loop in tree.find_all(jinja2.nodes.For)
        if isinstance(loop.target, jinja2.nodes.Name) and _is_one_of(loop.iter, lists)
    }
    macros = {id(loop) for macro in tree.find_all(jinja2.nodes.Macro) for loop in _loops(macro)}
    for loop in _loops(tree):
        if _is_content_of(loop.iter, items):
            return True
        is_content = isinstance(loop.iter, jinja2.nodes.Name) and loop.iter.name == "content"
        if is_content and id(loop) not in macros:
            return True
    return any(_loops_over_content(macro, tree, items) for macro in _macros(tree))


def _loops(node: jinja2.nodes.Node) -> list[jinja2.nodes.For]:
    return list(node.find_all(jinja2.nodes.For))


def _macros(node: jinja2.nodes.Node) -> list[jinja2.nodes.Macro]:
    return list(node.find_all(jinja2.nodes.Macro))


def _loops_over_content(
    macro: jinja2.nodes.Macro, tree: jinja2.nodes.Template, items: set[str]
) -> bool:
    """True if the macro loops over a parameter that is given a message's content."""
    given = set()
    for call in tree.find_all(jinja2.nodes.Call):
        if isinstance(call.node, jinja2.nodes.Name) and call.node.name == macro.name:
            pairs = [(argument.name, value) for argument, value in zip(macro.args, call.args)]  # noqa: B905
            pairs += [(word.key, word.value) for word in call.kwargs]
            given |= {name for name, value in pairs if _is_content_of(value, items)}
    return any(
        isinstance(loop.iter, jinja2.nodes.Name) and loop.iter.name in given
        for loop in _loops(macro)
    )


def _aliases(tree: jinja2.nodes.Template, names: set[str]) -> set[str]:
    """These variables and all that are assigned from them."""
    assigned = [
        (one.target.name, one.node)
        for one in tree.find_all(jinja2.nodes.Assign)
        if isinstance(one.target, jinja2.nodes.Name)
    ]
    found = set(names)
    while more := {name for name, node in assigned if _is_one_of(node, found)} - found:
        found |= more
    return found


def _bare(node: jinja2.nodes.Node | None) -> jinja2.nodes.Node | None:
    """The expression without filters, tests and slices."""
    while True:
        match node:
            case jinja2.nodes.Filter() | jinja2.nodes.Test():
                node = node.node
            case jinja2.nodes.Getitem(arg=jinja2.nodes.Slice()):
                node = node.node
            case _:
                return node


def _is_one_of(node: jinja2.nodes.Node | None, names: set[str]) -> bool:
    bare = _bare(node)
    return isinstance(bare, jinja2.nodes.Name) and bare.name in names


def _is_content_of(node: jinja2.nodes.Node | None, names: set[str]) -> bool:
    match _bare(node):
        case jinja2.nodes.Getitem(
            node=jinja2.nodes.Name(name=name), arg=jinja2.nodes.Const(value="content")
        ):
            return name in names
        case jinja2.nodes.Getattr(node=jinja2.nodes.Name(name=name), attr="content"):
            return name in names
    return False
