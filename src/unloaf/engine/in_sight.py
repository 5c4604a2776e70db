"""Whether the checkpoints of a run can be seen where it has some. Imports no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

_STEP = re.compile(r"step-\d{8,}")


def checkpoints_in_sight(run: Path) -> bool:
    """Whether a run that was begun has checkpoints.

    Raises:
        ValueError: none can be seen, though the run wrote some: going on without them would begin anew.
    """
    folder = run / "checkpoints"
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        found = f"is a link to {folder.readlink()}, where nothing is" if folder.is_symlink() else "is missing"
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be read ({error.strerror}), and with it the checkpoints of the run; make it a folder "
            "that you may read, or train anew under another --name"
        ) from error
    else:
        if any(_STEP.fullmatch(name) for name in names):
            return True
        found = f"holds {', '.join(names[:3])} and no checkpoint" if names else "is empty"
    traces = _traces(run)
    if traces:
        raise ValueError(
            f"{folder} {found}, but there were checkpoints: {'; '.join(traces)}; bring it back (mount its disk, undo a "
            "renaming, copy it from a backup), or train anew under another --name"
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
