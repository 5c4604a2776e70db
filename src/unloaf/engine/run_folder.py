"""The folder of a run: who may write to it, and the files that grow with it. Imports no torch."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from unloaf.config import Config, as_begun, dump_config, load_config
from unloaf.engine.changed_settings import check_same
from unloaf.files.lock import lock
from unloaf.files.writing import check_own, disk_full, own_file, read_text, write_whole
from unloaf.printable import printable

# What a run that was killed at once leaves behind.
_BEFORE_BEGINNING = re.compile(
    r"run\.lock|env\.json|data\.json|images\.csv\.gz|\.(env\.json|args\.yaml|data\.json|images\.csv\.gz)-[0-9a-f]{8}"
)
_MOST_BYTES = 1 << 26  # of env.json, which has some hundred for each resume
_STEP = re.compile(r"step-\d{8,}(\.\d+)?")
_FILES = (
    "args.yaml", "changes.jsonl", "data.json", "env.json", "images.csv.gz", "log.txt", "metrics.jsonl", "run.lock",
    "subnets.csv", "summary.csv",
)  # fmt: skip
_FOLDERS = ("checkpoints", "export", "unloaf")  # the last is of accelerate's trackers
_GROWING = ("summary.csv", "metrics.jsonl")  # a resumed run cuts them back to its checkpoint; log.txt keeps all


class RunFolder:
    """A folder DIR/NAME with args.yaml, env.json, summary.csv, metrics.jsonl, log.txt and checkpoints/.

    Every line is handed to the system when its method returns, so a killed run keeps its history. A second process is
    kept out by a lock that the system drops when its owner dies.

    Args:
        path: the folder, made when it is missing.

    Attributes:
        epochs_before: of a resumed run, how many it was to have until now.

    Raises:
        ValueError: the folder cannot be made, or another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.epochs_before: int | None = None
        try:
            self.is_new = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            for name in (*_FILES, *_FOLDERS):
                check_own(path / name, folder=name in _FOLDERS)
            self._lock = lock(path)
        except OSError as error:
            full = disk_full(error, path, 0)
            raise full or ValueError(
                f"cannot write to the run folder {path}: {error.strerror}; give another --output"
            ) from error

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    def begin(self, config: Config, environment: Mapping[str, Any]) -> None:
        """Writes what was asked for and where it runs."""
        write_whole(self.path / "env.json", json.dumps(_json(environment), indent=2) + "\n", wait=False)
        # Last: with it the run counts as begun.
        write_whole(self.path / "args.yaml", dump_config(config), wait=False)

    def go_on(self, environment: Mapping[str, Any]) -> None:
        """Adds to env.json with which command a resumed run goes on, when, and on what else than it was begun on."""
        try:
            begun = json.loads(read_text(self.path / "env.json", limit=_MOST_BYTES))
        except (OSError, ValueError, RecursionError):
            return  # it is damaged, or was never written: nothing of it is needed to go on
        before = begun.get("resumed", []) if isinstance(begun, dict) else None
        if not isinstance(before, list):
            return
        new = {
            name: value for name, value in _json(environment).items() if name == "command" or value != begun.get(name)
        }
        text = json.dumps({**begun, "resumed": [*before, new]}, indent=2) + "\n"
        write_whole(self.path / "env.json", text, wait=False)

    def grow(self, config: Config, *, before: int, epoch: int) -> None:
        """Keeps that from this epoch on the run goes to config.epochs instead of to `before`.

        The record comes first: args.yaml alone may not change.
        """
        line = {"setting": "epochs", "before": before, "now": config.epochs, "epoch": epoch}
        self._append("changes.jsonl", json.dumps({**line, "time": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}) + "\n")
        begun = load_config(self.path / "args.yaml")
        write_whole(self.path / "args.yaml", dump_config(dataclasses.replace(begun, epochs=config.epochs)))

    def keep_images(self, record: Mapping[str, Any], listing: bytes | None) -> None:
        """Writes what is learned from: data.json, and images.csv.gz where images have names."""
        write_whole(self.path / "data.json", json.dumps(record, indent=2) + "\n")
        if listing is not None:
            write_whole(self.path / "images.csv.gz", listing)

    def epoch(self, values: Mapping[str, Any]) -> None:
        """Adds an epoch to summary.csv, under the names of the first one, and to metrics.jsonl."""
        known = ""
        if self.sizes().get("summary.csv"):
            with open(self.path / "summary.csv", encoding="utf-8", opener=own_file) as file:
                known = file.readline().rstrip("\n")
        names = known.split(",") if known else list(values)  # a run of an older unloaf continues with its columns
        lines = io.StringIO(newline="")
        writer = csv.writer(lines, lineterminator="\n")
        if not known:
            writer.writerow(names)
        writer.writerow("" if values.get(name) is None else values[name] for name in names)
        self._append("summary.csv", lines.getvalue())
        self.event("epoch", values)

    def trained_seconds(self) -> float:
        """How long the epochs in summary.csv took, validation not included; epochs without a time count as nothing."""
        try:
            text = read_text(self.path / "summary.csv", limit=_MOST_BYTES)
        except (OSError, ValueError):
            return 0.0
        times = (row.get("time") or "" for row in csv.DictReader(io.StringIO(text, newline="")))
        return math.fsum(float(text) for text in times if re.fullmatch(r"\d+(\.\d+)?", text))

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        line = json.dumps({"event": kind, **_json(values)}, allow_nan=False)
        self._append("metrics.jsonl", line + "\n")

    def log(self, line: str) -> None:
        """Adds a line, with the time, to log.txt."""
        self._append("log.txt", f"{datetime.now():%Y-%m-%d %H:%M:%S} {printable(line)}\n")

    def sizes(self) -> dict[str, int]:
        """How far the growing files have come, in bytes."""
        return {name: (self.path / name).stat().st_size for name in _GROWING if (self.path / name).exists()}

    def cut_back(self, sizes: Mapping[str, int] | None) -> list[str]:
        """Takes away what was written after a checkpoint: the resumed run writes it again.

        Sizes are those of the growing files when the checkpoint was written; without a checkpoint the run starts again,
        and what it wrote before is kept under another name. Returns lines on what is kept elsewhere, and on what is
        missing.
        """
        there = [self.path / name for name in _GROWING if (self.path / name).exists()]
        if sizes is None:
            return [_set_aside(path) for path in there if path.stat().st_size]
        short = [path.name for path in there if path.stat().st_size < sizes.get(path.name, 0)]
        short += [name for name in sizes if not (self.path / name).exists()]
        for path in there:
            with open(path, "r+b", opener=own_file) as file:
                file.truncate(_end_of_line(file, sizes.get(path.name, 0)))
        return [f"{name} is shorter than when the checkpoint was written: lines of it are lost" for name in short]

    def discard(self) -> None:
        """Closes the folder, and removes one in which nothing was begun: its name is free for the corrected call."""
        self.close()
        if self.is_new and not (self.path / "args.yaml").exists():
            self.path.rmdir()

    def close(self) -> None:
        """Lets other processes in."""
        if not self._lock.closed:
            with suppress(OSError):  # it only says who held the lock
                (self.path / "run.lock").unlink(missing_ok=True)
            self._lock.close()

    def _append(self, name: str, text: str) -> None:
        try:
            with open(self.path / name, "a", encoding="utf-8", newline="", opener=own_file) as file:
                file.write(text)
        except OSError as error:
            full = disk_full(error, self.path, len(text), advice="make room and resume")
            raise full or error from error


def _set_aside(path: Path) -> str:
    """Renames a file to the first free name.2.csv, name.3.csv, ..."""
    number = 2
    while os.path.lexists(aside := path.with_suffix(f".{number}{path.suffix}")):
        number += 1
    path.rename(aside)
    return f"there is no checkpoint to continue from: the run starts again, what it wrote is kept as {aside.name}"


def _end_of_line(file: IO[bytes], limit: int) -> int:
    """The last end of a line up to so many bytes: a file that was copied while it grew may end inside a line."""
    return file.read(limit).rfind(b"\n") + 1


def _json(value: Any) -> Any:
    """The value as JSON knows it: NaN and infinity, which it does not, become null; texts are made printable."""
    if isinstance(value, Mapping):
        return {_json(key): _json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(entry) for entry in value]
    if isinstance(value, str):
        return printable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_run(config: Config, *, resume: str | None = None) -> RunFolder:
    """The folder of a new run, or of one that continues: with resume "auto" OUTPUT/NAME if it was begun, or a path.

    Raises:
        ValueError: the folder exists, cannot be made or is in use, its run had other settings, or another output or
            name is given than that of the run to resume.
    """
    if resume is None or resume == "auto":
        if resume and config.name is None:
            raise ValueError("resume auto: give --name, so that the run is found again")
        path = Path(config.output) / (config.name or _name(config))
    else:
        path = run_of(Path(resume))
    begun = (path / "args.yaml").exists()
    if begun and resume is None:
        raise ValueError(f"run folder {path} exists; give another --name, continue with --resume auto, or remove it")
    if path.is_dir() and not begun and not all(_BEFORE_BEGINNING.fullmatch(file.name) for file in path.iterdir()):
        raise ValueError(f"run folder {path} exists and is not a run; give another --name, or remove it")
    had = None
    if begun:
        checkpoints_in_sight(path)
        had = load_config(path / "args.yaml")
        check_same(as_begun(config, had), had, path)
        if resume != "auto":
            _check_place(config, had, path)
    folder = RunFolder(path)
    folder.epochs_before = had.epochs if had else None
    return folder


def checkpoints_in_sight(run: Path) -> bool:
    """Whether a run that was begun has checkpoints.

    Raises:
        ValueError: none can be seen, though the run wrote some: continuing without them would start again.
    """
    folder = run / "checkpoints"
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        found = f"is a link to {folder.readlink()}, where nothing is" if folder.is_symlink() else "is missing"
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be read ({error.strerror}), and with it the checkpoints of the run; make it a folder "
            "that you may read, or train again under another --name"
        ) from error
    else:
        if any(_STEP.fullmatch(name) for name in names):
            return True
        found = f"holds {', '.join(names[:3])} and no checkpoint" if names else "is empty"
    traces = _traces(run)
    if traces:
        raise ValueError(
            f"{folder} {found}, but there were checkpoints: {'; '.join(traces)}; bring it back (mount its disk, undo a "
            "renaming, copy it from a backup), or train again under another --name"
        )
    return False


def _traces(run: Path) -> list[str]:
    """What says that a run once had a checkpoint. The first one is written after the first line of summary.csv."""
    found = [
        f"{name} leads to {(run / name).readlink()}" for name in ("last", "model_best") if (run / name).is_symlink()
    ]
    try:
        with (run / "summary.csv").open("rb") as file:
            epochs = sum(1 for _ in file) - 1
    except FileNotFoundError:
        epochs = 0
    return found + [f"summary.csv has {epochs} epochs"] * (epochs > 1)


def run_of(path: Path) -> Path:
    """The folder of a run that was begun.

    Raises:
        ValueError: there is no run.
    """
    if not (path / "args.yaml").is_file():
        inside = [printable(file.parent) for file in sorted(path.glob("*/args.yaml"))[:5]]
        what = (
            f"one of the runs in it, such as {', '.join(inside)}" if inside else "the folder that `unloaf train` named"
        )
        raise ValueError(f"{path} is not a run: it has no args.yaml; give {what}")
    return path


def _check_place(config: Config, begun: Config, path: Path) -> None:
    """A resumed run stays where it is, also if it was moved there; it is not copied or renamed."""
    advice = f"the run continues in {path}; leave it out, or move the folder first"
    if config.name not in (None, begun.name, path.resolve().name):
        raise ValueError(f"name {config.name}: {advice}")
    if config.output != begun.output and Path(config.output).resolve() != path.resolve().parent:
        raise ValueError(f"output {config.output}: {advice}")


def _name(config: Config) -> str:
    return f"{datetime.now():%Y%m%d-%H%M%S}-{re.sub('[/:]', '_', config.model)}-{config.method}"
