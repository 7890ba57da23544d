"""Compares the service's tokens with the vectors of an engine, and prints what differs.

python -m tests.engines.compare --engine vllm
python -m tests.engines.compare --engine sglang --model tools --show differ --show without
"""

# ruff: noqa: T201
import argparse
import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, cast

from tokenizers import Tokenizer

from extproc.clock import SystemClock
from extproc.engines.engine import EngineName, engine_named
from extproc.errors import RouterError
from extproc.routing.request import ClientHeaders, find_endpoint, parse_body
from extproc.tokenization.encoder import EncoderSettings, PromptEncoder
from tests.engines.bodies import Body, all_bodies
from tests.engines.vectors import MODEL_NAMES, MODELS, read_vectors, vector_files

__all__ = ["OUTCOMES", "Compared", "compare_model"]

# Printed in this order. For a body that the engine refuses, tokens are unused, and harmless.
SAME: Final = "same"
DIFFER: Final = "differ"
NONE: Final = "without"
BATCH: Final = "batch"
REFUSED: Final = "refused"
UNUSED: Final = "unused"
_PARSER_FLAG: Final = "--reasoning-parser"
OUTCOMES: Final = (SAME, DIFFER, NONE, BATCH, REFUSED, UNUSED)


class Compared(NamedTuple):
    """What became of one body; `detail` has the reason without tokens, or the first difference."""

    body: Body
    outcome: str
    detail: str


def compare_model(vectors: dict[str, Any], model: str) -> list[Compared]:
    """Every body that the vectors of a model have, in order.

    ValueError if a vector is of another body.
    """
    answers = vectors["models"][model]["answers"]
    return list(asyncio.run(_compare(_Service(vectors, model), answers)))


class _Service:
    """What the service makes of a body for an engine."""

    def __init__(self, vectors: dict[str, Any], model: str) -> None:
        folder = MODELS / model
        name, version = cast("EngineName", vectors["engine"]), vectors["version"]
        flags = vectors["models"][model]["flags"]
        parser = flags[flags.index(_PARSER_FLAG) + 1] if _PARSER_FLAG in flags else ""
        self.rules = engine_named(name, version, parser).rules
        self.encoder = PromptEncoder.load(folder, EncoderSettings(), SystemClock())
        self.words = Tokenizer.from_file(str(folder / "tokenizer.json"))

    async def tokens(self, body: Body) -> tuple[list[int] | None, str, str | None]:
        """The ids, or None with the reason; the salt."""
        endpoint = find_endpoint("POST", body.path)
        try:
            request = parse_body(endpoint, body.data, _no_headers, prompt_max_bytes=1 << 24)
        except RouterError as error:
            return None, error.code, None
        fields = request.take_fields()
        prompt = await self.encoder.read(self.rules, body.path, request.body, fields)
        encoded = await self.encoder.encode(prompt)
        ids = None if encoded.ids is None else encoded.ids.tolist()
        return ids, encoded.reason, prompt.cache_salt

    def text(self, ids: list[int]) -> str:
        return self.words.decode(ids, skip_special_tokens=False)


def _no_headers() -> ClientHeaders:
    return ClientHeaders("", ())


async def _compare(service: _Service, answers: dict[str, Any]) -> list[Compared]:
    compared = []
    for body in all_bodies():
        answer = answers[body.name]
        if answer["digest"] != body.digest:
            raise ValueError(f"{body.name} is not the body that its vector was made for")
        ids, reason, salt = await service.tokens(body)
        outcome, detail = _outcome(service, answer, ids, reason, salt)
        compared.append(Compared(body, outcome, detail))
    service.encoder.close()
    return compared


def _outcome(
    service: _Service, answer: dict[str, Any], ids: list[int] | None, reason: str, salt: str | None
) -> tuple[str, str]:
    if "refused" in answer:
        return (REFUSED, reason) if ids is None else (UNUSED, answer["message"])
    if len(answer["prompts"]) != 1:
        return (BATCH, reason) if ids is None else (DIFFER, "the engine computes several prompts")
    if ids is None:
        return NONE, reason
    (truth,) = answer["prompts"]
    if ids != truth:
        return DIFFER, _difference(service, ids, truth)
    if (salt or None) != answer.get("cache_salt"):
        return DIFFER, f"the salt is {salt!r}, the engine's is {answer.get('cache_salt')!r}"
    return SAME, ""


def _difference(service: _Service, ours: list[int], truth: list[int]) -> str:
    pairs = zip(ours, truth, strict=False)
    at = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
    at = min(len(ours), len(truth)) if at is None else at
    here, there = service.text(ours[at : at + 12]), service.text(truth[at : at + 12])
    return f"at {at}: ours {here!r}, the engine's {there!r}"


def _lines(
    engine: str, version: str, vectors: dict[str, Any], wanted: argparse.Namespace
) -> Iterator[str]:
    yield f"{engine} {version}"
    yield f"{'model':8}{'path':24}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES)
    details: dict[tuple[str, str, str], list[str]] = {}
    for model in wanted.model or MODEL_NAMES:
        counts: dict[str, Counter[str]] = {}
        for one in compare_model(vectors, model):
            counts.setdefault(one.body.path, Counter())[one.outcome] += 1
            if one.outcome in wanted.show:
                key = (one.outcome, one.body.name, one.detail)
                details.setdefault(key, []).append(model)
        for path, counted in counts.items():
            numbers = "".join(f"{counted[outcome]:>9}" for outcome in OUTCOMES)
            yield f"{model:8}{path:24}{numbers}"
    for (outcome, name, detail), models in sorted(details.items()):
        yield f"{outcome}: {name} ({', '.join(models)}): {detail}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.engines.compare", description=__doc__)
    parser.add_argument("--engine", choices=("vllm", "sglang"), required=True)
    parser.add_argument("--model", choices=MODEL_NAMES, action="append")
    parser.add_argument("--show", choices=OUTCOMES, action="append")
    wanted = parser.parse_args()
    wanted.show = wanted.show or [DIFFER, NONE]
    for path in vector_files(wanted.engine):
        vectors = read_vectors(path)
        for line in _lines(wanted.engine, vectors["version"], vectors, wanted):
            print(line)


if __name__ == "__main__":
    main()
