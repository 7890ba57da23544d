"""The command line: one function per sub-command.

Exit codes: 0 good (SIGTERM included), 2 bad configuration or usage, 3 a request without tokens, 1
anything else.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from extproc import __version__, tokens_command
from extproc.app import run_app
from extproc.config.files import file_problems
from extproc.config.json_schema import json_schema_text
from extproc.config.loading import load_config
from extproc.config.warnings import config_warnings
from extproc.demo import cli as demo_cli
from extproc.encoders import load_encoders
from extproc.envoy_config import bootstrap_problems, merge_yaml, render_yaml
from extproc.errors import ConfigError
from extproc.logs import configure_logging
from extproc.simulator import cli as simulator_cli
from extproc.sources import name_warnings

__all__ = ["main"]

_EXIT_GOOD = 0
_EXIT_FAILED = 1
_EXIT_BAD_CONFIG = 2


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `extproc` command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="extproc", description="LLM request router behind Envoy.")
    parser.add_argument("--version", action="version", version=f"extproc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, text in (
        ("serve", _serve, "run the ext_proc service"),
        ("check", _check, "check a configuration and print all its problems"),
        ("envoy-config", _envoy_config, "render Envoy's bootstrap from a configuration"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--config", required=True, type=Path, metavar="F", help="YAML or TOML file"
        )
        command.set_defaults(run=run)
        if name == "envoy-config":
            _add_envoy_arguments(command)
    for name, module, text in (
        ("simulate", simulator_cli, "run a simulated SGLang worker, no GPU needed"),
        ("demo", demo_cli, "run Envoy, the service and simulated workers, and send traffic"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    text = "print the token ids of a request, as an engine computes them"
    command = commands.add_parser("tokens", help=text, description=text)
    tokens_command.add_arguments(command)
    command.set_defaults(run=tokens_command.run)
    text = "print the JSON Schema of the configuration, for editors"
    command = commands.add_parser("schema", help=text, description=text)
    command.set_defaults(run=_schema)
    options = parser.parse_args(arguments)
    run_command: Callable[[argparse.Namespace], int] = options.run
    return run_command(options)


def _add_envoy_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", type=Path, metavar="F", help="file to write instead of stdout")
    command.add_argument(
        "--merge-into",
        type=Path,
        metavar="F",
        help="existing configuration of Envoy, to which the parts of this service are added",
    )
    command.add_argument(
        "--route",
        action="append",
        default=[],
        metavar="NAME",
        help="with --merge-into: name of a route that leads to the workers; may be repeated",
    )


def _serve(options: argparse.Namespace) -> int:
    # A SIGHUP means a reload. Until the file can be reloaded, it must not end the process; the
    # service looks at the file again when it runs.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        config = load_config(options.config)
        if problems := file_problems(config):
            raise ConfigError(problems)
        configure_logging(config.observability)
        encoders = load_encoders(config)
    except ConfigError as error:
        return _report(error, _EXIT_BAD_CONFIG)
    try:
        run_app(config, encoders, options.config)
    except ConfigError as error:
        # The configuration is valid, but it fails on this machine: a port in use, for example.
        return _report(error, _EXIT_FAILED)
    return _EXIT_GOOD


def _check(options: argparse.Namespace) -> int:
    try:
        problems: list[str] = []
        try:
            config = load_config(options.config)
        except ConfigError as error:
            if error.partial is None:
                raise
            config, problems = error.partial, error.problems
        more = [*file_problems(config), *bootstrap_problems(config)]
        try:
            load_encoders(config)
        except ConfigError as error:
            more += error.problems
        # Report each key once.
        named = {problem.partition(":")[0] for problem in problems}
        problems += [problem for problem in more if problem.partition(":")[0] not in named]
        if problems:
            raise ConfigError(problems)
    except ConfigError as error:
        return _report(error, _EXIT_BAD_CONFIG)
    for warning in asyncio.run(name_warnings(config)):
        sys.stderr.write(f"warning: {warning}\n")
    for one in config_warnings(config):
        sys.stderr.write(f"warning: {one}\n")
    _print(f"{options.config}: good")
    return _EXIT_GOOD


def _envoy_config(options: argparse.Namespace) -> int:
    if bool(options.route) != (options.merge_into is not None):
        sys.stderr.write("--merge-into and --route are needed together\n")
        return _EXIT_BAD_CONFIG
    try:
        config = load_config(options.config)
        if options.merge_into is None:
            text = render_yaml(config)
        else:
            text = merge_yaml(config, options.merge_into, options.route)
    except ConfigError as error:
        return _report(error, _EXIT_BAD_CONFIG)
    if options.output is None:
        sys.stdout.write(text)
        return _EXIT_GOOD
    try:
        options.output.write_text(text, encoding="utf-8")
    except OSError as error:
        sys.stderr.write(f"--output: cannot write {options.output}: {error.strerror}\n")
        return _EXIT_FAILED
    return _EXIT_GOOD


def _schema(_: argparse.Namespace) -> int:
    sys.stdout.write(json_schema_text())
    return _EXIT_GOOD


def _report(error: ConfigError, code: int) -> int:
    for problem in error.problems:
        # A file can hold text that a terminal cannot show.
        shown = problem.encode(errors="backslashreplace").decode()
        sys.stderr.write(f"{shown}\n")
    return code


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
