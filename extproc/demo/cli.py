"""`extproc demo` (placeholder body below is replaced by the traffic run)."""

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", help="end after one round of traffic")


def run(options: argparse.Namespace) -> int:
    return 0
