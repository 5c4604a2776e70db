"""A model and image sets as users write them: module:function for runs of tests."""

import numpy as np
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import tiny

SMALL = 8


def build(num_classes, width=4, kind=None):
    """A network of three blocks, as `tiny` has it."""
    if kind == "broken":
        return {}["depth"]
    if kind == "number":
        return 3
    network = tiny.network(classes=num_classes)
    if kind == "narrow":
        network.stem = torch.nn.Conv2d(2, width, 3)
    return network


def memory():
    """Classes that brightness tells: a pair of tensors and a TensorDataset."""
    images = torch.arange(64).mul(4).to(torch.uint8)[:, None, None, None].expand(-1, 1, SMALL, SMALL).contiguous()
    labels = (torch.arange(64) >= 32).long()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    train, val = order[:48], order[48:]
    return {
        "train": (images[train], labels[train]),
        "val": TensorDataset(images[val], labels[val]),
        "class_names": ["dark", "light"],
    }


class Pictures:
    """Pairs of a picture and two labels, or two numbers."""

    def __init__(self, count, *, broken=-1):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.broken:
            raise RuntimeError("the disk is gone")
        level = 20 * (index % 10)
        return Image.fromarray(np.full((10, 12, 3), level, np.uint8)), [level >= 100, index % 2]


class WithTargets(Pictures):
    """Whose targets need no picture."""

    @property
    def targets(self):
        return [[20 * (index % 10) >= 100, index % 2] for index in range(self.count)]


def pictures(data_dir=None):
    """A split each way; data_dir is where a real one would look."""
    return {"train": WithTargets(32), "val": Pictures(10), "class_names": ["light", str(data_dir)]}


def damaged():
    return {"train": WithTargets(32, broken=5), "val": Pictures(10)}


def numbers():
    return {"train": torch.zeros(3, 3)}


def fails():
    raise LookupError("no such table")
