"""How far the training of a checkpoint had come: what orders checkpoints, whatever their numbers are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unloaf.errors import CheckpointError
from unloaf.files.manifest import read_manifest
from unloaf.files.state_tree import read_state

_KEY = "unloaf_position"


def position_text(position: Mapping[str, Any]) -> dict[str, str]:
    """The position of a run as metadata of its checkpoint, so that checkpoints are ordered by their manifests alone."""
    return {_KEY: json.dumps({name: position[name] for name in ("epoch", "step", "steps_per_epoch")})}


def steps_per_epoch(position: Mapping[str, Any], steps: int) -> int | None:
    """Optimizer steps of an epoch, when the position was saved.

    Args:
        position: of a state.
        steps: the number of the checkpoint; unloaf 0.1, which did not keep the steps of an epoch, counted
            ``(epoch - 1) * steps_per_epoch + step``.

    Returns:
        None where nothing says it: in the first epoch of such a run.

    >>> steps_per_epoch({"epoch": 3, "step": 2, "steps_per_epoch": 5}, 40)
    5
    >>> steps_per_epoch({"epoch": 3, "step": 2}, 12)
    5
    >>> steps_per_epoch({"epoch": 1, "step": 2}, 2)
    """
    if "steps_per_epoch" in position:
        return position["steps_per_epoch"]
    epochs, before = position["epoch"] - 1, steps - position["step"]
    return before // epochs if epochs and before >= epochs and before % epochs == 0 else None


def number_of(folder: Path) -> tuple[int, int]:
    """The steps of a step folder, and how often they had been saved before.

    >>> number_of(Path("step-00000012")), number_of(Path("step-00000012.1"))
    ((12, 0), (12, 1))
    """
    steps, _, before = folder.name.removeprefix("step-").partition(".")
    return int(steps), int(before or 0)


def progress(folder: Path) -> tuple[float, int, int]:
    """Epochs trained, and the number of a step folder; inf for one that cannot be read, which is reported."""
    number = number_of(folder)
    try:
        manifest = read_manifest(folder)
        text = manifest.metadata.get(_KEY)
        position: Any = json.loads(text) if text is not None else read_state(folder, manifest.version).get("position")
    except CheckpointError:
        return math.inf, *number
    try:
        steps = steps_per_epoch(position, number[0])
        # In an epoch of unknown length: further with each step, and never at its end.
        share = position["step"] / steps if steps else 1 - 1 / (1 + position["step"])
        return position["epoch"] - 1 + share, *number
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0.0, *number  # a state of something else than a run
