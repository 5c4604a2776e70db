"""Trains the runs of a table that are missing, continues those that were cut short, and records those that end.

    python -m benchmarks.accuracy.run TABLE... --data-dir DIR [--output DIR] [--jobs N] [--minutes M]

TABLE is a table of tables.py or a group of them: gpu, cpu, cifar100-gpu. What a table needs comes first: the trials
that choose its settings on validation images, and the costs that set the epochs at equal cost. Each run is a process of
its own with one thread. At the end of --minutes, at Ctrl-C and at SIGTERM runs save a checkpoint and the command ends
with code 3; given again, it goes on. Code 0: all is there; 1: a run or a cost failed, its log is named. Records go to
--results, one file for each table.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.accuracy.jobs import (
    BASELINE_COST,
    Job,
    MissingError,
    Results,
    altered,
    figure,
    plan,
    settings_of,
    to_measure,
)
from benchmarks.accuracy.tables import GROUPS, TABLES, Row, Table

from unloaf.config import Config

ROOT = Path(__file__).resolve().parents[2]

UNFINISHED = 3
_TO_SAVE = 30  # seconds before the end of the time in which runs write their checkpoints


class Study:
    """Processes, the time that is left, and what has failed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.results = options, Results(options.results)
        self.output: Path = options.output
        minutes = options.minutes
        self.end = float("inf") if minutes is None else time.monotonic() + 60 * minutes - _TO_SAVE
        self.stopping = False
        self.failed: list[str] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    @property
    def over(self) -> bool:
        """Whether no more time is left."""
        return self.stopping or time.monotonic() >= self.end

    def table(self, table: Table) -> bool:
        """Trials, costs, runs; whether all of them are there."""
        if table.trials is not None and not self.table(TABLES[table.trials]):
            return False
        if wrong := altered(table, self.results):
            self.failed += wrong
            say("\n".join(["  records that are not of this table; move them away or put the table back:", *wrong]))
            return False
        options = self.options
        tier, rows, seeds = None, None, None  # of trials that another table needs
        if table.name in options.named:
            tier, rows, seeds = options.tier, options.rows, options.seeds
        if not self._measured(table, to_measure(table, tier, rows)):
            return False
        chosen = [job for job in plan(table, self.results, tier, rows) if seeds is None or job.seed in seeds]
        done = {(record["row"], record["seed"]) for record in self.results.records(table.name)}
        missing = [job for job in chosen if job.key not in done]
        self._check_backbones(table, missing)
        say(f"{table.name}: {len(chosen) - len(missing)} of {len(chosen)} runs are there")
        self._train(missing)
        done = {(record["row"], record["seed"]) for record in self.results.records(table.name)}
        return all(job.key in done for job in chosen)

    def _check_backbones(self, table: Table, jobs: Sequence[Job]) -> None:
        """Raises MissingError where the run that a backbone begins from is not there, or not at its end."""
        done = {(record["row"], record["seed"]) for record in self.results.records(str(table.backbones))}
        for job in jobs:
            start = job.config(self.options.data_dir, self.output / "runs").backbone_weights
            if start is not None and ((job.row.backbone, job.seed) not in done or not (Path(start) / "last").exists()):
                raise MissingError(f"{start} is not there: train {table.backbones} first, into the same --output")

    def _measured(self, table: Table, rows: Sequence[Row]) -> bool:
        for row in rows[1:]:
            if row.label in self.results.costs(table.name):
                continue
            if self.over or not self._measure(table, rows[0], row):
                return False
        return True

    def _measure(self, table: Table, base: Row, row: Row) -> bool:
        say(f"  cost of {row.label}")
        private = {"data_dir": self._files(table), "output": str(self.output)}
        settings = [asdict(Config(**settings_of(table, r, self.results), **private)) for r in (base, row)]
        order = {
            "kind": "measure", "baseline": settings[0], "row": settings[1], "rounds": self.options.rounds,
            "seconds": self.options.cost_seconds, "draws": 100,
        }  # fmt: skip
        folder = self.output / "jobs" / table.name / "cost"
        process = self._start(folder, order)
        self._wait([(folder, process)])
        found = read(folder / "result.json")
        if found is not None:
            self.results.add_cost(
                table, {base.label: BASELINE_COST} | self.results.costs(table.name) | {row.label: found}
            )
        elif not self.over:
            self._fail(f"cost of {row.label}", process.returncode, folder)
        return found is not None

    def _files(self, table: Table) -> str | None:
        return None if table.common["dataset"] == "digits" else self.options.data_dir

    def _start(self, folder: Path, order: dict[str, Any]) -> subprocess.Popen[bytes]:
        folder.mkdir(parents=True, exist_ok=True)
        order |= {"threads": 1, "result": str(folder / "result.json")}
        (folder / "order.json").write_text(json.dumps(order), encoding="utf-8")
        words = [sys.executable, "-m", "benchmarks.accuracy.job", str(folder / "order.json")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with (folder / "log.txt").open("ab") as log:
            return subprocess.Popen(words, env=environment, stdout=log, stderr=log)

    def _train(self, jobs: Sequence[Job]) -> None:
        waiting, running = list(jobs), []
        while running or (waiting and not self.over):
            while waiting and len(running) < self.options.jobs and not self.over:
                job = waiting.pop(0)
                running.append((job, *self._begin(job)))
            running = [entry for entry in running if not self._ended(*entry)]
            if self.over:
                self._wait([(folder, process) for _, folder, process in running])
            time.sleep(0.2)

    def _begin(self, job: Job) -> tuple[Path, subprocess.Popen[bytes]]:
        config = job.config(self.options.data_dir, self.output / "runs")
        subnets = list(job.table.subnets) if isinstance(job.table.subnets, tuple) else job.table.subnets
        order = {"kind": "train", "config": asdict(config), "split": job.table.split, "subnets": subnets}
        folder = self.output / "jobs" / job.name
        say(f"  {job.row.label}, seed {job.seed}: {config.epochs} epochs")
        return folder, self._start(folder, order)

    def _ended(self, job: Job, folder: Path, process: subprocess.Popen[bytes]) -> bool:
        code = process.poll()
        if code is None:
            return False
        found = read(folder / "result.json")
        if found is not None:
            cost = {f"cost_{name}": job.cost.get(name) for name in ("time", "flops")}
            about = {"table": job.table.name, "row": job.row.label, "seed": job.seed} | found | cost
            self.results.add(job.table, about)
            value = figure(found)
            say(f"  {job.row.label}, seed {job.seed}: {'diverged' if value is None else f'{value:.2f} %'}")
        elif not self.over and code not in (143, 130, -15, -2):  # -9 is a lack of memory
            self._fail(f"{job.row.label}, seed {job.seed}", code, folder)
        return True

    def _fail(self, what: str, code: int, folder: Path) -> None:
        self.failed.append(f"{what}: code {code}, see {folder / 'log.txt'}")
        say(f"  failed: {self.failed[-1]}")

    def _wait(self, running: Sequence[tuple[Path, subprocess.Popen[bytes]]]) -> None:
        """Until they end by themselves, or the time does: then they save, and those that take too long are killed."""
        killed = None
        while any(process.poll() is None for _, process in running):
            if self.over and killed is None:
                killed = time.monotonic() + _TO_SAVE - 5
                for _, process in running:
                    process.terminate()
            if killed is not None and time.monotonic() > killed:
                for _, process in running:
                    process.kill()  # what it trained since its last checkpoint is trained again
            time.sleep(0.2)


def read(path: Path) -> dict[str, Any] | None:
    """What a process left, once."""
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return found


def say(line: str) -> None:
    """With the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """0 when all is trained, 3 when something is left, 1 when something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=[*TABLES, *GROUPS], metavar="TABLE")
    parser.add_argument("--data-dir", help="folder of cifar-10-batches-py or cifar-100-python, or of another data set")
    parser.add_argument("--output", type=Path, default=Path("output/accuracy"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="folder of the records")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--minutes", type=float, help="end after so long; go on with the same command")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--rows", nargs="+", help="only the rows of these labels")
    parser.add_argument("--tier", type=int, help="only rows of this tier and below")
    parser.add_argument("--rounds", type=int, default=200, help="steps of each row that are timed")
    parser.add_argument("--cost-seconds", type=float, default=30, help="time for a row, once 20 are done")
    options = parser.parse_args(words)
    names = [name for given in options.tables for name in GROUPS.get(given, (given,))]
    options.named = set(names)
    if options.data_dir is None and any(TABLES[name].common["dataset"] != "digits" for name in names):
        parser.error("give --data-dir, the folder of cifar-10-batches-py or cifar-100-python, or of another data set")
    study, left = Study(options), False
    for name in names:
        if study.over:
            left = True
            break
        try:
            left = not study.table(TABLES[name]) or left
        except MissingError as error:
            say(f"{name}: {error}")
            left = True
    if study.failed:
        say(f"not all there: {len(study.failed)} failed, see above")
    else:
        say("all there" if not left else "not all there yet: give the same command again")
    return 1 if study.failed else UNFINISHED if left else 0


if __name__ == "__main__":
    sys.exit(main())
