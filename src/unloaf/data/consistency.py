"""Whether the splits of an image set fit each other and the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from unloaf.config import Config
from unloaf.data.images import Images, Split

EXPECTED = {
    "imagefolder": "{split}/CLASS/*.jpg (one folder for each class)",
    "hf": "what datasets' save_to_disk wrote, with a split {split}, or {split}*.parquet",
    "webdataset": "{split}*.tar with KEY.jpg and KEY.cls inside",
}


class FoundSplits(NamedTuple):
    """The splits that could be opened; `faults` says in a line each why another one could not.

    `test` is `val` itself where there are only test images. `notes` are for whoever uses the set.
    """

    train: Split | None
    val: Split | None
    test: Split | None
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def class_names_of(config: Config, train: Split) -> tuple[str, ...]:
    """Names of the classes of a set without faults; where labels are numbers, those are their names."""
    return train.class_names or tuple(map(str, range(_count(config, train))))


def _count(config: Config, train: Split) -> int:
    """Classes: those with a name, as many as the configuration says, or up to the largest label."""
    if train.class_names is not None:
        return len(train.class_names)
    highest = int(train.images.labels.max()) if len(train.images) else 0
    return config.num_classes or max(highest, 1) + 1


def disagreements(config: Config, found: FoundSplits) -> Iterator[str]:
    """All that is wrong with splits that could be opened, a line each: what is wrong, and what to do."""
    train = found.train
    if train is not None:
        yield from _of_training(config, train, config.train_split)
    for split, name in ((found.val, config.val_split or "validation"), (found.test, "test")):
        if split is None or (name == "test" and split is found.val):
            continue
        if len(split.images) == 0:
            yield _no_image(config, name)
        elif train is not None and train.class_names != split.class_names:
            yield _other_names(train, split, name=name)
        elif train is not None:
            yield from _labels_outside(split.images, _count(config, train), split=name)


def _of_training(config: Config, train: Split, where: str) -> Iterator[str]:
    if len(train.images) == 0:
        yield _no_image(config, where)
        return
    count, labels = _count(config, train), train.images.labels
    if config.num_classes not in (None, count):
        yield wrong_count(config, count)
    if train.class_names is not None and count < 2:
        yield f"{train.class_names[0]} is the only class of {where}; give at least 2, each with a folder or label"
    elif config.num_classes is None and train.class_names is None and int(labels.min()) == int(labels.max()):
        yield f"all images of {where} have label {int(labels[0])}; give --num-classes or at least 2 classes"
    yield from _labels_outside(train.images, count, split=where)
    yield from _empty_classes(train, count, split=where)


def wrong_count(config: Config, count: int) -> str:
    """The fault of a configuration that names another number of classes."""
    return (
        f"num_classes {config.num_classes}, but {config.dataset} has {count} classes; "
        f"give --num-classes {count} or leave it out"
    )


def _no_image(config: Config, where: str) -> str:
    expected = EXPECTED[config.dataset].format(split=where)
    return f"{config.dataset} in {config.data_dir}: no image in {where}; expected {expected}"


def _other_names(train: Split, other: Split, *, name: str) -> str:
    ours, theirs = set(train.class_names or ()), set(other.class_names or ())
    missing, extra = sorted(ours - theirs), sorted(theirs - ours)
    parts = [f"missing there: {some(missing)}"] * bool(missing) + [f"only there: {some(extra)}"] * bool(extra)
    return (
        f"the classes of {name} differ from the {len(ours)} classes of the training images; "
        f"{'; '.join(parts) or 'their order differs'}; give both the same class names"
    )


def _labels_outside(images: Images, count: int, *, split: str) -> Iterator[str]:
    wrong = ((images.labels < 0) | (images.labels >= count)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        yield (
            f"label {int(images.labels[first])} of image {images.name(first)} is not from 0 to {count - 1} "
            f"({len(wrong)} such labels in {split}); correct the labels or --num-classes"
        )


def _empty_classes(train: Split, count: int, *, split: str) -> Iterator[str]:
    there = set(train.images.labels.unique().tolist())
    empty = count - sum(0 <= label < count for label in there)
    if empty:
        # Not all of them by name: a single label of 10**9 makes a billion.
        missing = islice((number for number in range(count) if number not in there), 6)
        names = [train.class_names[number] if train.class_names else str(number) for number in missing]
        yield (
            f"{empty} of {count} classes have no image in {split}: {some(names, total=empty)}; "
            "add images, or remove the class everywhere"
        )


def some(names: Sequence[str], limit: int = 5, *, total: int | None = None) -> str:
    """The first of so many names, by default of those given, and how many more there are."""
    more = (len(names) if total is None else total) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
