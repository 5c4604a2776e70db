"""Whether the settings of a run that is resumed or evaluated are those it was trained with. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unloaf.config import Config
from unloaf.config.names import current_names
from unloaf.errors import CheckpointError

if TYPE_CHECKING:
    from unloaf.engine.checkpoint import Checkpoint

# Settings that may change when a run is resumed: they decide where and how it runs, not what it learns.
FREE_SETTINGS = frozenset({
    "bad_images", "checkpoint_hist", "checkpoint_interval", "data_dir", "device", "device_data", "initial_checkpoint",
    "log_interval", "name", "on_nan", "output", "trackers", "workers",
})  # fmt: skip


def check_settings(config: Config, checkpoint: Checkpoint, *, longer_than: int | None = None) -> list[str]:
    """Compares the settings of a run with those that its checkpoint was trained with.

    They are from args.yaml, which nothing else protects; `longer_than` are the epochs that the run was to have, where
    more are asked for now. Returns lines on settings that may differ and do.

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
            "it was edited or damaged, or the checkpoint is another run's: put the values back, or train again under "
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


def lengths(run: Path) -> list[int]:
    """The numbers of epochs that a run was to have, one after the other; none where it was never made longer.

    Raises:
        ValueError: the record cannot be read.
    """
    try:
        lines = (run / "changes.jsonl").read_text(encoding="utf-8").splitlines()
        found = [(int(change["before"]), int(change["now"])) for change in map(json.loads, lines)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run / 'changes.jsonl'} cannot be read ({error}); take it from a backup") from error
    return [found[0][0], *(now for _, now in found)] if found else []


def different_settings(config: Config, before: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, as (before, now); what an older unloaf did not know had its default value."""
    named = current_names(before).items()
    had = dataclasses.asdict(Config()) | {k: tuple(v) if isinstance(v, list) else v for k, v in named}
    return {name: (had[name], now) for name, now in dataclasses.asdict(config).items() if had[name] != now}


def check_same(config: Config, begun: Config, path: Path) -> None:
    """Raises ValueError if the run in this folder, begun with other settings, cannot continue with these."""
    free = set(FREE_SETTINGS)
    if not any(path.glob("checkpoints/step-*")):
        free.remove("initial_checkpoint")  # it is where this run will start from
    different = different_settings(config, dataclasses.asdict(begun))
    other = {name: values for name, values in different.items() if name not in free}
    if config.epochs > begun.epochs:
        del other["epochs"]  # a run may be made longer
    if other:
        differences = ", ".join(f"{name} {had} (now {now})" for name, (had, now) in other.items())
        raise ValueError(
            f"run {path} was begun with {differences}; resume with the same settings (unloaf train --resume {path}; "
            "epochs may grow), or give another --name"
        )
