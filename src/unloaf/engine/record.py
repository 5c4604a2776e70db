"""The run folder: what was run, on what, and how it went."""

from __future__ import annotations

import csv
import json
import os
import platform
import sys
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from unloaf.engine.config import Config, dump_config
from unloaf.engine.fit import EpochRow, StepRow

_COLUMNS = ("epoch", "time", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr")
_PACKAGES = ("unloaf", "torch", "torchvision", "timm", "accelerate", "numpy", "scikit-learn")


class RunFolder:
    """A new folder DIR/NAME with args.yaml, env.json, summary.csv, metrics.jsonl and log.txt.

    Every line is on the disk when its method returns, so a killed run keeps its history.

    Args:
        config: gives output and name; without a name it is time-model-method.

    Raises:
        ValueError: the folder exists already or cannot be made.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output) / (config.name or _name(config))
        try:
            self.path.mkdir(parents=True)
        except FileExistsError as error:
            raise ValueError(f"run folder {self.path} exists; give another --name, or remove it") from error
        except OSError as error:
            raise ValueError(
                f"cannot make the run folder {self.path}: {error.strerror}; give another --output"
            ) from error
        self._write("args.yaml", dump_config(config))
        self._write("env.json", json.dumps(environment(), indent=2) + "\n")
        self._append_csv(_COLUMNS)

    def epoch(self, row: EpochRow) -> None:
        """Adds an epoch to summary.csv and metrics.jsonl."""
        accuracy = (row.eval.loss, row.eval.top1, row.eval.top5) if row.eval else ("", "", "")
        self._append_csv((row.epoch, round(row.seconds, 3), row.train_loss, *accuracy, row.lr))
        self._event("epoch", asdict(row))

    def step(self, row: StepRow) -> None:
        """Adds a step to metrics.jsonl."""
        self._event("step", {**asdict(row), "subnets": [str(subnet) for subnet in row.subnets]})

    def result(self, values: dict[str, Any]) -> None:
        """Adds the final figures to metrics.jsonl."""
        self._event("result", values)

    def log(self, line: str) -> None:
        """Adds a line, with the time, to log.txt."""
        self._write("log.txt", f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")

    def _event(self, kind: str, values: dict[str, Any]) -> None:
        self._write("metrics.jsonl", json.dumps({"event": kind, **values}) + "\n")

    def _append_csv(self, values: tuple[Any, ...]) -> None:
        with (self.path / "summary.csv").open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(values)

    def _write(self, name: str, text: str) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(text)


def _name(config: Config) -> str:
    return f"{datetime.now():%Y%m%d-%H%M%S}-{config.model.replace('/', '-')}-{config.method}"


def environment() -> dict[str, Any]:
    """Command, hardware and versions, as plain values for JSON."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": {name: _version(name) for name in _PACKAGES},
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def hardware() -> str:
    """The processor that trains, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
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
