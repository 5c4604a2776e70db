"""Small residual networks for tests: two stages of three blocks, the first of which changes the width."""

import torch
from torch import nn


class Block(nn.Module):
    """``x + f(x)``, or ``f(x)`` where the width changes."""

    def __init__(self, width_in, width, *, norm=False, dropout=0.0):
        super().__init__()
        self.inner = nn.Linear(width_in, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(width, width, bias=False)

    def forward(self, x):
        y = self.outer(self.dropout(torch.tanh(self.norm(self.inner(x)))))
        return x + y if x.shape == y.shape else y


def stage(width_in, width, depth, **options):
    return nn.Sequential(*(Block(width_in if i == 0 else width, width, **options) for i in range(depth)))


class ToyNetwork(nn.Module):
    """(batch, 4) -> (batch, classes); stages ``first`` and ``second``, each (unskippable, skippable, skippable)."""

    def __init__(self, classes=3, depths=(3, 3), **options):
        super().__init__()
        self.first = stage(4, 6, depths[0], **options)
        self.second = stage(6, 5, depths[1], **options)
        self.head = nn.Linear(5, classes)

    def forward(self, x):
        return self.head(self.second(self.first(x)))
