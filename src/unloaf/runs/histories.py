"""What run folders tell of their runs, and runs side by side. Reads text files only; imports no torch."""

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
from unloaf.engine.run_folder import run_of
from unloaf.files.writing import read_text

_MOST_BYTES = 1 << 30  # a line of metrics.jsonl for each of a million steps has a fifth of it


@dataclass(frozen=True)
class RunHistory:
    """A run so far.

    Attributes:
        label: a name that tells it from the others.
        config: its settings.
        epochs: lines of summary.csv, oldest first; a cell without a number is left out.
        result: figures of the finished run, empty before; percent and nats.
        environment: env.json.
    """

    label: str
    config: Config
    epochs: tuple[dict[str, float], ...]
    result: dict[str, float]
    environment: dict[str, Any]

    def curve(self, column: str) -> list[tuple[float, float]]:
        """(epoch, value) where summary.csv has a value."""
        return [(row["epoch"], row[column]) for row in self.epochs if column in row]

    def last(self, column: str) -> float | None:
        """The newest value."""
        values = self.curve(column)
        return values[-1][1] if values else None


def read_histories(runs: Sequence[str | Path]) -> list[RunHistory]:
    """Reads run folders, which may belong to runs that go on; of any other folder all runs in it, by their names.

    Raises:
        ValueError: a folder is no run and has none, or its files cannot be read.
    """
    paths = list(dict.fromkeys(path for run in runs for path in _runs_in(Path(run))))
    names = [path.resolve().name for path in paths]
    return [_read(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)]


def _runs_in(path: Path) -> list[Path]:
    """The run, or the runs of OUTPUT and of the folder above it: OUTPUT is output/train by default."""
    if (path / "args.yaml").exists() or not path.is_dir():
        return [run_of(path)]
    found = [file.parent for pattern in ("[!.]*/args.yaml", "[!.]*/[!.]*/args.yaml") for file in path.glob(pattern)]
    if not found:
        raise ValueError(f"{path} is no run: neither it nor a folder in it has an args.yaml; give runs or their folder")
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


@dataclass(frozen=True)
class RunRow:
    """A run as a line of a table: accuracies in percent, None where there is none.

    Attributes:
        label: of the run.
        model: its network.
        method: how it trains.
        done: whole epochs trained.
        epochs: all that are planned.
        best_top1: best on the validation images.
        best_epoch: when.
        last_top1: the newest.
        test_top1: on the test images, when the run has finished.
        ema_top1: of the moving average, the newest on the validation images.
        subnets_mean: mean over the subnets that are judged each epoch, the newest.
        subnets_min: the worst of them.
        main_reestimated: the main network with batch-norm statistics re-estimated as theirs are, the newest.
        seconds: median time of an epoch, evaluation not included.
    """

    label: str
    model: str
    method: str
    done: int
    epochs: int
    best_top1: float | None
    best_epoch: int | None
    last_top1: float | None
    test_top1: float | None
    ema_top1: float | None
    subnets_mean: float | None
    subnets_min: float | None
    main_reestimated: float | None
    seconds: float | None


def run_row(history: RunHistory) -> RunRow:
    """The run as a line of a table."""
    tops = history.curve("eval_top1")
    best = max(tops, key=lambda pair: pair[1]) if tops else None
    times = [seconds for _, seconds in history.curve("time")]
    return RunRow(
        label=history.label,
        model=history.config.model,
        method=history.config.method,
        done=int(history.last("epoch") or 0),
        epochs=history.config.epochs,
        best_top1=best[1] if best else None,
        best_epoch=int(best[0]) if best else None,
        last_top1=history.last("eval_top1"),
        test_top1=history.result.get("test_top1"),
        ema_top1=history.last("ema_top1"),
        main_reestimated=history.last("main_top1_reestimated"),
        subnets_mean=history.last("subnets_top1_mean"),
        subnets_min=history.last("subnets_top1_min"),
        seconds=statistics.median(times) if times else None,
    )


def table_of(rows: Sequence[RunRow]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the comparison; columns that no run has are left out.

    >>> rows = [RunRow("a", "cifar/resnet20", "st", 2, 30, 91.5, 2, 91.5, None, None, None, None, None, 3.25)]
    >>> table_of(rows)[1]
    [['a', 'cifar/resnet20', 'st', '2/30', '91.50 (2)', '91.50', '3.2']]
    """
    columns: dict[str, list[str]] = {
        "run": [row.label for row in rows],
        "model": [row.model for row in rows],
        "method": [row.method for row in rows],
        "epochs": [f"{row.done}/{row.epochs}" for row in rows],
        "best val\n% (epoch)": [
            "–" if row.best_top1 is None else f"{row.best_top1:.2f} ({row.best_epoch})" for row in rows
        ],
        "last val\n%": [_percent(row.last_top1) for row in rows],
        "test\n%": [_percent(row.test_top1) for row in rows],
        "EMA val\n%": [_percent(row.ema_top1) for row in rows],
        "mean\nsubnet %": [_percent(row.subnets_mean) for row in rows],
        "worst\nsubnet %": [_percent(row.subnets_min) for row in rows],
        "main re-\nestimated %": [_percent(row.main_reestimated) for row in rows],
        "s per\nepoch": ["–" if row.seconds is None else f"{row.seconds:.1f}" for row in rows],
    }
    shown = {head: cells for head, cells in columns.items() if set(cells) != {"–"}}
    return list(shown), [list(line) for line in zip(*shown.values(), strict=True)]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


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
