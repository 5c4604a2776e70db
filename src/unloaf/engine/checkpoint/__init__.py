"""Checkpoints on the disk: written whole or not at all, and never trusted when read.

`store` has their life, `progress` their order; `capture` and `saver` make them of a run.
"""

from unloaf.engine.checkpoint.progress import position_text, steps_per_epoch
from unloaf.engine.checkpoint.store import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)

__all__ = [
    "Checkpoint",
    "load_checkpoint",
    "newest_checkpoint",
    "position_text",
    "prune_checkpoints",
    "save_checkpoint",
    "steps_per_epoch",
]
