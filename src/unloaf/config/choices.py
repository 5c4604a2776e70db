"""What the settings with a list of values may be."""

from typing import Literal

Task = Literal["classification", "multilabel", "regression", "masked", "detection", "instance", "semantic", "panoptic",
               "pose", "language"]  # fmt: skip
Dataset = Literal[
    "digits", "cifar10", "cifar100", "fashion_mnist", "imagefolder", "hf", "webdataset", "csv", "coco", "voc", "masks",
    "text",
]  # fmt: skip
Method = Literal["common", "stochastic-depth", "st", "st++", "gkt", "st-star"]
Sampler = Literal["auto", "ordered", "inter-stage", "exponential-decay", "stochastic", "raw"]
SubnetInputs = Literal["auto", "same", "smaller", "larger", "crop", "flip", "jitter"]
Schedule = Literal["cosine", "constant", "step", "multistep", "poly", "tanh", "wsd"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
