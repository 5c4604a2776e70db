"""What a run that goes on, or that is judged, must have in common with its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from unloaf.engine.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, steps_per_epoch
from unloaf.engine.config import Config
from unloaf.engine.errors import CheckpointError
from unloaf.engine.run_folder import FREE_SETTINGS, RunFolder, different_settings
from unloaf.engine.training import Training


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


def check_settings(config: Config, checkpoint: Checkpoint) -> list[str]:
    """Compares the settings of a run with those that its checkpoint was trained with.

    Args:
        config: from the run's args.yaml, which nothing else protects.
        checkpoint: of the run.

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
    bound = [f"{name} {now!r} (there {then!r})" for name, (then, now) in different.items() if name not in FREE_SETTINGS]
    if bound:
        run = checkpoint.path.parent.parent
        raise ValueError(
            f"{run / 'args.yaml'} has other settings than {checkpoint.path.name} was trained with: {', '.join(bound)}; "
            "it was edited or damaged, or the checkpoint is another run's: put the values back, or train anew under "
            "another --name"
        )
    free = [f"{name} {now!r} (was {then!r})" for name, (then, now) in different.items()]
    return [f"not as when {checkpoint.path.name} was written: {', '.join(free)}"] if free else []


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
    return lines
