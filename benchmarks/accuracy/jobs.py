"""From tables to runs: the settings of each run, and the records that finished runs leave."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.accuracy.tables import TABLES, Row, Table

from unloaf.config import Config
from unloaf.config.names import current_names
from unloaf.files.writing import write_whole

BASELINE_COST = {"time": 1.0, "flops": 1.0}
# Where a run lies and how it is fed is no part of what was trained.
_PRIVATE = ("output", "name", "data_dir")


class MissingError(Exception):
    """A table cannot be planned before its trials or its costs are there."""


@dataclass(frozen=True)
class Job:
    """One run: a row of a table with one seed."""

    table: Table
    row: Row
    seed: int
    settings: Mapping[str, Any]
    cost: Mapping[str, float]

    @property
    def name(self) -> str:
        """Of its folder."""
        return folder_of(self.table.name, self.row.label, self.seed)

    @property
    def key(self) -> tuple[str, int]:
        """Row and seed, of which a table has one run."""
        return self.row.label, self.seed

    def config(self, data_dir: str | None, output: Path) -> Config:
        """What `unloaf train` trains."""
        folder, _, name = self.name.rpartition("/")
        files = data_dir if self.settings["dataset"] != "digits" else None
        start: dict[str, Any] = {}
        if self.row.backbone is not None:
            start["backbone_weights"] = str(output / folder_of(str(self.table.backbones), self.row.backbone, self.seed))
        return Config(**self.settings, **start, seed=self.seed, data_dir=files, output=str(output / folder), name=name)


def folder_of(table: str, label: str, seed: int) -> str:
    """Where a run lies below the folder of all of them.

    >>> folder_of("camvid-cpu", "ST*", 0)
    'camvid-cpu/ST-0'
    """
    words = "".join(letter if letter.isalnum() else "-" for letter in label.replace("+", "p"))
    return f"{table}/{words.strip('-')}-{seed}"


class Results:
    """The folder of records: a file for each table, a record on each line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def records(self, table: str) -> list[dict[str, Any]]:
        """What finished runs of a table left, in the order of its rows."""
        path = self.folder / f"{table}.json"
        return json.loads(path.read_text(encoding="utf-8"))["records"] if path.exists() else []

    def costs(self, table: str) -> dict[str, dict[str, Any]]:
        """Cost of a step of each row relative to common training, by label."""
        path = self.folder / f"{table}-cost.json"
        return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}

    def add(self, table: Table, record: Mapping[str, Any]) -> None:
        """Puts the record of a run in its place, also for the second time."""
        same = ("row", "seed")
        records = [r for r in self.records(table.name) if any(r[key] != record[key] for key in same)]
        order = [row.label for row in table.rows]
        records = sorted([*records, dict(record)], key=lambda r: (order.index(r["row"]), r["seed"]))
        lines = ",\n".join(json.dumps(r) for r in records)
        text = f'{{"table": "{table.name}", "records": [\n{lines}\n]}}\n'
        write_whole(self.folder / f"{table.name}.json", text)

    def add_cost(self, table: Table, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes the costs of rows, a row on each line."""
        lines = ",\n".join(f"{json.dumps(label)}: {json.dumps(cost)}" for label, cost in rows.items())
        text = f'{{"table": "{table.name}", "rows": {{\n{lines}\n}}}}\n'
        write_whole(self.folder / f"{table.name}-cost.json", text)


def figure(record: Mapping[str, Any]) -> float | None:
    """The decisive figure of a run's main network in percent, whatever its task; None where it diverged.

    >>> figure({"metric": 31.5, "subnets": {}})
    31.5
    """
    return record["top1"] if "top1" in record else record["metric"]


def best_trial(table: Table, records: Sequence[Mapping[str, Any]], method: str) -> dict[str, Any]:
    """Settings of the trial with the highest validation accuracy of the main network; the first one at a tie.

    Raises:
        MissingError: a trial of this method is missing.
    """
    rows = [row for row in table.rows if row.tuned == method]
    tops = {row.label: [figure(r) for r in records if r["row"] == row.label] for row in rows}
    missing = [label for label, found in tops.items() if len(found) < len(table.seeds)]
    if missing:
        raise MissingError(f"{table.name} lacks {'; '.join(missing)}")
    # A run that diverged has no accuracy and is never the best.
    best = max(rows, key=lambda row: statistics.fmean(-1.0 if top is None else top for top in tops[row.label]))
    return dict(best.settings)


def settings_of(table: Table, row: Row, results: Results) -> dict[str, Any]:
    """Settings of a row but for seed, files and the epochs that equal cost takes."""
    tuned: dict[str, Any] = {}
    if table.trials is not None and row.tuned is not None:
        tuned = best_trial(TABLES[table.trials], results.records(table.trials), row.tuned)
    return {**table.common, **tuned, **row.settings}


def plan(table: Table, results: Results, tier: int | None = None, labels: Collection[str] | None = None) -> list[Job]:
    """The runs of a table in the order in which they are to be trained: by tier, then seed, then row.

    Only rows up to this tier and of these labels, where they are given.

    Raises:
        MissingError: trials or costs are missing.
    """
    measured = to_measure(table, tier, labels)
    costs = {row.label: BASELINE_COST for row in measured[:1]} | results.costs(table.name)
    if costless := [row.label for row in measured if row.label not in costs]:
        raise MissingError(f"{table.name} lacks the cost of {'; '.join(costless)}")
    jobs = []
    for row in _asked(table, tier, labels):
        settings = settings_of(table, row, results)
        cost = {name: costs[row.label][name] for name in ("time", "flops")} if row.label in costs else {}
        if row.costs_as:
            times = max(max(costs[label]["time"], costs[label]["flops"]) for label in row.costs_as)
            epochs = math.ceil(settings["epochs"] * times)
            cost = {"time": round(epochs / settings["epochs"], 3)}
            cost["flops"] = cost["time"]
            settings["epochs"] = epochs
        jobs += [Job(table, row, seed, settings, cost) for seed in table.seeds]
    order = [row.label for row in table.rows]
    return sorted(jobs, key=lambda job: (job.row.tier, job.seed, order.index(job.row.label)))


def to_measure(table: Table, tier: int | None = None, labels: Collection[str] | None = None) -> list[Row]:
    """Rows whose cost is measured, the baseline first; trials and networks trained alone have no method to compare."""
    if not (table.costed or any(row.costs_as for row in table.rows)):
        return []
    asked = _asked(table, tier, labels)
    needed = {table.rows[0].label} | {label for row in asked for label in (row.label, *row.costs_as)}
    return [row for row in table.rows if row.label in needed and not row.costs_as and "model" not in row.settings]


def _asked(table: Table, tier: int | None, labels: Collection[str] | None) -> list[Row]:
    return [row for row in table.rows if (tier is None or row.tier <= tier) and (labels is None or row.label in labels)]


# What a record without these settings was trained with: their defaults have changed since the first records.
_FORMER_DEFAULTS = {"subnet_weight": 1.0}


def altered(table: Table, results: Results) -> list[str]:
    """Where the settings of a record are not those that its table has now, a line for each setting.

    Such a record answers another question than its row asks: it is moved away, or the table is put back.
    """
    lines = []
    for record in results.records(table.name):
        where = f"{table.name}, {record['row']}, seed {record['seed']}"
        try:
            jobs = {job.key: job for job in plan(table, results, labels=[record["row"]])}
        except MissingError as error:
            lines.append(f"{where}: cannot be compared, as {error}")
            continue
        if (record["row"], record["seed"]) not in jobs:
            lines.append(f"{where}: the table has no such row or seed")
            continue
        job = jobs[record["row"], record["seed"]]
        now, was = json.loads(json.dumps(described(job.config("DIR", Path())))), current_names(record["settings"])
        for name in sorted({*was, *now}):
            before = was.get(name, _FORMER_DEFAULTS.get(name) if name in now else None)
            if before != now.get(name):
                lines.append(f"{where}: {name} is {_told(before)} in the record, {_told(now.get(name))} in the table")
        if record["split"] != table.split:
            lines.append(f"{where}: split is {record['split']} in the record, {table.split} in the table")
    return lines


def _told(value: Any) -> Any:
    return "the default" if value is None else value


def described(config: Config) -> dict[str, Any]:
    """The settings that are not the defaults, without what is private to a machine.

    Of the run that a backbone begins from only its table, row and seed.
    """
    found = {
        f.name: getattr(config, f.name)
        for f in fields(Config)
        if f.name not in _PRIVATE and getattr(config, f.name) != f.default
    }
    if config.backbone_weights is not None:
        found["backbone_weights"] = "/".join(Path(config.backbone_weights).parts[-2:])
    return found


def command(config: Config) -> str:
    """The same run by itself."""
    words = ["unloaf", "train"]
    for name, value in described(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, (tuple, list)):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    if config.data_dir is not None:
        words += ["--data-dir", "DIR"]
    return shlex.join(words)
