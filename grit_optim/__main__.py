"""The command line ``python -m grit_optim COMMAND``: one module of ``grit_optim.cli`` per command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from grit_optim.cli import options, plot, ranks, watch
from grit_optim.cli.run_log import RunError

COMMANDS = (plot, watch, ranks, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m grit_optim", description="A window onto the curvature and the ranks of LoRA adapters."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    given = parser.parse_args(arguments)
    try:
        given.call(given)
    except (RunError, ImportError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
