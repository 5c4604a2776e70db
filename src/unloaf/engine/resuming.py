"""What a run that goes on, or that is judged, must have in common with its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from unloaf.config import Config
from unloaf.engine.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, steps_per_epoch
from unloaf.engine.run_folder import FREE_SETTINGS, RunFolder, different_settings, lengths
from unloaf.engine.setup import Training
from unloaf.errors import CheckpointError


def on_all(accelerator: Accelerator, value: Any) -> Any:
    """What the first process says, on every process."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def find_checkpoint(accelerator: Accelerator, folder: RunFolder | None) -> tuple[Checkpoint | None, list[str]]:
    """The newest good checkpoint of a run that goes on, and what is to be said of the damaged ones."""
    found: tuple[Checkpoint | None, list[str]] = (None, [])
    if folder is not None and folder.checkpoints.is_dir():
        found = newest_checkpoint(folder.checkpoints)
    checkpoint, notes = found
    path = on_all(accelerator, str(checkpoint.path) if checkpoint else None)
    if checkpoint is None and path is not None:
        checkpoint = load_checkpoint(Path(path))
    return checkpoint, notes


def check_settings(config: Config, checkpoint: Checkpoint, *, longer_than: int | None = None) -> list[str]:
    """Compares the settings of a run with those that its checkpoint was trained with.

    Args:
        config: from the run's args.yaml, which nothing else protects.
        checkpoint: of the run.
        longer_than: the epochs that the run was to have, where more are asked for now.

    Returns:
        lines on settings that may differ and do.

    Raises:
        ValueError: a setting differs that decides what is learned.
        CheckpointError: the checkpoint's own settings cannot be read.
    """
    text = checkpoint.metadata.get("unloaf_config")
    if text is None:
        return [f"{checkpoint.path.name} does not say with which settings it was trained: they were not compared"]
    try:
        different = different_settings(config, dict(json.loads(text)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: its settings cannot be read ({error}); take another copy") from error
    run = checkpoint.path.parent.parent
    if "epochs" in different and _grew(run, *different["epochs"], longer_than):
        del different["epochs"]
    bound = [f"{name} {now!r} (there {then!r})" for name, (then, now) in different.items() if name not in FREE_SETTINGS]
    if bound:
        raise ValueError(
            f"{run / 'args.yaml'} has other settings than {checkpoint.path.name} was trained with: {', '.join(bound)}; "
            "it was edited or damaged, or the checkpoint is another run's: put the values back, or train anew under "
            "another --name"
        )
    free = [f"{name} {now!r} (was {then!r})" for name, (then, now) in different.items()]
    return [f"not as when {checkpoint.path.name} was written: {', '.join(free)}"] if free else []


def _grew(run: Path, then: Any, now: int, longer_than: int | None) -> bool:
    """Whether the run was made that much longer by --epochs, now or before."""
    known: list[Any] = lengths(run) or [longer_than]
    if longer_than in known and longer_than != now:
        known.append(now)
    return then in known and now in known[known.index(then) :]


def opening_lines(training: Training, checkpoint: Checkpoint) -> list[str]:
    """Where a resumed run goes on, and what becomes of its schedule if an epoch has other steps now."""
    lines = [f"resumed at step {training.steps_done} (epoch {training.position.epoch})"]
    position: Any = checkpoint.state["position"]
    before, now = steps_per_epoch(position, checkpoint.step), training.steps_per_epoch
    if before is not None and before != now:
        lines.append(
            f"an epoch has {now} steps now, it had {before}: the run and its schedule go on at the same share of epoch "
            f"{training.position.epoch}, after {training.position.step} of {now} steps ({position['step']} of {before} "
            f"before), and the numbers of steps only grow"
        )
    then = json.loads(checkpoint.metadata.get("unloaf_config", "{}")).get("epochs", training.config.epochs)
    return lines + _longer(training, then) if then < training.config.epochs else lines


def _longer(training: Training, before: int) -> list[str]:
    """What it means for a run that it is to have more epochs than its checkpoint knows of."""
    config, position = training.config, training.position
    told = [f"longer: {config.epochs} epochs instead of {before}, from epoch {position.epoch} on"]
    if config.sched in ("constant", "step", "multistep"):
        told.append(f"--sched {config.sched} goes on as it was: it does not look at the number of epochs")
    else:
        now = training.optimizer.param_groups[0]["lr"]
        told.append(
            f"--sched {config.sched} is that of {config.epochs} epochs from here on: the learning rate was "
            f"{position.lr:.3g} and is {now:.3g} now; a run of {config.epochs} epochs from the beginning would have "
            "had another until here"
        )
    if config.subnet_schedule != "constant":
        told.append(f"--subnet-schedule {config.subnet_schedule} is that of {config.epochs} epochs from here on, too")
    return told
