"""Image sets and their batches.

`load_data` opens and checks a set, `TrainBatches` and `EvalBatches` feed it, `check_images` scans it for bad files.
"""

from unloaf.data.batches import Batch, EvalBatches, TrainBatches
from unloaf.data.check import CheckReport, check_images
from unloaf.data.images import Images, ImageSet
from unloaf.data.in_memory import SPLIT_SEED
from unloaf.data.reading import explain_worker_death
from unloaf.data.sets import Data, load_data

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
