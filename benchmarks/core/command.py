"""What a study brings to the command line: its commands, and the report of the results that it writes.

argparse reads the arguments; docs/dependencies.md says why, and how click and typer compare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .files import BenchmarkError


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: the word after `python -m benchmarks`.
        help: one line for the list of commands.
        add_arguments: adds the command's arguments to its parser.
        run: carries the command out.
        description: what `--help` says above the arguments; None for `help` itself.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], None]
    description: str | None = None


@dataclass(frozen=True)
class Study:
    """A study's part of the command line.

    Attributes:
        commands: its commands.
        holds: whether a folder holds results of this study; None where the study writes none to report on.
        report: prints a folder's table, and writes table and figures into the folder.
    """

    commands: tuple[Command, ...]
    holds: Callable[[Path], bool] | None = None
    report: Callable[[Path], object] | None = None


def make_parser(commands: Iterable[Command], prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with one subcommand for each command."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    known = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in commands:
        one = known.add_parser(command.name, help=command.help, description=command.description)
        command.add_arguments(one)
        one.set_defaults(run=command.run)
    return parser


def parser_of(command: Command, prog: str) -> argparse.ArgumentParser:
    """A parser for a single command, for a package that is run on its own."""
    parser = argparse.ArgumentParser(prog=prog, description=command.description or command.help)
    command.add_arguments(parser)
    parser.set_defaults(run=command.run)
    return parser


def call(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name.

    Returns:
        The exit status: 0, 2 after an error that the user can mend, 130 after Ctrl-C.
    """
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        kept = "stopped; what is finished is kept, and the same command goes on from there"
        print(str(stop) or kept, file=sys.stderr)
        return 130
    return 0
