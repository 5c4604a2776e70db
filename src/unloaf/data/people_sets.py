"""Sets of people with marked joints: their splits, what the joints are called, and which go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from unloaf.config import Config
from unloaf.data.annotated_sets import load_annotated
from unloaf.data.consistency import some
from unloaf.data.sets import Data
from unloaf.printable import printable

DEFAULT_HEIGHT = 256
_SIDES = ("left_", "right_")


def load_people(config: Config) -> Data:
    """Opens the set that a configuration names; its classes are the joints.

    Raises:
        ValueError: files are missing, or do not fit each other or the configuration; images are to be mirrored, and it
            is not known which joints then change places.
    """
    data = load_annotated(config, masks=False)
    if config.hflip:
        mirrored_order(data.class_names)
    height = config.img_size or DEFAULT_HEIGHT
    return replace(data, augment="scale-turn-flip", img_size=height, train_img_size=config.train_img_size or height)


def mirrored_order(names: Sequence[str]) -> list[int]:
    """For each joint the number of the one that stands in its place in a mirrored image.

    Raises:
        ValueError: a left one has no right one, or none of several joints is a left one, so that they may be called
            something else.

    >>> mirrored_order(["nose", "left_eye", "right_eye"])
    [0, 2, 1]
    """
    numbers = {name: at for at, name in enumerate(names)}
    partners = [_partner(name) for name in names]
    alone = [name for name, partner in zip(names, partners, strict=True) if partner not in numbers]
    if alone or (len(names) > 1 and partners == list(names)):
        what = f"{printable(some(alone, 3))} without a joint of the other side" if alone else "none begins so"
        raise ValueError(
            "mirrored images exchange joints whose names begin with left_ and right_, but of "
            f"{printable(some(list(names), 4))}: {what}; rename them in all JSON files, or give --hflip 0"
        )
    return [numbers[partner] for partner in partners]


def _partner(name: str) -> str:
    """The name of the joint on the other side; the same for one in the middle."""
    for side, other in (_SIDES, _SIDES[::-1]):
        if name.startswith(side):
            return other + name.removeprefix(side)
    return name
