"""``python -m grit_optim options``: print every option of GritOptimizer, with its default and its meaning."""

from __future__ import annotations

import argparse

from grit_optim.options.documentation import markdown


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command ``options`` to a command line."""
    text = "print every option of GritOptimizer with its default and its meaning: the page docs/options.md"
    commands.add_parser("options", help=text, description=text).set_defaults(call=show)


def show(arguments: argparse.Namespace) -> None:
    """Print the page."""
    print(markdown(), end="")
