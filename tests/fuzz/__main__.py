"""Runs one target: `python -m tests.fuzz bodies [--seconds S] [--runs N] [--seed S]`.

Inputs that reach new code are kept in `--keep`, a folder outside the checkout; the small corpus in
the checkout is only read. An input that breaks a promise, takes ten seconds or two gigabytes ends
the run. Its bytes are then in a file, which the output names and which repeats the fault:
`python -m tests.fuzz bodies --input FILE`.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Final

import atheris

HERE: Final = Path(__file__).parent
_MAX_BYTES: Final = {"bodies": 2000, "events": 2000, "templates": 600}
_INPUT_SECONDS: Final = 10
_MEMORY_MEGABYTES: Final = 2048


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(_MAX_BYTES))
    parser.add_argument("--seconds", type=int, default=0, help="0: no limit")
    parser.add_argument("--runs", type=int, default=-1, help="-1: no limit")
    parser.add_argument("--seed", type=int, default=0, help="0: a new one each time")
    parser.add_argument("--keep", type=Path, help="folder for inputs that reach new code")
    parser.add_argument("--input", type=Path, help="run this file alone")
    options = parser.parse_args()
    # What is imported here is watched for new paths.
    with atheris.instrument_imports(include=["extproc", "jinja2"]):
        targets = importlib.import_module("tests.fuzz.targets")
    target = targets.TARGETS[options.target]
    if options.input is not None:
        target(options.input.read_bytes())
        return
    keep = options.keep or Path(tempfile.mkdtemp(prefix=f"fuzz-{options.target}-"))
    keep.mkdir(parents=True, exist_ok=True)
    atheris.Setup(
        [
            sys.argv[0],
            str(keep),
            str(HERE / "corpus" / options.target),
            f"-dict={HERE / 'dictionaries' / options.target}.txt",
            f"-artifact_prefix={keep}/",
            f"-max_len={_MAX_BYTES[options.target]}",
            f"-max_total_time={options.seconds}",
            f"-runs={options.runs}",
            f"-seed={options.seed}",
            f"-timeout={_INPUT_SECONDS}",
            f"-rss_limit_mb={_MEMORY_MEGABYTES}",
            "-print_final_stats=1",
        ],
        target,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
