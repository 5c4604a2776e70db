"""`unloaf train`: a run from its folder to its result, which signals, faults and restarts cannot spoil."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import nn

from unloaf.config import Config, as_begun, load_config
from unloaf.config.without_effect import without_effect
from unloaf.data import Data, explain_worker_death
from unloaf.data.changed_images import check_resumed
from unloaf.data.fingerprint import listing, read_listing, record_of
from unloaf.display import SILENT, Display, RunConsole, show_progress
from unloaf.engine.changed_settings import check_settings
from unloaf.engine.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint
from unloaf.engine.checkpoint.capture import capture, restore
from unloaf.engine.checkpoint.saver import Saver
from unloaf.engine.devices import find_devices, on_all, total
from unloaf.engine.log_lines import epoch_line, resumed_lines, step_line, summary, tracked
from unloaf.engine.loop import EpochRow, StepRow, Training, prepare, train_epoch
from unloaf.engine.optimizer import learning_rate_advice
from unloaf.engine.run_folder import RunFolder, open_run
from unloaf.engine.setup import NOTHING_YET
from unloaf.engine.signals import StopRequest, stop_requests
from unloaf.environment import bits_depend_on, environment
from unloaf.errors import NonFiniteLossError, StoppedError
from unloaf.files.writing import point_to
from unloaf.models.preprocessing import HEADER, as_text
from unloaf.own_code import changed_code, check_allowed, code_record, own_settings
from unloaf.stages import inner_module

_BATCHES_BETWEEN_QUESTIONS = 10  # of a validation, in which processes have nothing else to wait for each other for


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder, and the task's figures of its main network on the test images, or where there are
    none on the validation images.
    """

    path: Path
    split: str
    test: Any


def train(
    config: Config,
    *,
    console: Console,
    resume: str | None = None,
    folder: RunFolder | None = None,
    data: Data | None = None,
    model: nn.Module | None = None,
    allow_changed_data: bool = False,
    run_own_code: bool = False,
    allow_changed_code: bool = False,
) -> TrainResult:
    """Trains a run and keeps its record and its checkpoints in its folder. Every process of a run calls it.

    The folder may be opened already (see `open_run`), the data may be loaded, and another model than config.model may
    be given. With `allow_changed_data` a run continues though its training or validation images are others now, with
    `allow_changed_code` though the file of its own model or data was changed; `run_own_code` lets such a function run.

    Raises:
        ValueError: bad input; nothing was trained.
        NonFiniteLossError: the run stopped; its checkpoint has the last finite weights.
        StoppedError: a signal stopped the run; its checkpoint is of the last step.
        CheckpointError: a checkpoint could not be written or read; the one before it is intact.
    """
    check_allowed(own_settings(config), allowed=run_own_code)
    if folder is None and int(os.environ.get("RANK", "0")) == 0:
        folder = open_run(config, resume=resume)
    try:
        accelerator = find_devices(config, folder=folder.path if folder else None)
        path = Path(on_all(accelerator, str(folder.path) if folder else None))
        if (path / "args.yaml").is_file():
            config = as_begun(config, load_config(path / "args.yaml"))
        found, notes = _find_checkpoint(accelerator, folder)
        if found is not None:
            before = on_all(accelerator, folder.epochs_before if folder else None)
            notes += check_settings(config, found, longer_than=before)
        code = code_record(own_settings(config))
        if found is not None:
            notes += check_code(found.state.get("own_code"), code, found.path.name, allow=allow_changed_code)
        training = prepare(config, data=data, model=model, accelerator=accelerator, resumed=found is not None)
        record = record_of(training.data)
        if found is not None:
            listed = read_listing(path / "images.csv.gz")
            notes += check_resumed(
                training.data,
                record,
                found.state.get("data"),
                listed,
                checkpoint=found.path.name,
                allow=allow_changed_data,
            )
    except BaseException:
        if folder is not None:
            folder.discard()
        raise
    with ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        if folder is not None:
            stack.callback(folder.close)
        run = Run(training, record, folder, stop, stack, console, code=code)
        run.begin(found, notes)
        run.train()
        return run.result(path)


def check_code(had: Any, now: Mapping[str, Mapping[str, str]], checkpoint: str, *, allow: bool) -> list[str]:
    """Compares the files of a resumed run's own functions with those of its checkpoint; lines on what is not the same.

    Raises:
        ValueError: one was changed, and that was not allowed.
    """
    changed = changed_code(had, now, since=checkpoint)
    if changed and not allow:
        raise ValueError(f"{'; '.join(changed)}; put it back, or continue by --allow-changed-code")
    return changed


def _find_checkpoint(accelerator: Accelerator, folder: RunFolder | None) -> tuple[Checkpoint | None, list[str]]:
    """The newest good checkpoint of a resumed run, and what is to be said of the damaged ones."""
    found: tuple[Checkpoint | None, list[str]] = (None, [])
    if folder is not None and folder.checkpoints.is_dir():
        found = newest_checkpoint(folder.checkpoints)
    checkpoint, notes = found
    path = on_all(accelerator, str(checkpoint.path) if checkpoint else None)
    if checkpoint is None and path is not None:
        checkpoint = load_checkpoint(Path(path))
    return checkpoint, notes


class Run:
    """A training with its record: what happens between two steps."""

    def __init__(
        self,
        training: Training,
        record: Mapping[str, Any],
        folder: RunFolder | None,
        stop: StopRequest,
        stack: ExitStack,
        console: Console,
        *,
        code: Mapping[str, Mapping[str, str]],
    ) -> None:
        self.code = code
        self.training, self.record, self.folder, self.stop = training, dict(record), folder, stop
        self.config, self.accelerator = training.config, training.accelerator
        self.stack, self.console = stack, console
        self.display: Display = SILENT
        stack.callback(training.batches.close)
        self.environment = environment(processes=self.accelerator.num_processes, device=training.device)
        if code:
            self.environment["own_code"] = dict(code)
        self.saver: Saver | None = None
        if folder is not None:
            metadata = {
                "format": "pt",
                "unloaf_config": json.dumps(asdict(self.config)),
                HEADER: as_text(training.data),
            }
            self.saver = Saver(folder, keep=self.config.checkpoint_hist, metadata=metadata)
            stack.callback(self.saver.close)
        self.since, self.steps_since = time.perf_counter(), 0
        self.judged_batches, self.trained = 0, 0.0
        self.told_bad: set[str] = set()

    def begin(self, checkpoint: Checkpoint | None, notes: Sequence[str]) -> None:
        """Says what is run, and puts a resumed run where it was."""
        training, config = self.training, self.config
        if checkpoint is not None:
            restore(training, checkpoint)
            self._link(checkpoint)
        had = checkpoint.state.get("data") if checkpoint else None
        if had is not None and had["splits"]["val"] != self.record["splits"]["val"]:
            training.position.best = NOTHING_YET  # of other images
        if self.folder is not None:
            if had != self.record:
                self.folder.keep_images(self.record, listing(training.data))
            if checkpoint is None:
                self.folder.begin(config, self.environment)
            else:
                self.folder.go_on(self.environment)
            if checkpoint is not None and (before := self.folder.epochs_before) and before < config.epochs:
                self.folder.grow(config, before=before, epoch=training.position.epoch)
            notes = [*notes, *self.folder.cut_back(checkpoint.state["files"] if checkpoint else None)]
            self.trained = self.folder.trained_seconds()
            total_steps = config.epochs * training.steps_per_epoch
            progress = show_progress(
                self.console, total=total_steps, done=training.steps_by_epochs, label=config.method
            )
            self.display = self.stack.enter_context(progress)
        for line in notes:
            self.say(line)
        for line in self._opening(checkpoint):
            self.say(line)
        if config.trackers:
            settings = {name: str(value) for name, value in asdict(config).items()}
            self.accelerator.init_trackers("unloaf", config=settings)
            self.stack.callback(self.accelerator.end_training)

    def _link(self, checkpoint: Checkpoint) -> None:
        """The run may have been killed between writing this checkpoint and pointing to it."""
        if self.folder is not None:
            point_to(self.folder.path / "last", checkpoint.path)
            if checkpoint.state.get("best"):
                point_to(self.folder.path / "model_best", checkpoint.path)

    def _opening(self, checkpoint: Checkpoint | None) -> list[str]:
        training, config, world = self.training, self.config, self.accelerator.num_processes
        parts = config.batch_size, world, config.accumulation(world)
        blocks = sum(len(stage.blocks) for stage in training.stages)
        data = training.data
        lines = [
            f"global batch {parts[0] * parts[1] * parts[2]} = {parts[0]} x {parts[1]} x {parts[2]} "
            f"({data.unit}, devices, accumulated batches)",
            f"{config.model}: {sum(p.numel() for p in training.model.parameters()):,} parameters, "
            f"{blocks} blocks in {len(training.stages)} stages",
            f"{data.name}: {len(data.train)} {data.unit}, {training.steps_per_epoch} steps per epoch",
            *data.notes,
            *training.opening,
            *without_effect(config),
        ]
        if checkpoint is None:
            lines += learning_rate_advice(config, inner_module(training.model))
        else:
            lines += resumed_lines(training, checkpoint)
            lines += self._differences(checkpoint.state["bits_depend_on"])
        return lines

    def _differences(self, before: Mapping[str, Any]) -> list[str]:
        """Why the resumed run may not be the uninterrupted one to the last bit."""
        now = bits_depend_on(self.environment)
        reasons = [f"{name} is {now[name]}, was {before.get(name)}" for name in now if now[name] != before.get(name)]
        if self.training.device.type != "cpu" and not self.config.deterministic:
            reasons.append("without --deterministic kernels of this device may differ in the last bits")
        return [f"not bit for bit the uninterrupted run: {reason}" for reason in reasons]

    def train(self) -> None:
        """Trains what is left; whatever ends it, what is learned so far is on the disk."""
        training = self.training
        try:
            while not training.finished:
                row = train_epoch(training, on_step=self.after_step, on_eval_batch=self._stop_in_validation)
                self.after_epoch(row)
            if self.saver is not None:
                self.saver.wait()
        except Exception as error:
            # Several processes can only save together, so only where all of them know of the end; and what an error
            # in the middle of a step leaves behind is no state of the run.
            alone = self.accelerator.num_processes == 1 and training.position.whole
            if alone or isinstance(error, (StoppedError, NonFiniteLossError)):
                self._save_after(error)
            reason = explain_worker_death(error)
            first_line = (reason or str(error)).strip().partition("\n")[0]
            with suppress(OSError):  # the disk that ended the run may have no room for this line either
                self.say(f"stopped at step {training.steps_done}: {first_line}")
            if reason is not None:
                raise RuntimeError(reason) from error
            raise

    def _save_after(self, error: Exception) -> None:
        if isinstance(error, StoppedError):
            self.save(best=False)
            if self.saver is not None:
                self.saver.wait()
            return
        with suppress(Exception):  # the error that ended the run is the one to report
            self.save(best=False)
            if self.saver is not None:
                self.saver.wait()

    def after_step(self, row: StepRow) -> None:
        """Log, checkpoint, stop: what may be due between two steps."""
        config = self.config
        if self.saver is not None:
            self.saver.check()
        self.steps_since += 1
        self.display.advance(f"loss {row.loss:.3f}")
        if not row.made:
            self.say(f"step {row.step} left out: {row.terms} is not finite, or float16 overflowed")
        if row.step % config.log_interval == 0:
            self._log_step(row)
        self._stop()
        due = config.checkpoint_interval and row.step % config.checkpoint_interval == 0
        if due and self.training.position.step < self.training.steps_per_epoch:
            self.save(best=False)  # the end of an epoch has its own, after validation

    def _stop(self) -> None:
        """Raises StoppedError if a signal came, to any of the processes."""
        code = self.stop.code
        if self.accelerator.num_processes > 1:
            codes = total(self.accelerator, torch.tensor(float(code), device=self.training.device))
            code = code or (143 if float(codes) else 0)
        if code:
            unread = isinstance(self.console, RunConsole) and self.console.unread
            reason = "as nobody reads its output" if unread else "by Ctrl-C" if code == 130 else "by SIGTERM"
            where = f"; continue with --resume {self.folder.path}" if self.folder else ""
            raise StoppedError(f"stopped {reason} after step {self.training.steps_done}{where}", code=code)

    def _stop_in_validation(self) -> None:
        """Before each batch; all processes have the same number of batches, and ask each other at some of them."""
        self.judged_batches += 1
        if self.accelerator.num_processes == 1 or self.judged_batches % _BATCHES_BETWEEN_QUESTIONS == 0:
            self._stop()

    def _log_step(self, row: StepRow) -> None:
        now = time.perf_counter()
        seconds = (now - self.since) / max(1, self.steps_since)
        self.since, self.steps_since = now, 0
        self.say(step_line(row, self.training, seconds))
        if self.folder is not None:
            self.folder.event("step", {**asdict(row), "subnets": [str(subnet) for subnet in row.subnets]})
        self.track({"train_loss": row.loss, "lr": row.lr, **row.terms}, row.step)

    def after_epoch(self, row: EpochRow) -> None:
        """Record and checkpoint of an epoch."""
        position, figures = self.training.position, self.training.task.figures
        score = None if row.eval is None else figures.score(figures.decide(row.eval.main))
        best = score is not None and score > position.best
        if score is not None and best:
            position.best = score
        values = summary(row, self.config)
        if self.folder is not None:
            self.folder.epoch(values)
            if row.eval is not None and row.eval.subnets:
                rows = {str(judged.subnet): figures.decide(judged) for judged in row.eval.subnets}
                self.folder.event("subnets", {"epoch": row.epoch, figures.decisive: rows})
        self.say(epoch_line(row, self.config))
        if self.config.bad_images == "skip":
            replaced = self.training.batches.bad_images
            self._tell_bad_images(f"epoch {row.epoch} took the neighbours of", replaced, row.epoch)
            if row.eval is not None:
                self._tell_bad_images("validation left out", row.eval.bad_images, row.epoch)
        self.trained += row.seconds
        self.track(tracked(row, self.config, values, seconds=self.trained), self.training.steps_done)
        self.save(best=best)
        self.since, self.steps_since = time.perf_counter(), 0
        if not self.training.finished:
            self._stop()

    def _tell_bad_images(self, what: str, names: Sequence[str], epoch: int) -> None:
        """Which images were skipped for the first time, by any process."""
        if self.accelerator.num_processes > 1:
            names = gather_object(list(names))
        new = sorted(set(names) - self.told_bad)
        self.told_bad.update(new)
        if not new:
            return
        some = ", ".join(new[:3]) + (", ..." if len(new) > 3 else "")
        self.say(f"{what} {len(new)} image(s) that cannot be read: {some}")
        if self.folder is not None:
            self.folder.event("bad_images", {"epoch": epoch, "images": new})

    def save(self, *, best: bool) -> None:
        """Begins to write a checkpoint of the present position."""
        weights, state = capture(self.training)
        state |= {"bits_depend_on": bits_depend_on(self.environment), "best": best, "data": self.record}
        state |= {"own_code": self.code} if self.code else {}
        if self.saver is not None:
            self.saver.save(self.training.steps_done, weights, state, best=best)

    def result(self, path: Path) -> TrainResult:
        """Judges the finished network. Who asked for the run says how good it is; here it is only kept."""
        split = "test" if len(self.training.data.test) else "val" if len(self.training.data.val) else "train"
        test = self.training.evaluate(split).main
        figures = self.training.task.figures
        if self.folder is not None:
            self.folder.event("result", {f"{split}_{f.name}": getattr(test, f.name) for f in figures.columns})
            self.folder.log(f"{split} {figures.chief.text(figures.decide(test))}")
        return TrainResult(path, split, test)

    def say(self, line: str) -> None:
        """Shows a line and keeps it in log.txt, on the first process."""
        self.display.line(line)
        if self.folder is not None:
            self.folder.log(line)

    def track(self, values: Mapping[str, Any], step: int) -> None:
        """Sends figures to the trackers."""
        if self.config.trackers:
            self.accelerator.log(dict(values), step=step)
