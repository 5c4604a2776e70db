"""Recipes for COCO 2017, fine-tuning of detectors and Panoptic FPN with a ResNet-50 backbone: `data_dir` has
`annotations`, `train2017` and `val2017`.

None of them has been run to its end in this project: the figures, mAP in percent, are those of Ye et al. 2023, whose
frameworks were mmdetection's; these are torchvision's, or made of its parts. The paper states the optimizer, its
learning rate and its weight decay. The rest is mmdetection's usual schedule: 12 epochs, 16 images a step, ten times
less after 8 and 11 epochs, shorter side 800. It warms up over 500 steps, here over the first epoch; it freezes the stem
and the first stage, here they are trained. For SGD the tables of detectors print the learning rate and weight decay of
AdamW; taken are 0.02 and 1e-4, those of all other tables with SGD.

The backbone starts from published weights. For rows R50-ST and R50-ST* give the run or file of a ResNet-50 that was
trained by ST++: `--no-pretrained --backbone-weights RUN`.

Pose is in table XIII: AP of keypoints in percent, Adam alone, no ST*; its frameworks were mmpose's.
"""

from __future__ import annotations

from functools import partial
from itertools import product

from unloaf.config import Config
from unloaf.config.choices import Task
from unloaf.recipes.entry import Recipe

_TASKS: dict[str, Task] = {"mask-rcnn": "instance", "panoptic-fpn": "panoptic"}


def fine_tuning(model: str, *, method: str, opt: str) -> Config:
    """Fine-tuning of Faster R-CNN, Cascade R-CNN, FCOS, ATSS, Mask R-CNN or Panoptic FPN, tables VI to XI of Ye et al.
    2023.

    Published mAP in this order, of masks for Mask R-CNN: common fine-tuning from R50-base, by AdamW 38.1, 41.4, 36.0,
    39.4 and 35.8, by SGD 37.2, 40.2, 36.3, 39.3 and 34.5; from R50-ST 40.0, 43.4, 38.1, 41.7 and 37.1, by SGD 38.3,
    41.3, 37.7, 41.0 and 35.4; ST* from R50-ST 41.9, 45.1, 40.7, 43.6 and 38.6, by SGD 40.1, 43.3, 38.7, 42.6 and 37.0.
    Published PQ of Panoptic FPN: 41.8, 42.5 and 43.5, by SGD 39.8, 40.8 and 41.3.

    ST*: one inter-stage subnet of the backbone in each step, on images of 0.43 to 1 of the side, taught by the objects;
    the paper does not state how many.
    """
    adamw = opt == "adamw"
    return Config(
        task=_TASKS.get(model, "detection"),
        dataset="coco",
        data_dir="data/coco",
        img_size=800,
        model=model,
        backbone="timm/resnet50",
        pretrained=True,
        method="st-star" if method == "st-star" else "common",
        epochs=12,
        warmup_epochs=1,
        batch_size=2,
        global_batch_size=16,
        opt="adamw" if adamw else "momentum",
        lr=1e-4 if adamw else 0.02,
        weight_decay=0.1 if adamw else 1e-4,
        sched="multistep",
        decay_milestones=(8, 11),
        decay_rate=0.1,
    )


def pose(method: str) -> Config:
    """SimpleBaseline2D, table XIII of Ye et al. 2023: common fine-tuning, and ST* with the same settings.

    Published AP with common fine-tuning, 256 x 192 pixels: 71.73 from R50-base, 72.23 from R50-ST; ST* is not reported,
    nor is another optimizer than Adam. The learning rate is the paper's. The rest is mmpose's usual schedule: 210
    epochs, ten times less after 170 and 200, 512 people a step; it warms up over 500 steps, here over the first epoch.
    The published AP is that of boxes of a detector and with mirrored images averaged in; AP here is that of the
    annotated boxes, without, and so compares with itself alone.
    """
    return Config(
        task="pose",
        dataset="coco",
        data_dir="data/coco",
        img_size=256,
        model="simple-baseline",
        backbone="timm/resnet50",
        backbone_norms="batch",
        pretrained=True,
        method=method,  # type: ignore[arg-type]
        epochs=210,
        warmup_epochs=1,
        batch_size=64,
        global_batch_size=512,
        opt="adam",
        lr=5e-4,
        weight_decay=0.0,
        sched="multistep",
        decay_milestones=(170, 200),
        decay_rate=0.1,
    )


# By model, method and optimizer: common from R50-base, ST* from R50-ST.
_PUBLISHED = {
    ("faster-rcnn", "common"): ("38.1", "37.2"),
    ("faster-rcnn", "st-star"): ("41.9", "40.1"),
    ("cascade-rcnn", "common"): ("41.4", "40.2"),
    ("cascade-rcnn", "st-star"): ("45.1", "43.3"),
    ("fcos", "common"): ("36.0", "36.3"),
    ("fcos", "st-star"): ("40.7", "38.7"),
    ("atss", "common"): ("39.4", "39.3"),
    ("atss", "st-star"): ("43.6", "42.6"),
    ("mask-rcnn", "common"): ("35.8", "34.5"),
    ("mask-rcnn", "st-star"): ("38.6", "37.0"),
    ("panoptic-fpn", "common"): ("41.8", "39.8"),
    ("panoptic-fpn", "st-star"): ("43.5", "41.3"),
}
RECIPES: dict[str, Recipe] = {
    f"coco_{opt}_{model}_{method}".replace("-", "_"): Recipe(
        partial(fine_tuning, model, method=method, opt=opt),
        published[opt == "sgd"],
        "Ye et al. 2023, tables VI to XI; schedule of mmdetection",
    )
    for ((model, method), published), opt in product(_PUBLISHED.items(), ("adamw", "sgd"))
}
RECIPES |= {
    "coco_adam_simple_baseline_common": Recipe(
        partial(pose, "common"), "71.73", "Ye et al. 2023, table XIII; schedule of mmpose"
    ),
    "coco_adam_simple_baseline_st_star": Recipe(
        partial(pose, "st-star"), source="Ye et al. 2023, table XIII; schedule of mmpose"
    ),
}
