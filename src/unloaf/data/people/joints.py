"""What joints are called, and which change places in a mirrored image."""

from __future__ import annotations

from collections.abc import Sequence

from unloaf.data.consistency import some
from unloaf.printable import printable

_SIDES = ("left_", "right_")


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
