"""Checkpoints on the disk: written whole or not at all, and never trusted when read.

`store` has their life, `progress` their order.
"""

from unloaf.engine.checkpoint.progress import position_text, steps_per_epoch
from unloaf.engine.checkpoint.store import (
    Checkpoint,
    clean_up,
    load_checkpoint,
    newest_checkpoint,
    point_to,
    prune_checkpoints,
    save_checkpoint,
)

__all__ = [
    "Checkpoint",
    "clean_up",
    "load_checkpoint",
    "newest_checkpoint",
    "point_to",
    "position_text",
    "prune_checkpoints",
    "save_checkpoint",
    "steps_per_epoch",
]
