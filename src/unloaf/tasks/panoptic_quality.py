"""Panoptic quality: how well predicted segments match the true ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quality:
    """Panoptic (pq), segmentation (sq) and recognition quality (rq), in percent, of all classes, and of things and
    stuff alone: means over the classes that are there or were predicted; NaN where there is none.
    """

    pq: float
    sq: float
    rq: float
    pq_things: float
    sq_things: float
    rq_things: float
    pq_stuff: float
    sq_stuff: float
    rq_stuff: float


def matches(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], classes: int) -> Tensor:
    """Of each class the summed IoU of the matched pairs, and how many are matched, predicted in vain and missed.

    A predicted and a true segment of one class match where their IoU is above 0.5; pixels that are void in the truth do
    not count in their union. A prediction that matches none is not blamed if more than half of it is void or crowd of
    its class. Crowds are neither matched nor missed.

    Args:
        found: `segments`, int64 (H, W), -1 for none, and `labels`, int64 (n,).
        truth: `segments`, `classes`, int64 (m,), and `crowd`, bool (m,).
        classes: how many there are.

    Returns:
        float64 (classes, 4).

    Source: Kirillov et al. 2019, panoptic segmentation, section 4; crowds as in panopticapi.

    >>> true = torch.tensor([[0, 0, 0, 1]])
    >>> truth = {"segments": true, "classes": torch.tensor([2, 0]), "crowd": torch.tensor([False, False])}
    >>> found = {"segments": torch.tensor([[0, 0, 1, 1]]), "labels": torch.tensor([2, 1])}
    >>> matches(found, truth, 3).round(decimals=2).tolist()
    [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.67, 1.0, 0.0, 0.0]]
    """
    labels, own, crowd = found["labels"], truth["classes"], truth["crowd"]
    n, m = len(labels), len(own)
    # Rows are predicted segments, columns true ones, the last of both void.
    rows, columns = (
        torch.where(part < 0, count, part) for part, count in ((found["segments"], n), (truth["segments"], m))
    )
    common = (
        torch.bincount((rows * (m + 1) + columns).flatten(), minlength=(n + 1) * (m + 1)).view(n + 1, m + 1).double()
    )
    areas, void = common.sum(1)[:n], common[:n, m]
    union = areas[:, None] + common.sum(0)[None, :m] - common[:n, :m] - void[:, None]
    overlap = common[:n, :m] / union.clamp(min=1)
    same = labels[:, None] == own[None, :]
    paired = same & ~crowd[None, :] & (overlap > 0.5)  # at most one of each row and column
    excused = void + (common[:n, :m] * (same & crowd[None, :])).sum(1)
    vain = ~paired.any(1) & (areas > 0) & ~(excused > 0.5 * areas)
    missed = ~paired.any(0) & ~crowd & (common.sum(0)[:m] > 0)
    counts = torch.zeros(classes, 4, dtype=torch.float64, device=labels.device)
    counts[:, 0].index_add_(0, labels, (overlap * paired).sum(1))
    for column, which, of in ((1, paired.any(1), labels), (2, vain, labels), (3, missed, own)):
        counts[:, column] = torch.bincount(of[which], minlength=classes).double()
    return counts


def quality_of(counts: Tensor, things: Sequence[bool]) -> Quality:
    """The figures of summed counts of all images, (classes, 4).

    >>> counts = torch.tensor([[1.6, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0.7, 1, 1, 1]])
    >>> found = quality_of(counts, [True, True, False, False])
    >>> [round(value, 2) for value in (found.pq, found.sq, found.rq, found.pq_things, found.pq_stuff)]
    [38.33, 50.0, 50.0, 40.0, 35.0]
    """
    kinds = torch.tensor(list(things))
    summed, matched, vain, missed = counts.double().unbind(1)
    weight = matched + (vain + missed) / 2
    there = weight > 0
    shares = {"pq": summed / weight, "sq": summed / matched.clamp(min=1), "rq": matched / weight}
    parts = {"": there, "_things": there & kinds, "_stuff": there & ~kinds}
    return Quality(
        **{
            f"{name}{part}": 100 * float(share[which].mean())
            for part, which in parts.items()
            for name, share in shares.items()
        }
    )
