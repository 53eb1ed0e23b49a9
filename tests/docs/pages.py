"""The project's documents, and what tests read in them: prose, code blocks, tables, links, commands."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TESTS = ROOT / "tests"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def page(name):
    """The text of a document, named from the root."""
    return (ROOT / name).read_text(encoding="utf8")


def words(text):
    """The text with every run of white space as one space: lines may be wrapped anywhere."""
    return " ".join(text.split())


def blocks(text, language):
    """The code blocks of a language."""
    return [code for found, code in _FENCE.findall(text) if found == language]


def without_code(text):
    """The text outside code blocks."""
    return _FENCE.sub("", text)


def rows(text):
    """The cells of all rows of all tables, heads and rules included."""
    return [
        [cell.strip() for cell in line.rstrip()[1:-1].split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]


def row(text, first):
    """The cells of the one row that begins with that cell."""
    (found,) = [cells for cells in rows(text) if cells[0] == first]
    return found


def table(text, heading):
    """The rows of the table whose first column has this heading, by their first cells."""
    after = text.partition(f"| {heading} |")[2].partition("\n\n")[0]
    return {cells[0]: cells for cells in rows(f"| {heading} |{after}\n")[2:]}


def links(text):
    """Relative targets of links and images, the fragment with them."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)) if "://" not in link]


def anchors(text):
    """The fragments that a document's headings answer to, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text, start):
    """The command lines in bash blocks that begin so, continuation lines joined, comments kept."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(blocks(text, "bash")))
    return [line.strip() for line in joined.splitlines() if line.strip().startswith(start)]


def source_of_test(stem):
    """The one test file of that name, wherever it lies."""
    (found,) = TESTS.rglob(f"{stem}.py")
    return found.read_text(encoding="utf8")
