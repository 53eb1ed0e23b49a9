"""Command line: ``python -m grit_optim COMMAND``; each command has a module of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from grit_optim import ranks_command

COMMANDS = {"ranks": ranks_command}
"""Name to a module with ``HELP``, ``add_arguments(parser)`` and ``run(arguments)``, which raises ValueError to refuse input."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, one subparser per command."""
    parser = argparse.ArgumentParser(prog="python -m grit_optim")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for input that cannot be used."""
    arguments = make_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
