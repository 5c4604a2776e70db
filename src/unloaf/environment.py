"""On what a run runs: hardware, versions, number of processes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("unloaf", "torch", "torchvision", "timm", "accelerate", "numpy", "scikit-learn")


def environment(*, processes: int = 1, device: torch.device | None = None) -> dict[str, Any]:
    """Command, hardware and versions as plain values for JSON; by default of one process, on a GPU if there is one."""
    name = Path(sys.argv[0]).name
    return {
        "command": ["unloaf" if name == "__main__.py" else name, *sys.argv[1:]],  # of `python -m unloaf`
        "hardware": hardware(device),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": {name: _version(name) for name in _PACKAGES},
        "revision": revision(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def revision() -> str | None:
    """The commit of a clone that unloaf runs from, with "-dirty" where files of it were changed; else None."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def bits_depend_on(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for the same bits."""
    return {name: environment[name] for name in ("hardware", "processes", "threads")} | {
        "torch": environment["versions"]["torch"]
    }


def hardware(device: torch.device | None = None) -> str:
    """The processor that trains, in words; by default the GPU if there is one."""
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    if on_gpu:
        return torch.cuda.get_device_name(device)
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
