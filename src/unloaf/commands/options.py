"""Checks of options that several commands have. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

_STAGE = "[0-9]{1,4}(:[01]+)?"  # a depth, and perhaps which blocks are kept


def check_depths(depths: str | None) -> None:
    """Raises ValueError if this is no list of depths; whether a network has them is found out later."""
    if depths is not None and not re.fullmatch(f"{_STAGE}([-,]{_STAGE})*", depths):
        raise ValueError(f"depths {depths!r}: give a number for each stage, as in 3,3,5,3, or 2:101 for its blocks")


def check_subnets(subnets: str | None) -> None:
    """Raises ValueError if this is neither all nor pareto nor a number of subnets."""
    number = re.fullmatch("[0-9]{1,5}", subnets or "")
    if subnets not in (None, "all", "pareto") and not (number and int(number[0])):
        raise ValueError(f"subnets {subnets!r}: give all, pareto or a number from 1 to 99999")


def check_least(options: Any, **least: int) -> None:
    """Raises ValueError if an option is given and lower than this."""
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and value < low:
            raise ValueError(f"{name} {value}: give at least {low}")
