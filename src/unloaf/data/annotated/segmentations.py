"""COCO's segmentations of objects, polygons and run-length encodings, checked before any library decodes them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from unloaf.config.checks import brief


def segmentation_text(segmentation: Any, size: tuple[int, int], name: str) -> bytes:
    """A segmentation of an image of this size, (height, width), as JSON.

    What no mask can be made of is refused here: the decoder takes a NaN for a number, and memory for a point far away.

    Raises:
        ValueError: it is neither polygons nor RLE, of another size, or does not fit the image; `name` is its object.
    """
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), (str, list)):
        _check_runs(segmentation, size, name)
    elif isinstance(segmentation, list) and segmentation and all(map(_is_polygon, segmentation)):
        _check_inside(segmentation, size, name)
    else:
        raise ValueError(
            f"{name}: segmentation {brief(segmentation)}; give polygons of at least 3 points, or COCO's RLE"
        )
    return json.dumps(segmentation).encode()


def is_number(value: Any) -> bool:
    """Whether it is one, and a float can have it; NaN and infinity are.

    >>> is_number(3), is_number(True), is_number(10**400)
    (True, False, False)
    """
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)


def _is_polygon(points: Any) -> bool:
    return isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0 and all(map(is_number, points))


def _check_inside(polygons: Sequence[Sequence[float]], size: tuple[int, int], name: str) -> None:
    height, width = size
    across, down = ([x for one in polygons for x in one[first::2]] for first in (0, 1))
    extents = (min(across), min(down), max(across), max(down))
    near = math.isfinite(sum(across) + sum(down))  # extents alone may miss a NaN
    near = near and -width <= extents[0] and extents[2] <= 2 * width
    near = near and -height <= extents[1] and extents[3] <= 2 * height
    if not near or extents[2] <= 0 or extents[3] <= 0 or extents[0] >= width or extents[1] >= height:
        raise ValueError(
            f"{name}: its segmentation, from ({extents[0]:g}, {extents[1]:g}) to ({extents[2]:g}, {extents[3]:g}), "
            f"does not lie in its image of {width} x {height} pixels; correct or remove it"
        )


def _check_runs(segmentation: Any, size: tuple[int, int], name: str) -> None:
    given, counts = segmentation.get("size"), segmentation["counts"]
    if not isinstance(given, list) or given != list(size) or not all(type(side) is int for side in given):
        raise ValueError(
            f"{name}: its mask is of height and width {brief(given)}, its image of {list(size)}; correct one of them"
        )
    runs = _decompressed(counts) if isinstance(counts, str) else counts
    if not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != size[0] * size[1]:
        raise ValueError(
            f"{name}: its RLE {brief(counts)} does not have the {size[0] * size[1]} pixels of its image; correct or "
            "remove it"
        )


def _decompressed(text: str) -> list[int]:
    """Run lengths of a compressed RLE, as pycocotools writes them: groups of 5 bits, in units of the run before the
    last; [] for what is none.

    >>> _decompressed("0T")
    []
    >>> _decompressed("11")
    [1, 1]
    """
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 30:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return [] if shift else runs
