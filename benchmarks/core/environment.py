"""What a result depends on besides its configuration: versions, hardware, commit."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
import timeit
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .files import REPOSITORY, BenchmarkError

LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors")
# Times as long as fp32. With AVX2 alone it was above 20; emulation that is a little slower needs no warning.
SLOW_BF16 = 4.0


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def require_versions(distributions: list[str]) -> dict[str, str]:
    """Installed versions; an error that names what is missing and how to get it."""
    found = {name: installed_version(name) for name in distributions}
    missing = [name for name, version in found.items() if version is None]
    if missing:
        raise BenchmarkError(
            f"not installed: {', '.join(missing)}; the benchmark's data are cut from these packages' "
            "sources: pip install -e '.[bench]'"
        )
    return {name: version for name, version in found.items() if version is not None}


def pinned_versions() -> dict[str, str]:
    """Exact pins in pyproject.toml, by lower-case distribution name."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    return {name.lower(): version for name, version in re.findall(r'"([\w.-]+)==([^"]+)"', text)}


def python_version() -> str:
    """Python's version with its patch level, as in "3.11.7"."""
    return platform.python_version()


def versions() -> dict[str, str | None]:
    """Versions of Python, the libraries and grit_optim; None for what is not installed."""
    found = {name: installed_version(name) for name in LIBRARIES}
    return {"python": python_version(), "grit_optim": installed_version("grit-optim"), **found}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def hardware(device: str = "cpu") -> dict[str, Any]:
    """The processor's model, its cores, torch's threads and the accelerator's name."""
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def resolve_device(device: str) -> str:
    """`auto` as cuda where there is one, else cpu; cuda without one is an error."""
    available = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if available else "cpu"
    if device == "cuda" and not available:
        raise BenchmarkError("--device cuda: torch sees no CUDA device; use --device cpu")
    return device


@cache
def bf16_slowdown() -> float:
    """How many times as long a product of matrices takes here in bf16 as in fp32; measured once."""

    def seconds(dtype: torch.dtype) -> float:
        """The shortest of three times; the first call also loads what the product needs."""
        matrix = torch.ones(256, 256, dtype=dtype)
        return min(timeit.repeat(lambda: torch.mm(matrix, matrix), number=1, repeat=3))

    return seconds(torch.bfloat16) / seconds(torch.float32)


def warn_if_bf16_is_slow(precision: str, device: str) -> None:
    """Warn where bf16 takes many times as long as fp32, since the processor emulates it."""
    if precision != "bf16" or device != "cpu":
        return
    slowdown = bf16_slowdown()
    if slowdown > SLOW_BF16:
        warnings.warn(
            f"this processor has no fast bf16 (a product takes {slowdown:.0f} times as long as in fp32), and "
            "the runs asked for are in bf16: use --precision fp32 with another --out, or a processor with "
            "AVX512-BF16, AMX or a GPU",
            stacklevel=2,
        )


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or no repository (an unpacked archive): recorded as unknown
    return done.stdout.strip()


def commit() -> dict[str, Any]:
    """The repository's commit, and whether code differs from it (results being written do not count)."""
    status = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def reset_peak_memory(device: str = "cpu") -> None:
    """Let the peak start again from what is in use now, where the system can (Linux, CUDA)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes(device: str = "cpu") -> int:
    """Peak memory of this process in bytes: allocated on the accelerator where one is used, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # the only figure that reset_peak_memory resets
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
