"""What run folders say of their runs, and runs side by side. Reads text files only; imports no torch."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unloaf.config import Config, load_config
from unloaf.config.figures import FIGURES, Figures
from unloaf.engine.run_folder import run_of
from unloaf.files.writing import read_text

_MOST_BYTES = 1 << 30  # a line of metrics.jsonl for each of a million steps has a fifth of it


@dataclass(frozen=True)
class RunHistory:
    """A run so far."""

    label: str  # a name that tells it from the others
    config: Config
    epochs: tuple[dict[str, float], ...]  # lines of summary.csv, oldest first; a cell without a number is left out
    result: dict[str, float]  # figures of the finished run, empty before; percent and nats
    environment: dict[str, Any]  # env.json

    def curve(self, column: str) -> list[tuple[float, float]]:
        """(epoch, value) where summary.csv has a value."""
        return [(row["epoch"], row[column]) for row in self.epochs if column in row]

    def last(self, column: str) -> float | None:
        """The newest value."""
        values = self.curve(column)
        return values[-1][1] if values else None


def read_histories(runs: Sequence[str | Path]) -> list[RunHistory]:
    """Reads run folders, which may belong to running trainings; of any other folder all runs in it, by their names.

    Raises:
        ValueError: a folder is not a run and has none, its files cannot be read, or the runs are of several tasks.
    """
    paths = list(dict.fromkeys(path for run in runs for path in _runs_in(Path(run))))
    names = [path.resolve().name for path in paths]
    labels = [name if names.count(name) == 1 else str(path) for path, name in zip(paths, names, strict=True)]
    histories = [_read(path, label) for path, label in zip(paths, labels, strict=True)]
    tasks = {history.config.task: history.label for history in histories}
    if len(tasks) > 1:
        found = ", ".join(f"{label} ({task})" for task, label in tasks.items())
        raise ValueError(f"the runs are of several tasks, whose figures cannot be compared: {found}; give those of one")
    return histories


def _runs_in(path: Path) -> list[Path]:
    """The run, or the runs of OUTPUT and of the folder above it: OUTPUT is output/train by default."""
    if (path / "args.yaml").exists() or not path.is_dir():
        return [run_of(path)]
    found = [file.parent for pattern in ("[!.]*/args.yaml", "[!.]*/[!.]*/args.yaml") for file in path.glob(pattern)]
    if not found:
        raise ValueError(f"{path} is not a run: neither it nor a folder in it has args.yaml; give runs or their folder")
    return sorted(found)


def _read(path: Path, label: str) -> RunHistory:
    config = load_config(path / "args.yaml")
    try:
        epochs = tuple(filter(None, map(_numbers, csv.DictReader(_lines(path / "summary.csv")))))
    except csv.Error as error:
        raise ValueError(f"cannot read {path / 'summary.csv'}: {error}") from error
    events = [event for event in map(_event, _lines(path / "metrics.jsonl")) if event.get("event") == "result"]
    last = events[-1] if events else {}
    result = {name: float(value) for name, value in last.items() if isinstance(value, (int, float))}
    return RunHistory(label, config, epochs, result, _event("".join(_lines(path / "env.json"))))


def _lines(path: Path) -> list[str]:
    """Lines of a file that may not be there yet."""
    try:
        return read_text(path, limit=_MOST_BYTES).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _event(line: str) -> dict[str, Any]:
    """A line of JSON; empty where it is being written just now."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _numbers(row: Mapping[Any, Any]) -> dict[str, float]:
    """The numbers of a line; empty where the line is being written just now."""
    values = {name: float(text) for name, text in row.items() if name and isinstance(text, str) and _is_number(text)}
    return values if "epoch" in values and None not in row.values() else {}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def table_of(histories: Sequence[RunHistory]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the comparison, accuracies in percent; columns that no run has are left out.

    >>> epochs = ({"epoch": 1.0, "eval_top1": 91.5, "time": 3.25}, {"epoch": 2.0, "eval_top1": 90.0})
    >>> table_of([RunHistory("a", Config(model="cifar/resnet20"), epochs, {}, {})])[1]
    [['a', 'cifar/resnet20', 'st', '2/30', '91.50 (1)', '90.00', '3.2']]
    """
    lines = [_cells(history) for history in histories]
    shown = [head for head in lines[0] if any(line[head] != "–" for line in lines)]
    return shown, [[line[head] for head in shown] for line in lines]


def _cells(history: RunHistory) -> dict[str, str]:
    figures = FIGURES[history.config.task]
    chief, unit = figures.decisive, figures.unit
    tops, times = history.curve(f"eval_{chief}"), [seconds for _, seconds in history.curve("time")]
    epoch, best = max(tops, key=lambda pair: figures.score(pair[1])) if tops else (0, None)
    newest = {
        f"last val\n{unit}": f"eval_{chief}",
        f"EMA val\n{unit}": f"ema_{chief}",
        f"mean\nsubnet {unit}": f"subnets_{chief}_mean",
        f"worst\nsubnet {unit}": f"subnets_{chief}_{figures.worst_of}",
        f"main re-\nestimated {unit}": f"main_{chief}_reestimated",
    }
    cells = {
        "run": history.label,
        "model": history.config.model,
        "method": history.config.method,
        "epochs": f"{history.last('epoch') or 0:.0f}/{history.config.epochs}",
        f"best val\n{unit} (epoch)": "–" if best is None else f"{figures.cell(best)} ({epoch:.0f})",
        f"last val\n{unit}": "",
        f"test\n{unit}": _shown(history.result.get(f"test_{chief}"), figures),
    } | {head: _shown(history.last(column), figures) for head, column in newest.items()}
    return cells | {"s per\nepoch": f"{statistics.median(times):.1f}" if times else "–"}


def _shown(value: float | None, figures: Figures) -> str:
    return "–" if value is None else figures.cell(value)


def differences(histories: Sequence[RunHistory]) -> dict[str, list[str]]:
    """The settings in which the runs differ, with a value for each run; where a run lies is none.

    >>> pair = [RunHistory(str(lr), Config(lr=lr, name=str(lr)), (), {}, {}) for lr in (0.1, 0.2)]
    >>> differences(pair)
    {'lr': ['0.1', '0.2']}
    """
    settings = [asdict(history.config) for history in histories]
    names = [name for name in settings[0] if name not in ("name", "output")]
    columns = {name: [_text(values[name]) for values in settings] for name in names}
    return {name: column for name, column in columns.items() if len(set(column)) > 1}


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value)) or "–"
    return "–" if value is None else str(value)
