"""Whether the images of today are those of a run: when it is resumed, evaluated or exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unloaf.data.consistency import some
from unloaf.data.fingerprint import SPLITS, Row, changes, class_names_of, record_of, trained_on
from unloaf.data.sets import Data
from unloaf.printable import printable


def _check_classes(data: Data, record: Mapping[str, Any], *, place: str | None) -> None:
    """Raises ValueError unless the classes of an image set are those of a run's record, in the same order.

    Where one of the two has no names, only numbers, their count is compared.
    """
    had, now = record["class_names"], class_names_of(data)
    where = printable(place or data.name)
    if had is None or now is None:
        if record["num_classes"] != data.num_classes:
            raise ValueError(
                f"{where} has {data.num_classes} classes, but the run learned {record['num_classes']}; give images of "
                "the same classes"
            )
    elif had != now:
        missing, extra = sorted(set(had) - set(now)), sorted(set(now) - set(had))
        first = next((i for i, (a, b) in enumerate(zip(had, now, strict=False)) if a != b), min(len(had), len(now)))
        one, other = (names[first] if first < len(names) else "none" for names in (had, now))
        parts = [f"missing there: {some(missing)}"] * bool(missing) + [f"only there: {some(extra)}"] * bool(extra)
        raise ValueError(
            f"the classes of {where} are not those that the run learned: {some(had)} ({len(had)}) in the run, "
            f"{some(now)} ({len(now)}) there; class {first} is {one} in the run and {other} there; "
            f"{'; '.join(parts) or 'their order differs'}; give images of the same classes, by the same names"
        )


def check_resumed(
    data: Data,
    now: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    listed: list[Row] | None,
    *,
    checkpoint: str,
    allow: bool,
) -> list[str]:
    """Compares the images of a resumed run with the record in its checkpoint; lines on what is not the same.

    Raises:
        ValueError: the classes differ, or without `allow` the images do.
    """
    if record is None:
        return [f"{checkpoint} does not say on which images it was trained: they were not compared"]
    _check_classes(data, record, place=None)
    other = [split for split in SPLITS if now["splits"][split] != record["splits"][split]]
    if not {"train", "val"} & set(other):
        return ["the test images are not those that the run began with"] if other else []
    what = changes(listed, data, record, now)
    if not allow:
        raise ValueError(
            f"the images are not those that {checkpoint} was trained on: {what}; put them back, or continue "
            "with them by --allow-changed-data"
        )
    return [f"continues with other images than those before: {what}"]


def check_judged(
    data: Data, record: Mapping[str, Any] | None, listed: list[Row] | None, *, own: str | None, place: str | None
) -> list[str]:
    """Compares the images that evaluate a run with the record in its checkpoint; lines on what is not the same.

    Images in another place than the run's own may be others, of the same classes.

    Raises:
        ValueError: the classes differ, or validation images are held out of other images than in training, so that
            some of them were trained on.
    """
    if record is None:
        return ["the run has no class names: it was not compared whether these images have its classes"]
    _check_classes(data, record, place=place or own)
    now = record_of(data)
    other = [name for name in SPLITS if now["splits"][name] != record["splits"][name]]
    notes = [f"{name}: {now['splits'][name]['images']} images that are not those of the run" for name in other]
    if "val" in other and record["held_out"] and now["held_out"]:
        count = trained_on(listed, data)
        drawn = f"{'some' if count is None else count} of the {len(data.val)} validation images were trained on"
        if place is None:
            what = changes(listed, data, record, now)
            raise ValueError(
                f"images were added or removed since the training, and the validation images are drawn again: {drawn} "
                f"({what}); put the images back, or give the --data-dir of other images"
            )
        notes += [f"by their names {drawn}"] if count else []
    return notes
