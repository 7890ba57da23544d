"""Runs the load generator `wrk` with a generated script.

wrk is written in C and costs a few microseconds a request; a generator in Python would use
more CPU than the measured service. The script prints the result as one JSON line, since wrk's
own report rounds and changes units.
"""

import asyncio
import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

__all__ = [
    "WrkError",
    "WrkResult",
    "chat_body",
    "conversation_script",
    "find_wrk",
    "parse_output",
    "run_wrk",
    "script",
]

_MARK: Final = "wrk-result "
_STOP_GRACE_SECONDS: Final = 15.0
_FILLER: Final = "Summarise what the previous section says about latency under load. "

_SCRIPT: Final = """\
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer not-a-secret"
wrk.headers["User-Agent"] = "OpenAI/Python"
wrk.headers["Accept"] = "application/json"
%s

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '%s{"requests": %%d, "micros": %%d, "p50": %%d, "p99": %%d, "errors": ' ..
    '{"connect": %%d, "read": %%d, "write": %%d, "status": %%d, "timeout": %%d}}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
"""

# The next turn of one of the conversations: its history and a new question.
_CONVERSATIONS: Final = """\
local heads = {%s}
local sentences = {%s}
local tail = [=[%s]=]
math.randomseed(os.time())

request = function()
  local parts = {}
  local length = 0
  while length < %d do
    local sentence = sentences[math.random(#sentences)] .. " "
    if math.random(4) == 1 then
      sentence = sentence .. math.random(1000000) .. " "
    end
    parts[#parts + 1] = sentence
    length = length + #sentence
  end
  return wrk.format(nil, nil, nil, heads[math.random(#heads)] .. table.concat(parts) .. tail)
end"""


class WrkError(Exception):
    """wrk is missing or gave no result; the message says what to do."""


class WrkResult(Struct, frozen=True, kw_only=True):
    """One run. `errors` counts by kind: connect, read, write, status, timeout."""

    requests: int
    seconds: float
    p50_us: int
    p99_us: int
    errors: dict[str, int]


def find_wrk() -> str:
    """Path of `wrk`; raises WrkError."""
    found = shutil.which("wrk")
    if found is None:
        raise WrkError("install wrk (Debian/Ubuntu: apt-get install wrk)")
    return found


def chat_body(model: str, size_bytes: int) -> str:
    """A chat completion request of exactly this many ASCII bytes.

    The model comes after the messages, as the OpenAI SDK writes it: a parser must skip the
    prompt to find it.
    """
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": ""}],
        "model": model,
        "max_tokens": 64,
    }
    room = size_bytes - len(json.dumps(body))
    if room < 0:
        raise ValueError(f"a body has at least {size_bytes - room} bytes")
    body["messages"][0]["content"] = (_FILLER * (room // len(_FILLER) + 1))[:room]
    return json.dumps(body)


def script(body: str) -> str:
    """The Lua script that posts the body and prints the result."""
    return _SCRIPT % (f"wrk.body = [=[{body}]=]", _MARK)


def conversation_script(
    heads: Sequence[str], sentences: Sequence[str], tail: str, question_bytes: int
) -> str:
    """The Lua script that continues conversations, each time with a new question.

    A body is one of `heads`, at least `question_bytes` of `sentences` in random order with
    a number after every fourth, and `tail`; sentences are already escaped for a JSON string.
    """
    work = _CONVERSATIONS % (
        ",".join(f"[=[{head}]=]" for head in heads),
        ",".join(f"[=[{sentence}]=]" for sentence in sentences),
        tail,
        question_bytes,
    )
    return _SCRIPT % (work, _MARK)


def parse_output(output: str) -> WrkResult:
    """The result in wrk's output; raises WrkError if there is no result."""
    for line in output.splitlines():
        if line.startswith(_MARK):
            values = json.loads(line.removeprefix(_MARK))
            return WrkResult(
                requests=values["requests"],
                seconds=values["micros"] / 1e6,
                p50_us=values["p50"],
                p99_us=values["p99"],
                errors={kind: count for kind, count in values["errors"].items() if count},
            )
    raise WrkError(f"wrk printed no result:\n{output}")


async def run_wrk(url: str, script_file: Path, connections: int, seconds: int) -> WrkResult:
    """One run on one thread; raises WrkError. wrk has ended when this returns or is cancelled."""
    process = await asyncio.create_subprocess_exec(
        *(find_wrk(), "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"),
        *("-s", str(script_file), url),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(seconds + _STOP_GRACE_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        raise WrkError(f"wrk did not end after {seconds} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return parse_output(output.decode(errors="replace"))
