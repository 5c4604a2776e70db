"""Image sets and their batches.

`load_data` opens and checks a set, `TrainBatches` and `EvalBatches` feed it, `check_images` scans it for bad files.
"""

from unloaf.engine.data.batches import Batch, EvalBatches, TrainBatches
from unloaf.engine.data.check import CheckReport, check_images
from unloaf.engine.data.images import Images, ImageSet
from unloaf.engine.data.memory import SPLIT_SEED
from unloaf.engine.data.reading import explain_worker_death
from unloaf.engine.data.sets import Data, load_data

__all__ = [
    "SPLIT_SEED",
    "Batch",
    "CheckReport",
    "Data",
    "EvalBatches",
    "ImageSet",
    "Images",
    "TrainBatches",
    "check_images",
    "explain_worker_death",
    "load_data",
]
