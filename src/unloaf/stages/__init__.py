"""Where a model's residual blocks are: found by what the blocks compute, not by their class names."""

from unloaf.stages.find import find_stages
from unloaf.stages.modes import evaluating, modes_kept
from unloaf.stages.replayable import between_blocks
from unloaf.stages.stage import (
    Form,
    NoResidualBlocksError,
    Stage,
    call_model,
    copy_of,
    inner_module,
    is_list_of_images,
    result_of,
    stand_in,
)

__all__ = [
    "Form",
    "NoResidualBlocksError",
    "Stage",
    "between_blocks",
    "call_model",
    "copy_of",
    "evaluating",
    "find_stages",
    "inner_module",
    "is_list_of_images",
    "modes_kept",
    "result_of",
    "stand_in",
]
