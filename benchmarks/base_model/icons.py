"""Named pictures that are on every machine: the icon fonts in the wheel `qtawesome`, rendered with Pillow.

The wheel's code is not imported; it would ask for Qt.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.files import BenchmarkError, in_share

WHEEL = "qtawesome"
PACKAGES = (WHEEL, "pillow")  # what holds the pictures, and what renders them
PIXELS = 32  # width and height of a picture
POINTS = 28  # the font's size in it
WHITE = 255
HELDOUT_PERCENT = 15  # of the stems
# What names say of how a picture is drawn, and not of what it shows.
STYLES = frozenset({"bold", "fill", "light", "line", "outline", "thin", "variant"})
_REMEDY = "pip install -e '.[bench]', or the two alone: pip install --no-deps qtawesome pillow"


@dataclass(frozen=True)
class IconSet:
    """An icon font and the table of its names, by their files in the wheel."""

    name: str
    font: str
    names: str


MATERIAL = IconSet(
    "Material Design Icons 6.9.96",
    "materialdesignicons6-webfont-6.9.96.ttf",
    "materialdesignicons6-webfont-charmap-6.9.96.json",
)
PHOSPHOR = IconSet("Phosphor 1.3.0", "phosphor-1.3.0.ttf", "phosphor-charmap-1.3.0.json")


@dataclass(frozen=True)
class Icon:
    """A character of an icon font; `name` is lower-case words with single spaces between them."""

    name: str
    character: str

    @property
    def stem(self) -> str:
        """The name without words of style, or the whole name where it has no others."""
        return " ".join(word for word in self.name.split() if word not in STYLES) or self.name

    @property
    def is_held_out(self) -> bool:
        """Whether no training may see it, decided by a hash of its stem: in every set, and in every style."""
        return in_share([self.stem], HELDOUT_PERCENT)


def _folder() -> Path:
    """The folder of the wheel's fonts."""
    spec = importlib.util.find_spec(WHEEL)  # finds the package without running it
    if spec is None or not spec.submodule_search_locations:
        raise BenchmarkError(
            f"pictures are cut from the icon fonts of {WHEEL}, which is not installed: {_REMEDY}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "fonts"


def _file(name: str) -> Path:
    path = _folder() / name
    if not path.is_file():
        raise BenchmarkError(
            f"{WHEEL} is installed in a version without {name}; install the pinned one: {_REMEDY}"
        )
    return path


def icons(of: IconSet) -> list[Icon]:
    """All icons of a set, sorted by name."""
    codes: dict[str, str] = json.loads(_file(of.names).read_text(encoding="utf-8"))
    return [Icon(name.replace("-", " "), chr(int(code, 16))) for name, code in sorted(codes.items())]


def render(of: IconSet, some: Sequence[Icon], points: int = POINTS) -> list[bytes]:
    """Pictures of icons, each PIXELS × PIXELS bytes row by row: ink is 0, paper 255.

    Args:
        of: the set that the icons are from.
        some: the icons.
        points: the font's size in pixels; the icon's own box is in the middle of the picture.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise BenchmarkError(f"icons are rendered with Pillow, which is not installed: {_REMEDY}") from error
    # The basic layout is part of every build of Pillow; the other depends on a library of the system.
    font = ImageFont.truetype(_file(of.font), points, layout_engine=ImageFont.Layout.BASIC)
    made, middle = [], PIXELS // 2
    for icon in some:
        picture = Image.new("L", (PIXELS, PIXELS), WHITE)
        ImageDraw.Draw(picture).text((middle, middle), icon.character, fill=0, font=font, anchor="mm")
        made.append(picture.tobytes())
    return made
