"""What the list of recipes knows about each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unloaf.config import Config


@dataclass(frozen=True)
class Recipe:
    """A recipe and what was published about it.

    Args:
        config: the function.
        published: top-1, mAP or AP in percent of the main network, as printed in `source`; empty where nothing was
            published.
        source: where the settings or the figure come from.
    """

    config: Callable[..., Config]
    published: str = ""
    source: str = ""
