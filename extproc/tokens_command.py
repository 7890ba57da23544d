"""`extproc tokens`: prints the token ids of a request, as an engine would compute them.

They are made here from a tokenizer, or a running service is asked. Separate from the command line
because it reads files and speaks HTTP.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from extproc.admin.client import AdminError, ask_for_tokens
from extproc.clock import SystemClock
from extproc.encoders import content_format_of
from extproc.engines.engine import ENGINE_NAMES, Engine, EngineName, engine_named
from extproc.errors import RouterError, ServiceError
from extproc.routing.local_endpoints import tokens_of
from extproc.routing.request import ClientHeaders, find_endpoint, parse_body
from extproc.tokenization.encoder import Encoded, EncoderSettings, PromptEncoder
from extproc.tokenization.errors import TokenizerError

__all__ = ["add_arguments", "run"]

_EXIT_GOOD: Final = 0
_EXIT_FAILED: Final = 1
_EXIT_BAD_USAGE: Final = 2
_EXIT_WITHOUT_TOKENS: Final = 3
_TOKEN_VARIABLE: Final = "EXTPROC_ADMIN_TOKEN"  # noqa: S105 (a name)


def add_arguments(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="the model's folder, or its tokenizer.json"
    )
    source.add_argument(
        "--admin",
        metavar="URL",
        help="admin port of a running service, which is asked instead; its token is taken from "
        f"the variable {_TOKEN_VARIABLE}",
    )
    command.add_argument(
        "--engine",
        metavar="NAME[@VERSION]",
        help=f"{' or '.join(ENGINE_NAMES)}; needed with --tokenizer, and with --admin if the "
        "model's workers have several engines",
    )
    command.add_argument(
        "--path", required=True, metavar="P", help="path of the request: /v1/chat/completions"
    )
    command.add_argument(
        "--body", required=True, metavar="F", help="file with the request's body, - for stdin"
    )
    command.add_argument(
        "--reasoning-parser", default="", metavar="NAME", help="as the flag of SGLang"
    )
    command.add_argument("--chat-template-name", metavar="NAME", help="as the model's key")
    command.add_argument(
        "--chat-template-kwargs", metavar="JSON", help="as the model's key, a JSON object"
    )
    command.add_argument(
        "--chat-template-content-format",
        choices=("auto", "string", "openai"),
        default="auto",
        help="as the model's key",
    )
    command.add_argument(
        "--exclude-tools-when-tool-choice-none", action="store_true", help="as the model's key"
    )


def run(options: argparse.Namespace) -> int:
    """Print the ids; returns the exit code."""
    try:
        body = _read_body(options.body)
        if options.admin is not None:
            return _report(_ask(options, body))
        return _report(_make(options, body))
    except _UsageError as error:
        sys.stderr.write(f"{error}\n")
        return _EXIT_BAD_USAGE
    except (OSError, TokenizerError, AdminError) as error:
        sys.stderr.write(f"{error}\n")
        return _EXIT_FAILED


class _UsageError(ServiceError):
    """An option that cannot be used; the text says why."""


def _read_body(name: str) -> bytes:
    return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()


def _make(options: argparse.Namespace, body: bytes) -> dict[str, Any]:
    if options.engine is None:
        raise _UsageError("--engine is needed with --tokenizer")
    engine = _engine(options.engine, options.reasoning_parser)
    settings = EncoderSettings(
        template_name=options.chat_template_name,
        template_kwargs=_kwargs(options.chat_template_kwargs),
        content_format=content_format_of(options.chat_template_content_format),
        hides_unchosen_tools=options.exclude_tools_when_tool_choice_none,
    )
    encoder = PromptEncoder.load(options.tokenizer, settings, SystemClock())
    try:
        request = parse_body(
            find_endpoint("POST", options.path), body, _no_headers, prompt_max_bytes=0
        )
    except RouterError as error:
        return {"reason": error.message, "member": None}
    try:
        encoded: Encoded = asyncio.run(tokens_of(encoder, engine, request))
    finally:
        encoder.close()
    if encoded.ids is None:
        return {"reason": encoded.reason, "member": encoded.member or None}
    return {"ids": encoded.ids.tolist()}


def _ask(options: argparse.Namespace, body: bytes) -> dict[str, Any]:
    """What the service says for the wanted engine."""
    token = os.environ.get(_TOKEN_VARIABLE)
    found = asyncio.run(ask_for_tokens(options.admin, options.path, body, token))
    if options.engine is not None:
        name = _engine(options.engine).name
        found = [one for one in found if one.get("engine") == name]
        if not found:
            raise _UsageError(f"--engine: the model has no workers with {name}")
    if len(found) != 1:
        names = ", ".join([str(one.get("engine")) for one in found])
        raise _UsageError(f"--engine is needed, the model's workers have several: {names}")
    return found[0]


def _engine(given: str, parser: str = "") -> Engine:
    name, _, version = given.partition("@")
    if name not in ENGINE_NAMES:
        raise _UsageError(f"--engine: {name!r} is not one of {', '.join(ENGINE_NAMES)}")
    return engine_named(cast("EngineName", name), version, parser)


def _kwargs(given: str | None) -> dict[str, Any]:
    if given is None:
        return {}
    try:
        return msgspec.json.decode(given, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise _UsageError(f"--chat-template-kwargs: {error}") from None


def _report(found: dict[str, Any]) -> int:
    if "ids" in found:
        sys.stdout.write(msgspec.json.encode(found["ids"]).decode() + "\n")
        return _EXIT_GOOD
    member = found.get("member")
    because = f", because of {member}" if member else ""
    sys.stderr.write(f"no tokens: {found.get('reason')}{because}\n")
    return _EXIT_WITHOUT_TOKENS


def _no_headers() -> ClientHeaders:
    return ClientHeaders("", ())
