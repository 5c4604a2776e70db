"""What an encoder that saw no labels is worth: a linear classifier on its frozen features, and on its subnets'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from unloaf.data import EvalBatches
from unloaf.engine.setup import Training, where
from unloaf.evaluation import choose_subnets
from unloaf.models.masked import whole_features
from unloaf.runs.opened import Opening, open_trained
from unloaf.stages import evaluating, inner_module
from unloaf.subnet import Subnet, active_subnet

_IGNORED = -100
_MOST_STEPS = 2000


@dataclass(frozen=True)
class ProbeRow:
    """A network that was probed.

    Attributes:
        subnet: which one.
        top1: by split, the accuracy of the linear classifier in percent.
    """

    subnet: Subnet
    top1: dict[str, float]


def probe_run(run: str | Path, *, subnets: int | None = None, **opening: Unpack[Opening]) -> list[ProbeRow]:
    """Probes the encoder of a run of task masked, and of so many ordered subnets; writes nothing.

    Args:
        run: a folder that `unloaf train` made.
        subnets: how many beside the main network; None for all ordered ones.
        opening: see `open_trained`.

    Raises:
        ValueError: no run, one of another task, or its images have no labels.
    """
    opened = open_trained(Path(run), **opening)
    if opened.config.task != "masked":
        raise ValueError(
            f"{run}: a run of task {opened.config.task}; a probe is for --task masked, whose encoder learned without "
            "labels; give `unloaf eval` this one"
        )
    stages = opened.training.stages
    chosen = choose_subnets(stages, None if subnets is None else subnets + 1, seed=opened.config.seed)
    return probe(opened.training, chosen)


def probe(training: Training, subnets: Sequence[Subnet]) -> list[ProbeRow]:
    """The linear classifier of each of these networks, judged on validation and test images, as far as there are any.

    Features are the mean of the encoder's outputs over all patches of the whole image, not augmented; brought to mean 0
    and spread 1 over the training images; the classifier is scikit-learn's logistic regression with its default penalty
    (C 1). Nothing is chosen by validation or test images.
    """
    data = training.data
    labels = data.train.labels
    if labels.ndim != 1 or len(labels.unique()) < 2:
        raise ValueError(f"{data.name}: a probe needs images of two classes at least")
    splits = [
        name for name in ("val", "test") if len(getattr(data, name)) and (name == "val" or data.test is not data.val)
    ]
    rows = []
    for subnet in subnets:
        x, y = _features(training, subnet, "train")
        judged = {name: _features(training, subnet, name) for name in splits}
        rows.append(ProbeRow(subnet, _top1(x, y, judged)))
    return rows


def _features(training: Training, subnet: Subnet, split: str) -> tuple[np.ndarray, np.ndarray]:
    network: Any = inner_module(training.model)
    batches = EvalBatches(
        getattr(training.data, split), training.data, training.config, device=where(training.accelerator).device
    )
    found: list[Tensor] = []
    labels: list[Tensor] = []
    with evaluating(network), active_subnet(network, training.stages, subnet), torch.no_grad():
        for x, y in batches:
            counted = y != _IGNORED
            found.append(whole_features(network, x)[counted].float().cpu())
            labels.append(y[counted].cpu())
    return torch.cat(found).numpy(), torch.cat(labels).numpy()


def _top1(x: np.ndarray, y: np.ndarray, judged: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MOST_STEPS)).fit(x, y)
    return {name: 100 * float(classifier.score(*pair)) for name, pair in judged.items()}
