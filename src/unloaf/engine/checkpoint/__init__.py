"""Checkpoints on the disk: written whole or not at all, and never trusted when read.

`store` has their life, `progress` their order, `manifest` what they must be, `tensorfiles` the formats.
"""

from unloaf.engine.checkpoint.manifest import flush, sha256
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
from unloaf.engine.checkpoint.tensorfiles import load_strictly, plain_state, read_weights, untied, write_weights

__all__ = [
    "Checkpoint",
    "clean_up",
    "flush",
    "load_checkpoint",
    "load_strictly",
    "newest_checkpoint",
    "plain_state",
    "point_to",
    "position_text",
    "prune_checkpoints",
    "read_weights",
    "save_checkpoint",
    "sha256",
    "steps_per_epoch",
    "untied",
    "write_weights",
]
