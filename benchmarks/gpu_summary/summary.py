"""The page of a run of `gpu.sh`: every part's outcome, the tests, the costs."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from ..core.files import write_json, write_text
from ..cost.report import KINDS, read, table

LOG_LINES = 30  # of what a failed part printed


def _parts(folder: Path) -> list[dict[str, Any]]:
    """Every part with its outcome, and the end of what it printed where it failed."""
    found = []
    for line in (folder / "parts.tsv").read_text(encoding="utf-8").splitlines():
        name, status, seconds, limit, command = line.split("\t")
        part: dict[str, Any] = {
            "name": name,
            "seconds": int(seconds),
            "limit": int(limit),
            "command": command,
        }
        part["outcome"] = {"0": "done", "124": "out of time", "137": "out of time"}.get(status, status)
        if status.isdigit() and status not in ("0", "124", "137"):
            part["outcome"] = f"failed ({status})"
        log = folder / f"{name}.log"
        if part["outcome"] != "done" and log.exists():
            part["log"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        found.append(part)
    return found


def tests(path: Path) -> dict[str, Any] | None:
    """Counts and failures of pytest's JUnit file; None where there is none."""
    if not path.exists():
        return None
    cases = list(ElementTree.parse(path).iter("testcase"))
    kinds = {"failed": ("failure", "error"), "skipped": ("skipped",)}
    found: dict[str, Any] = {
        kind: {
            f"{case.get('classname')}::{case.get('name')}": (child.get("message") or "")[:500]
            for case in cases
            for child in case
            if child.tag in tags
        }
        for kind, tags in kinds.items()
    }
    return {"run": len(cases), "passed": len(cases) - sum(map(len, found.values())), **found}


def _tests_text(found: dict[str, Any] | None) -> str:
    if found is None:
        return "Tests: none were run to their end."
    lines = [
        f"Tests: {found['passed']} passed, {len(found['failed'])} failed, {len(found['skipped'])} skipped."
    ]
    lines += [f"- failed: {name}: {why}" for name, why in found["failed"].items()]
    lines += [f"- skipped, {count}: {why}" for why, count in Counter(found["skipped"].values()).items()]
    return "\n".join(lines)


def summary(folder: Path) -> str:
    """Write `summary.json` and `summary.md` from what the parts left; returns the text."""
    parts, result = _parts(folder), tests(folder / "tests.xml")
    about = folder / "environment.json"
    surroundings = json.loads(about.read_text(encoding="utf-8")) if about.exists() else None
    costs = folder / "cost"
    found = {kind: read(costs, kind) for kind in KINDS}
    write_json(
        folder / "summary.json", {"parts": parts, "tests": result, "environment": surroundings, **found}
    )
    lines = ["| part | outcome | seconds | limit |", "| --- | --- | --- | --- |"]
    lines += [f"| {p['name']} | {p['outcome']} | {p['seconds']} | {p['limit']} |" for p in parts]
    where = "environment unknown"
    if surroundings:
        names = (
            ", ".join(device["name"] for device in surroundings["devices"]) or surroundings["hardware"]["cpu"]
        )
        absent = ", ".join(surroundings["missing"]) or "none"
        where = f"{names}; torch {surroundings['versions']['torch']}; missing packages: {absent}"
    text = "\n\n".join(
        [where, "\n".join(lines), _tests_text(result), *([table(costs)] if any(found.values()) else [])]
    )
    write_text(folder / "summary.md", text.rstrip() + "\n")
    return text
