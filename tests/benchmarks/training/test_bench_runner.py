"""A run's process ends with the command that started it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CALLER = """
import sys
from pathlib import Path
from benchmarks.training import runner

runner.PRELOADED.clear()  # nothing to load before the fork

def work(path):
    import os, time
    Path(path).with_suffix(".new").write_text(str(os.getpid()))
    Path(path).with_suffix(".new").rename(path)
    time.sleep(600)

if __name__ == "__main__":
    runner.in_process(work, sys.argv[1])
"""


def until(true: object, what: str, seconds: float = 120.0) -> None:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, f"{what} after {seconds:g} s"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """Whether a process of that number is there and has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.skipif(os.name != "posix", reason="signals of a POSIX system")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_ends_with_the_command_that_started_it(tmp_path: Path, how: signal.Signals) -> None:
    script, noted = tmp_path / "caller.py", tmp_path / "pid"
    script.write_text(CALLER)
    root = Path(__file__).parents[3]
    caller = subprocess.Popen(
        [sys.executable, str(script), str(noted)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.DEVNULL,
    )
    try:
        until(noted.exists, "no run began")
        worker = int(noted.read_text())
        assert runs(worker)
        caller.send_signal(how)
        caller.wait()
        until(lambda: not runs(worker), "the run still goes on")
    finally:
        caller.kill()
