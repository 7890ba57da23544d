"""A short run of each fuzz target, and the inputs of its corpus. `make fuzz` runs them for long."""

import subprocess
import sys
from pathlib import Path

import pytest

from extproc.routing.request import parse_body
from tests.fuzz import targets
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
RUNS = {"bodies": 50_000, "events": 30_000, "templates": 2_000}


@pytest.mark.parametrize(
    ("name", "file"),
    [(name, path.name) for name in TARGETS for path in sorted((CORPUS / name).iterdir())],
)
def test_each_input_of_the_corpus_keeps_the_promises(name: str, file: str) -> None:
    TARGETS[name]((CORPUS / name / file).read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_no_mutation_of_the_corpus_breaks_a_promise(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz", name),
            *("--runs", str(RUNS[name]), "--seed", "11", "--keep", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"stat::number_of_executed_units: {RUNS[name]}" in done.stderr


def test_a_broken_promise_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    steered = (CORPUS / "bodies" / "steered").read_bytes()

    def keep_all(*arguments: object, **options: int) -> object:
        request = parse_body(*arguments, **options)  # type: ignore[arg-type]
        request.body = steered[1:]
        return request

    monkeypatch.setattr(targets, "parse_body", keep_all)
    with pytest.raises(AssertionError, match="steers the engine"):
        targets.bodies(steered)
