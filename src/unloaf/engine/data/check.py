"""Opening every image of a set before a long run does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from unloaf.engine.config import Config
from unloaf.engine.data.images import BadImageError, Images
from unloaf.engine.data.sets import load_data


@dataclass(frozen=True)
class CheckReport:
    """Images per split and class, and the (name, reason) of each image that cannot be read."""

    counts: dict[str, dict[str, int]]
    bad: tuple[tuple[str, str], ...]


def check_images(config: Config) -> CheckReport:
    """Decodes every image of every split, with config.workers threads.

    Raises:
        ValueError: the set cannot be opened at all; see load_data.

    >>> report = check_images(Config(dataset="digits"))
    >>> report.counts["val"]["0"], report.bad
    (30, ())
    """
    data = load_data(config)
    splits = {"train": data.train, "val": data.val} | ({} if data.test is data.val else {"test": data.test})
    with ThreadPoolExecutor(max(1, config.workers)) as pool:
        problems = [
            problem
            for images in splits.values()
            for problem in pool.map(lambda index, images=images: _problem(images, index), range(len(images)))
            if problem is not None
        ]
    return CheckReport({name: _counts(images, data.class_names) for name, images in splits.items()}, tuple(problems))


def _problem(images: Images, index: int) -> tuple[str, str] | None:
    try:
        images.open(index)
    except BadImageError as error:
        return error.name, error.reason
    return None


def _counts(images: Images, class_names: tuple[str, ...]) -> dict[str, int]:
    counts = images.labels.bincount(minlength=len(class_names)).tolist()
    return dict(zip(class_names, counts, strict=True))
