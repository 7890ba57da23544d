"""What a router has to know of an inference engine, in one place for each engine.

An engine differs from others in how it reads a body (`rules`), in where it takes the data-parallel
rank from, and in what it says of its load. A version of an engine whose rules differ is an engine
of its own here, and `named` finds it by the version that a worker reports.
"""

from functools import cache
from typing import Final, Literal

from msgspec import Struct, structs

from extproc.engines.sglang.prompts import SglangRules
from extproc.engines.sglang.thinking import NO_PARSER, ReasoningParser, parser_named
from extproc.engines.vllm.prompts import VllmRules
from extproc.tokenization.prompts import PromptRules

__all__ = ["DEFAULT_ENGINE", "ENGINE_NAMES", "Engine", "EngineName", "engine_named"]

EngineName = Literal["sglang", "vllm"]


class Engine(Struct, frozen=True, kw_only=True, eq=False):
    """One engine, from version `since` on as far as it was read, that is up to `read_until`.

    `ranks_in_header`: it takes the data-parallel rank from a header; otherwise from the body.
    `adapters_with_model`: it takes an adapter as `model:adapter`; otherwise by its name alone.
    `load_from_metrics`: its load is read from `/metrics`, since it publishes no load.
    """

    name: EngineName
    since: tuple[int, ...]
    read_until: str
    rules: PromptRules
    ranks_in_header: bool = False
    adapters_with_model: bool = False
    load_from_metrics: bool = False

    def was_read(self, version: str) -> bool:
        """True if the rules were read from this version of the engine or one around it.

        Of a version, only the first two numbers count. An unknown one is taken for read.
        """
        wanted = _numbers(version)[:2]
        return not wanted or self.since[:2] <= wanted <= _numbers(self.read_until)[:2]


# By name, the newest version first.
_ENGINES: Final[dict[str, tuple[Engine, ...]]] = {
    "sglang": (
        Engine(
            name="sglang",
            since=(0, 5, 23),
            read_until="0.5.23",
            rules=SglangRules(NO_PARSER),
            adapters_with_model=True,
        ),
    ),
    "vllm": (
        Engine(
            name="vllm",
            since=(0, 32),
            read_until="0.32.0",
            rules=VllmRules(),
            ranks_in_header=True,
            load_from_metrics=True,
        ),
    ),
}
ENGINE_NAMES: Final = tuple(_ENGINES)
# Of workers that do not say what they are.
DEFAULT_ENGINE: Final = _ENGINES["sglang"][0]


def engine_named(name: EngineName | None, version: str = "", reasoning_parser: str = "") -> Engine:
    """The engine of this name, as it is in `version`; the newest for an unknown version.

    Without a name, it is the default one. An SGLang that was started with a `reasoning_parser` has
    other rules, so it is another engine: the same object for the same kind of parser.
    """
    engine = DEFAULT_ENGINE if name is None else _of_version(_ENGINES[name], version)
    if reasoning_parser and engine.name == "sglang":
        return _with_parser(engine, parser_named(reasoning_parser))
    return engine


@cache
def _with_parser(engine: Engine, parser: ReasoningParser) -> Engine:
    # There are as many as in the table of parsers, whatever workers say.
    return structs.replace(engine, rules=SglangRules(parser))


def _of_version(known: tuple[Engine, ...], version: str) -> Engine:
    if len(known) == 1 or not version:
        return known[0]
    wanted = _numbers(version)
    return next((engine for engine in known if engine.since <= wanted), known[-1])


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (0, 32, 0) of 0.32.0rc1+cpu."""
    found = []
    for part in version.lstrip("v").split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
        if digits != part:
            break
    return tuple(found)
