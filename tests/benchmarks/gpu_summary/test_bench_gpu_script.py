"""The GPU script: its parts and limits, what it leaves, and a whole run without a GPU."""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks.__main__ import make_parser
from benchmarks.core.files import REPOSITORY, write_json
from benchmarks.gpu_summary import machine, summary

SCRIPT = REPOSITORY / "benchmarks" / "gpu.sh"


def run(*arguments, timeout=60, **surroundings):
    """The script with this Python, from another folder."""
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    env = {**os.environ, "PYTHON": sys.executable, **surroundings}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd="/")


def parts(text):
    return {
        name: int(limit)
        for name, limit in re.findall(r"^([\w-]+) \(at most (\d+) s\)", text, flags=re.MULTILINE)
    }


def test_a_dry_run_names_every_part_and_writes_nothing(tmp_path):
    done = run("--dry-run", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    limits = parts(done.stdout)
    wanted = ["environment", "tests", "llama-8b", "llama-8b-peers", "scaling", "llama-1b", "report"]
    assert [name for name in limits if name != "llama-8b-nf4"] == wanted
    assert "llama-8b-nf4" in done.stdout
    assert sum(limits.values()) < 640  # what the parts may take; the script stops them all after 490 s
    assert "--quantize nf4" in done.stdout or "bitsandbytes is not installed" in done.stdout
    assert f"--out {tmp_path}/out/cost" in done.stdout
    assert not (tmp_path / "out").exists()


def test_every_command_of_it_is_understood():
    for device in ("cuda", "cpu"):
        text = run("--dry-run", "out", GPU_SH_DEVICE=device).stdout
        commands = re.findall(r"-m benchmarks ((?:cost|report) .*)", text)
        assert len(commands) >= 4
        for command in commands:
            make_parser().parse_args(command.split())


def test_a_part_that_fails_is_recorded_and_the_next_one_runs(tmp_path):
    """A Python that only knows the summary: every other part fails."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *gpu_summary\\ summary*) exec {sys.executable} "$@";; esac\n'
        'echo "no such luck"; exit 3\n'
    )
    python.chmod(0o755)
    done = run(tmp_path / "out", PYTHON=str(python), GPU_SH_DEVICE="cpu")
    assert done.returncode == 1
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [part["name"] for part in found["parts"]] == [
        "environment",
        "tests",
        "tiny",
        "tiny-nf4",
        "scaling",
        "report",
    ]
    assert {part["outcome"] for part in found["parts"]} == {"failed (3)"}
    assert {tuple(part["log"]) for part in found["parts"]} == {("no such luck",)}
    assert found["tests"] is None
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| tiny | failed (3) |" in text
    assert "environment unknown" in text
    assert text.strip() in done.stdout


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_devices" name="test_a[cuda]"/>
<testcase classname="tests.test_devices" name="test_b[cuda]">
<failure message="AssertionError: 1 &lt; 0">long</failure></testcase>
<testcase classname="tests.test_devices" name="test_c[cuda]"><skipped message="needs two GPUs"/></testcase>
</testsuite></testsuites>"""


def test_the_summary_holds_everything(tmp_path):
    (tmp_path / "parts.tsv").write_text(
        "environment\t0\t3\t25\tpython env\ntests\t124\t100\t100\tpytest\nllama-8b-nf4\tleft out: no "
        "package\t0\t0\t\n"
    )
    (tmp_path / "tests.log").write_text("\n".join(f"line {i}" for i in range(99)))
    (tmp_path / "tests.xml").write_text(JUNIT)
    write_json(tmp_path / "environment.json", machine.describe())
    text = summary.summary(tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [part["outcome"] for part in found["parts"]] == ["done", "out of time", "left out: no package"]
    assert found["parts"][1]["log"][-1] == "line 98"
    assert len(found["parts"][1]["log"]) == summary.LOG_LINES
    assert found["tests"]["passed"] == 1
    assert "Tests: 1 passed, 1 failed, 1 skipped." in text
    assert "- failed: tests.test_devices::test_b[cuda]: AssertionError: 1 < 0" in text
    assert "- skipped, 1: needs two GPUs" in text


def test_what_is_not_installed_is_named_and_left_out(monkeypatch):
    there = {"torch": "2.11.0", "peft": "0.21.2"}
    monkeypatch.setattr(machine.environment, "installed_version", there.get)
    assert machine.optimizers() == ["grit", "riemannian", "muon", "grit-eigenbasis", "grit-paper"]
    assert {"bitsandbytes", "pytorch_optimizer", "heavyball"} <= set(machine.missing())


@pytest.mark.slow
def test_a_whole_run_without_a_gpu(tmp_path):
    done = run(tmp_path, timeout=1100, GPU_SH_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "summary.json").read_text())
    assert {part["name"]: part["outcome"] for part in found["parts"]} == dict.fromkeys(
        ["environment", "tests", "tiny", "tiny-nf4", "scaling", "report"], "done"
    )
    assert found["tests"]["failed"] == {}
    assert found["tests"]["passed"] > 40
    assert {result["optimizer"] for result in found["cost"]} == set(machine.optimizers())
    assert len(found["scaling"]) == 1
