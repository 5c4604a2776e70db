"""Runs that an analysis needs: trained by the engine, judged, and kept, so that no run is trained twice."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import unloaf
from unloaf.config import Config
from unloaf.config.without_effect import without_unread
from unloaf.data.fingerprint import record_of
from unloaf.engine.loop import one_thread
from unloaf.engine.run import train
from unloaf.engine.setup import prepare
from unloaf.environment import environment
from unloaf.errors import NonFiniteLossError, NonFiniteWeightsError, StoppedError
from unloaf.evaluation import choose_subnets
from unloaf.export import parse_subnet
from unloaf.files.writing import read_text, write_whole
from unloaf.measure.flops import method_flops
from unloaf.own_code import check_allowed, code_record, own_settings
from unloaf.printable import printable
from unloaf.runs.histories import read_histories
from unloaf.runs.opened import OpenedRun, open_trained
from unloaf.subnet import Subnet
from unloaf.tasks.table import task_of

# Where a run lies, how it is fed and what it writes is no part of what was trained.
_ELSEWHERE = (
    "output", "name", "data_dir", "workers", "log_interval", "checkpoint_interval", "checkpoint_hist", "trackers",
    "max_pixels",
)  # fmt: skip
# Of the package, what decides no number of a run.
_WITHOUT_NUMBERS = (
    "commands", "pages", "release", "inspection", "integrations", "recipes", "analysis", "language", "demo.py",
    "bench.py", "language_demo.py", "display.py", "streams.py", "printable.py", "environment.py", "anytime.py",
)  # fmt: skip
_MOST_BYTES = 1 << 24
_COUNTED_STEPS = 64  # drawn from the whole run, for the FLOPs of a step


@dataclass(frozen=True)
class Cell:
    """A run that is needed.

    Attributes:
        label: what it is called.
        config: its settings; output and name are chosen here.
    """

    label: str
    config: Config


@dataclass(frozen=True)
class Judged:
    """A finished run.

    Attributes:
        cell: which one.
        path: its folder.
        split: the images on which it was evaluated.
        main: accuracy of the main network in percent, with the batch-norm statistics of its training; None if the run
            diverged.
        main_reestimated: with statistics that were re-estimated as those of subnets are.
        subnets: accuracy of subnets by their depths, statistics re-estimated; without the main network.
        flops: FLOPs of a step relative to common training of the same network, each block that can be shared once.
        step_flops: FLOPs of one image in a step of common training.
        seconds: time spent training.
        failed: how the run diverged; empty if it did not.
        data: name of its data set, and the number of classes.
        environment: hardware, threads and versions with which it was trained.
    """

    cell: Cell
    path: Path
    split: str
    main: float | None
    main_reestimated: float | None
    subnets: Mapping[str, float]
    flops: float
    step_flops: float
    seconds: float
    failed: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)


Asked = int | tuple[str, ...]
"""Subnets to evaluate: so many beside the main network, drawn, or these depths as far as a network has them."""


class Store:
    """A folder with runs and what they gave; runs with the same settings, data and code are one run.

    Args:
        folder: holds ``runs/`` and ``cells/``, a record of each run.
        asked: subnets that are evaluated in each run.
        split: "val" or "test"; where it is missing, the other one.
        run_own_code: import and run the user's own functions that settings name.
        console: shows which run is trained.

    Raises:
        ValueError: the task is not classification, or the split has no images.
    """

    def __init__(
        self,
        folder: Path,
        *,
        asked: Asked,
        split: str,
        run_own_code: bool = False,
        console: Console | None = None,
    ) -> None:
        self.folder, self.asked, self.split = folder, asked, split
        self.run_own_code = run_own_code
        self.console = Console(quiet=True) if console is None else console
        self._records: dict[Any, dict[str, Any]] = {}

    def results(self, cells: Sequence[Cell], *, on_cell: Callable[[Judged], None] | None = None) -> list[Judged]:
        """Trains and judges what is not there yet; in the order of the cells.

        Raises:
            StoppedError: a signal came; what is finished is kept, and the run in progress goes on next time.
            ValueError: a cell cannot be trained.
        """
        for cell in cells:
            check_allowed(own_settings(cell.config), allowed=self.run_own_code)
            if cell.config.task != "classification":
                raise ValueError(f"task {cell.config.task}: this analysis is for classification")
        cells = [replace(cell, config=without_unread(cell.config)) for cell in cells]
        found, named = [], {self._name(cell): cell for cell in cells}
        missing = [name for name, cell in named.items() if self._finished(name, cell) is None]
        for name, cell in named.items():
            if name in missing and (why := self._others(name, cell)):
                self._say(f"{cell.label}: {why}")
        _check([cell for name, cell in named.items() if name in missing])
        if missing:
            there = f", {len(named) - len(missing)} are there" if len(missing) < len(named) else ""
            self._say(f"{len(missing)} runs to train{there}, in {self.folder / 'runs'}")
        known: dict[str, Judged] = {}
        for cell in cells:
            name = self._name(cell)
            if name not in known:
                at = f"{missing.index(name) + 1}/{len(missing)}" if name in missing else ""
                known[name] = self._result(name, cell, at)
            found.append(replace(known[name], cell=cell))
            if on_cell is not None:
                on_cell(found[-1])
        return found

    def finished(self, cell: Cell) -> bool:
        """Whether this run need not be trained."""
        cell = replace(cell, config=without_unread(cell.config))
        return self._finished(self._name(cell), cell) is not None

    def identity(self, config: Config) -> dict[str, Any]:
        """What decides a run's figures: settings, data, code. Plain values."""
        settings = {name: value for name, value in asdict(config).items() if name not in _ELSEWHERE}
        code = {**_code(), **code_record(own_settings(config))}
        return json.loads(json.dumps({"settings": settings, "data": self._data(config), "code": code}))

    def _data(self, config: Config) -> dict[str, Any]:
        names = [name for name in asdict(config) if name in _DATA]
        key = tuple(getattr(config, name) for name in names)
        if key not in self._records:
            _, data, _ = task_of(config).load(replace(config, pretrained=False), resumed=False)
            self._records[key] = record_of(data)
        return self._records[key]

    def _name(self, cell: Cell) -> str:
        return f"{_slug(cell.config)}-{_digest(self.identity(cell.config))}"

    def _record(self, name: str) -> dict[str, Any]:
        """What is kept of a run; empty where there is nothing, or nothing that can be read."""
        try:
            record = json.loads(read_text(self.folder / "cells" / f"{name}.json", limit=_MOST_BYTES))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError):
            self._say(f"{name}: its record cannot be read and is made again")
            return {}
        return record if isinstance(record, dict) else {}

    def _finished(self, name: str, cell: Cell) -> dict[str, Any] | None:
        record = self._record(name)
        same = record.get("identity") == self.identity(cell.config)
        return record if same and isinstance(record.get("trained"), dict) else None

    def _others(self, name: str, cell: Cell) -> str:
        """Why a run of these settings that is there is not used."""
        own = self.identity(cell.config)
        for path in sorted((self.folder / "cells").glob(f"{_slug(cell.config)}-*.json")):
            other = self._record(path.stem).get("identity")
            if path.stem != name and isinstance(other, dict) and other.get("settings") == own["settings"]:
                return f"{path.stem} is not used, {_difference(other, own)}"
        return ""

    def _result(self, name: str, cell: Cell, at: str) -> Judged:
        record = self._finished(name, cell)
        path = self.folder / "runs" / name
        if record is None:
            self._say(f"{at} {cell.label}: {cell.config.epochs} epochs of {cell.config.model}, {cell.config.method}")
            record = {"identity": self.identity(cell.config), "trained": self._train(name, cell.config)}
            self._keep(name, record)
        judged = record.get("judged", {}).get(self._judgement())
        if judged is None and not record["trained"]["failed"]:
            judged = self._judge(path, cell.config)
            record["judged"] = {**record.get("judged", {}), self._judgement(): judged}
            self._keep(name, record)
        trained = record["trained"]
        judged = judged or {"split": self.split, "main": None, "main_reestimated": None, "subnets": {}, "flops": 1.0,
                            "step_flops": 0.0}  # fmt: skip
        return Judged(
            cell, path, **judged, seconds=trained["seconds"], failed=trained["failed"],
            environment=trained["environment"],
            data={key: record["identity"]["data"][key] for key in ("num_classes",)} | {"dataset": cell.config.dataset},
        )  # fmt: skip

    def _judgement(self) -> str:
        return json.dumps([self.split, self.asked if isinstance(self.asked, int) else list(self.asked)])

    def _keep(self, name: str, record: Mapping[str, Any]) -> None:
        write_whole(self.folder / "cells" / f"{name}.json", json.dumps(record, indent=1) + "\n")

    def _train(self, name: str, config: Config) -> dict[str, Any]:
        """Trains a run to its end, from wherever it was."""
        placed, failed = replace(config, output=str(self.folder / "runs"), name=name), ""
        with _threads(config):
            about = environment()
            try:
                quiet = Console(quiet=True)
                train(placed, console=quiet, resume="auto", run_own_code=self.run_own_code)
            except (NonFiniteLossError, NonFiniteWeightsError) as error:
                failed = str(error)
            except StoppedError as error:
                raise StoppedError(
                    f"{str(error).partition(';')[0]} of {name}; what is finished is kept, the same command goes on",
                    code=error.code,
                ) from error
        kept = ("hardware", "threads", "versions", "python", "started")
        seconds = _seconds(self.folder / "runs" / name)
        return {"failed": failed, "seconds": seconds, "environment": {key: about[key] for key in kept}}

    def _judge(self, path: Path, config: Config) -> dict[str, Any]:
        with _threads(config):
            opened = open_trained(
                path, data_dir=config.data_dir, device=config.device, run_own_code=self.run_own_code, need_subnets=False
            )
            return judged(opened, asked=self.asked, split=split_there(opened, self.split))

    def _say(self, line: str) -> None:
        self.console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


def _check(cells: Sequence[Cell]) -> None:
    """Builds what is to be trained: what cannot be is better known before the first training than after it."""
    for cell in {replace(cell.config, seed=0): cell for cell in reversed(cells)}.values():
        try:
            prepare(cell.config, resumed=True)
        except ValueError as error:
            raise ValueError(f"{cell.label}: {error}") from error


def judged(opened: OpenedRun, *, asked: Asked, split: str) -> dict[str, Any]:
    """Figures of a classifier and of its subnets, as `Judged` has them."""
    training, stages = opened.training, opened.training.stages
    full = Subnet.full(stages)
    rows = training.task.evaluate_subnets(
        opened.network,
        stages,
        training.eval_batches(split),
        training.data,
        subnets=[full, *(subnet for subnet in _chosen(stages, asked, opened.config.seed) if subnet != full)],
        calibration=training.calibration_batches(),
    )
    main, *others = rows
    flops = _flops(opened)
    return {
        "split": split,
        "main": (main.running or main).top1,
        "main_reestimated": main.top1,
        "subnets": {str(row.subnet): row.top1 for row in others},
        "flops": flops.shared / flops.common,
        "step_flops": flops.common,
    }


def _chosen(stages: Any, asked: Asked, seed: int) -> list[Subnet]:
    if isinstance(asked, int):
        return choose_subnets(stages, asked + 1, seed=0)
    return [parse_subnet(stages, text) for text in asked if fits(stages, text)]


def fits(stages: Any, text: str) -> bool:
    """Whether a network of these stages has a subnet of these depths."""
    depths = [int(part) for part in re.split("[-,]", text)]
    return len(depths) == len(stages) and all(d in s.legal_depths for d, s in zip(depths, stages, strict=True))


def _flops(opened: OpenedRun) -> Any:
    """Of one image in a step, mean over steps drawn from the whole run."""
    training, config = opened.training, opened.config
    total = config.epochs * training.steps_per_epoch
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    steps = sorted(order[:_COUNTED_STEPS].tolist())
    return method_flops(training.method, next(iter(training.calibration_batches())).x, steps)


def split_there(opened: OpenedRun, split: str) -> str:
    """This split, or where it has no images the other one."""
    data = opened.training.data
    there = [name for name in (split, "test", "val") if len(getattr(data, name))]
    if not there:
        raise ValueError(f"{data.name} has neither validation nor test images; nothing can be evaluated")
    return there[0]


def _threads(config: Config) -> Any:
    """One for digits: their networks are so small that threads wait for each other longer than they compute."""
    return one_thread() if config.dataset == "digits" else nullcontext()


def _seconds(run: Path) -> float:
    """Time that a run spent training."""
    [history] = read_histories([run])
    return round(sum(seconds for _, seconds in history.curve("time")), 3)


def _slug(config: Config) -> str:
    """What a reader of the folder recognises; that it is no other run, the checksum behind it says."""
    parts = (config.model, config.depths or "", config.method.replace("+", "p"), str(config.seed))
    return re.sub("[^A-Za-z0-9]+", "-", "-".join(filter(None, parts))).strip("-")[:60]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


@cache
def _code() -> dict[str, str]:
    """Versions of what computes, and a checksum of the files of this package that decide numbers."""
    versions = environment()["versions"]
    root = Path(unloaf.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in _WITHOUT_NUMBERS:
            digest.update(f"{name.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    found = {name: str(versions[name]) for name in ("unloaf", "torch", "torchvision", "timm")}
    return found | {"files of unloaf": digest.hexdigest()[:16]}


def _difference(other: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Which data or code are not the same."""
    parts = [
        f"{name} was {_short(theirs.get(name))} and is {_short(mine.get(name))}"
        for what in ("data", "code")
        for theirs, mine in [(other.get(what) or {}, own[what])]
        for name in {**theirs, **mine}
        if theirs.get(name) != mine.get(name)
    ]
    return "; ".join(parts) or "its record is of another form"


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _names_of_data() -> tuple[str, ...]:
    """Settings that say which images there are: those of the first group."""
    names = list(asdict(Config()))
    return (*names[names.index("task") : names.index("img_size")], "img_size")


_DATA = tuple(name for name in _names_of_data() if name not in ("workers", "device_data", "max_pixels"))
