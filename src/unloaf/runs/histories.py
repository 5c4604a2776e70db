"""What run folders say of their runs, and runs side by side. Reads text files only; imports no torch."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from unloaf.config import Config, load_config
from unloaf.config.figures import FIGURES, Figures
from unloaf.engine.run_folder import run_of
from unloaf.files.lock import is_locked
from unloaf.files.writing import read_text

_MOST_BYTES = 1 << 30  # a line of metrics.jsonl for each of a million steps has a fifth of it


class SubnetFigures(NamedTuple):
    """The figure that decides, of the subnets that were evaluated after an epoch."""

    epoch: int
    worst: float
    mean: float
    best: float


@dataclass(frozen=True)
class RunHistory:
    """A run so far."""

    label: str  # a name that tells it from the others
    config: Config
    epochs: tuple[dict[str, float], ...]  # lines of summary.csv, oldest first; a cell without a number is left out
    result: dict[str, float]  # figures of the finished run, empty before; percent and nats
    environment: dict[str, Any]  # env.json
    data: dict[str, Any] = field(default_factory=dict)  # data.json
    training: bool = False  # a process holds its folder
    subnets: tuple[SubnetFigures, ...] = ()  # oldest first
    last_subnets: dict[str, float] = field(default_factory=dict)  # the figure of each after the newest evaluation
    # By the epoch the mean of each loss term over its logged steps, in nats; terms of subnets as "subnets", their sum.
    terms: dict[int, dict[str, float]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()  # what its files should say and do not

    @property
    def state(self) -> str:
        """Whether it is finished, in progress, or neither: then it can be resumed."""
        return "finished" if self.result else "in progress" if self.training else "stopped"

    def curve(self, column: str) -> list[tuple[float, float]]:
        """(epoch, value) where summary.csv has a value."""
        return [(row["epoch"], row[column]) for row in self.epochs if column in row]

    def last(self, column: str) -> float | None:
        """The newest value."""
        values = self.curve(column)
        return values[-1][1] if values else None

    @property
    def seconds(self) -> list[tuple[int, float]]:
        """(epoch, seconds of training up to its end), as far as no epoch is missing; validation not included."""
        found: list[tuple[int, float]] = []
        for number, row in enumerate(self.epochs, 1):
            if row["epoch"] != number or "time" not in row:
                break
            found.append((number, row["time"] + (found[-1][1] if found else 0.0)))
        return found


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
    for history in histories[1:]:
        _check_same_data(histories[0], history)
    return histories


def _check_same_data(first: RunHistory, other: RunHistory) -> None:
    recorded = bool(first.data and other.data)  # of a run that has just begun there is nothing yet
    pairs = zip(_data_of(first, recorded=recorded), _data_of(other, recorded=recorded), strict=True)
    for name, (mine, others) in zip(("data set", "classes"), pairs, strict=True):
        if mine != others:
            raise ValueError(
                f"{first.label} has {name} {_in_short(mine)}, {other.label} {_in_short(others)}: their figures cannot "
                "be compared; give runs of the same data"
            )


def _data_of(history: RunHistory, *, recorded: bool) -> tuple[Any, Any]:
    """Name and classes of its data."""
    if not recorded:
        return history.config.dataset, history.config.num_classes
    names, count = history.data.get("class_names"), history.data.get("num_classes")
    return history.data.get("dataset"), names if isinstance(names, list) else count


def _in_short(value: Any) -> str:
    text = f"{len(value)} ({', '.join(map(str, value))})" if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
    training = is_locked(path)
    rows, missing = _epochs(path, training=training)
    events, cut = _events(path, training=training)
    last = [event for event in events if event.get("event") == "result"][-1:]
    result = {name: float(value) for event in last for name, value in event.items() if isinstance(value, (int, float))}
    environment, data = (_event("".join(_lines(path / name))) for name in ("env.json", "data.json"))
    missing += cut + ([] if environment else ["env.json: command, hardware and versions are not known"])
    if result and len(rows) < config.epochs:
        missing.append(f"summary.csv: {len(rows)} of the {config.epochs} epochs of a finished run")
    figures = FIGURES[config.task]
    each = [(event["epoch"], values) for event in events if (values := _subnet_values(event, figures.decisive))]
    return RunHistory(
        label=label,
        config=config,
        epochs=rows,
        result=result,
        environment=environment,
        data=data,
        training=training,
        subnets=tuple(_subnet_figures(epoch, values, figures) for epoch, values in each),
        last_subnets=each[-1][1] if each else {},
        terms=_terms(events),
        missing=tuple(missing),
    )


def _epochs(path: Path, *, training: bool) -> tuple[tuple[dict[str, float], ...], list[str]]:
    """The lines of summary.csv that are whole, and what is missing of the others."""
    try:
        found = list(map(_numbers, csv.DictReader(_lines(path / "summary.csv"))))
    except csv.Error as error:
        raise ValueError(f"cannot read {path / 'summary.csv'}: {error}") from error
    rows = tuple(filter(None, found))
    bad = [number for number, row in enumerate(found, 2) if not row]
    if training and bad and bad[-1] == len(found) + 1:
        bad.pop()  # it is being written
    missing = [f"summary.csv: line {_listed(bad)} cannot be read"] if bad else []
    numbers = {int(row["epoch"]) for row in rows}
    gaps = sorted(set(range(1, max(numbers, default=0))) - numbers)
    return rows, missing + ([f"summary.csv: epoch {_listed(gaps)} is missing"] if gaps else [])


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")


def _events(path: Path, *, training: bool) -> tuple[list[dict[str, Any]], list[str]]:
    lines = _lines(path / "metrics.jsonl")
    events = list(map(_event, lines))
    bad = [number for number, event in enumerate(events, 1) if not event]
    if training and bad and bad[-1] == len(lines):
        bad.pop()
    return events, [f"metrics.jsonl: line {_listed(bad)} cannot be read"] if bad else []


def _subnet_values(event: Mapping[str, Any], decisive: str) -> dict[str, float]:
    """Of an evaluation of subnets, those whose figure is a number; nothing of another event."""
    if event.get("event") != "subnets" or not isinstance(event.get("epoch"), int):
        return {}
    found = event.get(decisive)
    if not isinstance(found, dict):
        return {}
    return {name: float(value) for name, value in found.items() if type(value) in (float, int)}


def _subnet_figures(epoch: int, values: Mapping[str, float], figures: Figures) -> SubnetFigures:
    low, high, mean = min(values.values()), max(values.values()), math.fsum(values.values()) / len(values)
    worst, best = (high, low) if figures.lower_is_better else (low, high)
    return SubnetFigures(epoch, worst, mean, best)


def _terms(events: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    steps: dict[int, list[dict[str, float]]] = {}
    for event in events:
        epoch, terms = event.get("epoch"), event.get("terms")
        if event.get("event") != "step" or not isinstance(epoch, int) or not isinstance(terms, dict):
            continue
        known = {name: value for name, value in terms.items() if isinstance(value, (int, float))}
        if len(known) == len(terms) and known:  # a step that is not finite has null
            step = {"main": float(known["main"])} if "main" in known else {}
            if len(known) > len(step):
                step["subnets"] = math.fsum(value for name, value in known.items() if name != "main")
            steps.setdefault(epoch, []).append(step)
    return {
        epoch: {name: statistics.fmean(step[name] for step in found if name in step) for name in found[0]}
        for epoch, found in sorted(steps.items())
    }


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
    """Heads and cells of the comparison, accuracies in percent; columns that no run has are left out, and the
    state where all are finished.

    >>> epochs = ({"epoch": 1.0, "eval_top1": 91.5, "time": 3.25}, {"epoch": 2.0, "eval_top1": 90.0})
    >>> table_of([RunHistory("a", Config(model="cifar/resnet20"), epochs, {}, {})])[1]
    [['a', 'cifar/resnet20', 'st', 'stopped', '2/30', '91.50 (1)', '90.00', '3.2']]
    """
    lines = [_cells(history) for history in histories]
    shown = [head for head in lines[0] if any(line[head] not in ("–", "finished") for line in lines)]
    return shown, [[line[head] for head in shown] for line in lines]


def _cells(history: RunHistory) -> dict[str, str]:
    figures = FIGURES[history.config.task]
    chief, unit = figures.decisive, figures.head
    tops, times = history.curve(f"eval_{chief}"), [seconds for _, seconds in history.curve("time")]
    epoch, best = max(tops, key=lambda pair: figures.score(pair[1])) if tops else (0, None)
    newest = {
        f"last val\n{unit}": f"eval_{chief}",
        f"EMA val\n{unit}": f"ema_{chief}",
        f"mean subnet\n{unit}": f"subnets_{chief}_mean",
        f"worst subnet\n{unit}": f"subnets_{chief}_{figures.worst_of}",
        f"main re-estimated\n{unit}": f"main_{chief}_reestimated",
    }
    cells = {
        "run": history.label,
        "model": history.config.model,
        "method": history.config.method,
        "state": history.state,
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


def cautions(histories: Sequence[RunHistory]) -> list[str]:
    """What a reader may not miss, a line each: runs that are not finished, records with gaps, other images.

    >>> cautions([RunHistory("a", Config(epochs=9), ({"epoch": 1.0},), {}, {}, training=True)])
    ['a is in progress: 1 of 9 epochs so far']
    """
    found = []
    for history in histories:
        done, asked = f"{history.last('epoch') or 0:.0f}", history.config.epochs
        if history.state == "in progress":
            found.append(f"{history.label} is in progress: {done} of {asked} epochs so far")
        elif history.state == "stopped" and done == str(asked):
            found.append(
                f"{history.label} has all its {asked} epochs, but no result: what was found at its end is missing"
            )
        elif history.state == "stopped":
            found.append(f"{history.label} is not finished: it stopped after {done} of {asked} epochs")
        found += [f"{history.label}: {line}" for line in history.missing]
    sums: dict[str, list[str]] = {}
    for history in histories:
        if checksum := _checksum(history):
            sums.setdefault(checksum, []).append(history.label)
    if len(sums) > 1:
        listed = "; ".join(", ".join(labels) for labels in sums.values())
        found.append(f"the validation images are not the same in all runs, but in each of these groups: {listed}")
    return found


def _checksum(history: RunHistory) -> str:
    splits = history.data.get("splits")
    val = splits.get("val") if isinstance(splits, dict) else None
    return str(val.get("sha256", "")) if isinstance(val, dict) and val.get("images") else ""
