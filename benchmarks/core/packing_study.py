"""The commands `pack` and `unpack`, for the results of any study."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import Command, Study
from .packing import PACKED, pack, unpack


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")


def _pack(arguments: argparse.Namespace) -> None:
    for folder in arguments.folders:
        print(f"{folder}: {pack(folder)} results packed into {PACKED}")


def _unpack(arguments: argparse.Namespace) -> None:
    for folder in arguments.folders:
        print(f"{folder}: {unpack(folder)} results unpacked")


STUDY = Study(
    (
        Command(
            "pack",
            f"move the results of a study's folder into one {PACKED}, which all commands read",
            _add_arguments,
            _pack,
        ),
        Command("unpack", "make one file per result again", _add_arguments, _unpack),
    )
)
