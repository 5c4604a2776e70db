"""`unloaf train`: a run with its folder and its progress."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unloaf.engine.checkpoint import save_weights
from unloaf.engine.config import Config
from unloaf.engine.fit import Accuracy, EpochRow, StepRow, prepare, train_epoch
from unloaf.engine.record import RunFolder


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder and the accuracy of its main network on the test images."""

    path: Path
    test: Accuracy


def train(config: Config, *, console: Console) -> TrainResult:
    """Trains a run, keeps its record in a new folder and its weights in model.safetensors.

    Args:
        config: the run.
        console: shows a progress bar on a terminal, one plain line per epoch elsewhere.

    Raises:
        ValueError: bad input; nothing was trained.
        NonFiniteLossError: the run stopped; the last finite weights are in model.safetensors.
    """
    training = prepare(config)
    folder = RunFolder(config)
    folder.log(f"{len(training.data.train)} training images, {training.steps_per_epoch} steps per epoch")

    def on_step(row: StepRow) -> None:
        if row.step % config.log_interval == 0:
            folder.step(row)

    try:
        with show_progress(console, total=config.epochs, label=config.method) as show:
            for epoch in range(1, config.epochs + 1):
                row = train_epoch(training, epoch, on_step=on_step)
                folder.epoch(row)
                folder.log(epoch_line(row, config))
                show(epoch_line(row, config))
    finally:
        metadata = {"format": "pt", "unloaf_config": json.dumps(asdict(config))}
        save_weights(training.model, folder.path / "model.safetensors", metadata=metadata)
    test = training.evaluate("test")
    folder.result({"test_loss": test.loss, "test_top1": test.top1, "test_top5": test.top5})
    folder.log(f"test top-1 {test.top1:.2f} %")
    return TrainResult(folder.path, test)


def epoch_line(row: EpochRow, config: Config) -> str:
    """An epoch as a line of text."""
    accuracy = f"  val loss {row.eval.loss:.4f}  val top-1 {row.eval.top1:.2f} %" if row.eval else ""
    return (
        f"epoch {row.epoch}/{config.epochs}  train loss {row.train_loss:.4f}{accuracy}  "
        f"lr {row.lr:.2g}  {row.seconds:.1f} s"
    )


@contextmanager
def show_progress(console: Console, *, total: int, label: str) -> Iterator[Callable[[str], None]]:
    """Gives a function that advances by one unit and shows its line.

    A progress bar on a terminal; elsewhere plain lines without control characters.
    """
    if not console.is_terminal:
        yield lambda line: console.print(line, highlight=False, soft_wrap=True)
        return
    columns = (TextColumn("{task.fields[label]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress:
        task = progress.add_task("", total=total, label=label)
        yield lambda line: progress.update(task, advance=1, description=line)
