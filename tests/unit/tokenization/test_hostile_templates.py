"""Templates of a hostile model folder take neither the memory nor the time of the process."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2.sandbox import SandboxedEnvironment
from tokenizers import Tokenizer, models

from extproc.engines.sglang.chats import SglangChat
from extproc.tokenization.chat_template import ChatTemplates
from extproc.tokenization.errors import TokenizerError, UnmappableError
from extproc.tokenization.template_environment import template_environment
from extproc.tokenization.tokenizer_files import TokenizerFiles
from tests.unit.tokenization.hostile_templates import COMPILED, RENDERED

ROOM_BYTES = 512 << 20
# Its result cannot be known before.
LEFT_OUT = {"random"}


def outcome(source: str) -> str:
    """Where a template is refused, with a chat that is longer than that of the trial."""
    files = TokenizerFiles(
        Tokenizer(models.WordLevel({}, unk_token="")),
        {},
        {"default": "{% if messages[0].content != 'x' %}" + source + "{% endif %}"},
        {"default": Path("/m/x.jinja")},
    )
    try:
        ChatTemplates(files).render(
            SglangChat(messages=[{"role": "user", "content": "ab"}]), 4_000_000
        )
    except TokenizerError:
        return "at start"
    except UnmappableError as refused:
        return refused.reason
    return "rendered"


def attack() -> None:
    """Try all templates with little memory; called in another process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    for source in RENDERED:
        found = outcome(source)
        # Long sources have too many expressions.
        assert found == "template_limit" or (found == "at start" and len(source) > 5000), source
    for source in COMPILED:
        assert outcome(source) == "at start", source[:200]


def test_no_template_takes_the_memory_or_the_time_of_the_process() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "from tests.unit.tokenization import test_hostile_templates as t; t.attack()",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_filter_of_a_template_has_a_bound() -> None:
    # A new filter of Jinja has to be put into one of the kinds, or it does not exist here.
    known = {name for name in template_environment().filters if not name.startswith(" ")}
    assert known == set(SandboxedEnvironment().filters) - LEFT_OUT


def test_a_template_over_its_limits_for_the_shortest_chat_is_refused_at_start() -> None:
    files = TokenizerFiles(
        Tokenizer(models.WordLevel({}, unk_token="")),
        {},
        {
            "default": "{% for a in range(9999) %}"
            + "{% for b in range(9999) %}{% endfor %}" * 2
            + "{% endfor %}"
        },
        {"default": Path("/m/x.jinja")},
    )
    with pytest.raises(TokenizerError, match=r"/m/x\.jinja \(default\): .* too many steps"):
        ChatTemplates(files)
