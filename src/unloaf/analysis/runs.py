"""Trained runs opened side by side, of which an analysis asks the same; never trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from unloaf.methods.table import METHODS
from unloaf.runs.opened import OpenedRun, Opening, open_trained


def open_alike(runs: Sequence[Path], *, split: str | None = None, **opening: Unpack[Opening]) -> list[OpenedRun]:
    """Opens runs that are compared on the same images.

    Args:
        runs: their folders.
        split: images that each of them must have, "val" or "test".
        opening: see `unloaf.runs.opened.open_trained`.

    Raises:
        ValueError: a folder is not a run, the runs are of different tasks, data or classes, or one has no such images.
        CheckpointError: no checkpoint of a run is intact.
    """
    opened: list[OpenedRun] = []
    for run in dict.fromkeys(runs):
        opened.append(open_trained(run, **opening))
        first, last = opened[0], opened[-1]
        for name, mine, others in zip(_FACTS, _facts(first), _facts(last), strict=True):
            if mine != others:
                raise ValueError(
                    f"{first.run} has {name} {_short(mine)}, {last.run} {_short(others)}; compare runs of the same data"
                )
        if split is not None and not len(getattr(last.training.data, split)):
            raise ValueError(f"{last.run}: {last.training.data.name} has no {split} images")
    return opened


_FACTS = ("task", "data set", "classes", "val images", "test images")


def _facts(opened: OpenedRun) -> tuple[Any, ...]:
    data = opened.training.data
    names = data.class_names or data.num_classes
    return opened.config.task, data.name, names, len(data.val), len(data.test)


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def split_of(opened: OpenedRun, asked: str | None) -> str:
    """The images on which an analysis judges: those asked for, else validation images if there are any."""
    if asked is not None:
        return asked
    return "val" if len(opened.training.data.val) else "test"


def label_of(opened: OpenedRun) -> str:
    """The method of a run as tables and pictures call it."""
    return METHODS[opened.config.method].label


def names_of(opened: Sequence[OpenedRun]) -> list[str]:
    """A name for each run that tells it from the others: that of its folder, or else its path."""
    names = [run.run.resolve().name for run in opened]
    return [name if names.count(name) == 1 else str(run.run) for name, run in zip(names, opened, strict=True)]
