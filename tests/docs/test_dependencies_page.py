"""The page on dependencies has a row for every package of pyproject.toml, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
EXTRA = re.compile(r"^([\w-]+) = \[(.*?)\]$", flags=re.MULTILINE | re.DOTALL)


def required():
    """Packages of pyproject.toml, each with the extras that name it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    text = text[text.index("dependencies = [") : text.index("[tool.")]
    found = {}
    for extra, listed in EXTRA.findall(text):
        for package in re.findall(r'"([\w-]+)[=>]=', listed):
            found.setdefault(package, set()).add("always" if extra == "dependencies" else extra)
    return found


def described():
    """Packages of the page, each with the extras of its row."""
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf8")
    section = page[page.index("## Packages\n") : page.index("## Code that")]
    rows = re.findall(r"^\| (`.+?`) \| (.+?) \| (.+) \|$", section, flags=re.MULTILINE)
    assert all(len(why) > 5 for _, _, why in rows)
    return {
        package: set(extras.split(", "))
        for packages, extras, _ in rows
        for package in re.findall(r"`([\w-]+)`", packages)
    }


def test_every_package_has_a_reason_and_its_extras():
    assert len(described()) > 20
    assert described() == required()
