"""What all subnets of a trained classifier are good for: accuracy, calibration, agreement, cost, disagreement.

The mean of the subnets' probabilities is an ensemble that needs no further training, and where they disagree an image
may be none that the network knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from unloaf.analysis.logits import Predictions, predictions
from unloaf.analysis.runs import label_of, split_of
from unloaf.data import EvalBatches, load_data
from unloaf.data.images import ImageSet
from unloaf.evaluation import SubnetRow, choose_subnets
from unloaf.inputs import to_device
from unloaf.measure.costs import measure_in_sight
from unloaf.measure.pareto import pareto_front
from unloaf.runs.opened import OpenedRun
from unloaf.subnet import Subnet

BINS = 15  # of confidence, as Guo et al. 2017 have them


@dataclass(frozen=True)
class SubnetAnalysisRow:
    """A subnet, or all of them together.

    Attributes:
        run: name of the run.
        method: how it was trained.
        kind: "main" network as it was trained, "subnet", or "ensemble", the mean of the probabilities of all.
        depths: blocks that are kept in each stage; of the ensemble the number of networks.
        top1: accuracy in percent.
        loss: mean cross-entropy, in nats.
        ece: expected calibration error, in percent.
        agreement: images on which it gives the class that the main network gives, in percent.
        gmacs: billions of multiply-adds for an image; of the ensemble all networks run.
        latency_ms: median milliseconds of a forward pass of one image, None where it was not measured.
        pareto: whether no other network is as accurate for as few GMACs, and better in one of the two.
        unknown: area under the ROC curve, in percent, of telling images of another data set from these by a low highest
            probability; None without such images.
        disagreement: the same by how much the networks disagree, of the ensemble alone.
    """

    run: str
    method: str
    kind: Literal["main", "subnet", "ensemble"]
    depths: str
    top1: float
    loss: float
    ece: float
    agreement: float
    gmacs: float
    latency_ms: float | None
    pareto: bool
    unknown: float | None
    disagreement: float | None


def calibration_error(probabilities: Tensor, targets: Tensor, *, bins: int = BINS) -> float:
    """Expected calibration error, in percent: how far confidence is from accuracy, over bins of confidence.

    Args:
        probabilities: (examples, classes).
        targets: class indices, (examples,).
        bins: of equal width, each open to the left.

    Source: Guo et al. 2017 (On calibration of modern neural networks), equation 3.

    >>> p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    >>> round(calibration_error(p, torch.tensor([0, 1, 1]), bins=5), 4)  # (2 |0.5 - 0.9| + |1 - 0.6|) / 3
    40.0
    """
    confidence, guess = probabilities.double().max(1)
    hit = (guess == targets).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(2, bins, dtype=torch.float64)
    sums.index_add_(1, place, torch.stack([confidence, hit]))
    return float(100 * (sums[0] - sums[1]).abs().sum() / len(targets))


def disagreement(mean: Tensor, mean_information: Tensor) -> Tensor:
    """How much networks disagree on each example: the mean KL divergence from their mean prediction, in nats.

    Args:
        mean: of their probabilities, (examples, classes).
        mean_information: mean over the networks of the sum of p log p, (examples,).

    Source: Lakshminarayanan et al. 2017 (deep ensembles), section 3.5, divided by the number of networks.

    >>> p = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)  # two networks, one example
    >>> disagreement(p.mean(0), torch.xlogy(p, p).sum(-1).mean(0)).exp()
    tensor([2.], dtype=torch.float64)
    """
    return (mean_information - torch.xlogy(mean, mean).sum(1)).clamp(min=0)


def separation(known: Tensor, unknown: Tensor) -> float:
    """Area under the ROC curve, in percent, of a score that is to be higher for unknown examples; 50 says nothing.

    >>> separation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.5, 4.0]))  # 5 of 6 pairs are in order
    83.33333333333334
    """
    from sklearn.metrics import roc_auc_score

    truth = torch.cat([torch.zeros(len(known)), torch.ones(len(unknown))])
    return float(100 * roc_auc_score(truth.numpy(), torch.cat([known, unknown]).numpy()))


class _Together:
    """Sums over networks of what they say of a data set."""

    def __init__(self) -> None:
        self.count = 0
        self.probabilities: Any = 0.0
        self.information: Any = 0.0

    def add(self, probabilities: Tensor) -> None:
        self.count += 1
        self.probabilities = self.probabilities + probabilities
        self.information = self.information + torch.xlogy(probabilities, probabilities).sum(1)

    @property
    def mean(self) -> Tensor:
        return self.probabilities / self.count

    @property
    def disagreement(self) -> Tensor:
        return disagreement(self.mean, self.information / self.count)


def subnet_analysis(
    run: OpenedRun,
    *,
    split: str | None = None,
    against: Iterable[Any] | None = None,
    timed: bool = True,
    repeats: int = 30,
    console: Console | None = None,
    on_row: Callable[[str], None] | None = None,
) -> list[SubnetAnalysisRow]:
    """A row for the main network, each other ordered subnet and their ensemble.

    The main network has the batch-norm statistics of its training, subnets have theirs re-estimated. Probabilities of
    all images are kept for one network at a time.

    Args:
        run: of classification.
        split: "val" or "test"; default: val if there is one.
        against: batches of unknown images, gone through for each network.
        timed: whether latency is measured.
        repeats: passes that are timed.
        console: shows progress of the measurements.
        on_row: is called with the depths of each network that was evaluated.

    Raises:
        ValueError: the run is of another task.
    """
    run.check_classifier("subnets --all")
    stages, chosen = run.training.stages, choose_subnets(run.training.stages)
    batches = run.training.eval_batches(split_of(run, split))
    known, other, rows = _Together(), _Together(), []
    first = targets = torch.empty(0, dtype=torch.long)
    for subnet in chosen:
        network = run.network if subnet == Subnet.full(stages) else run.subnet(subnet)
        found = predictions(network, batches)
        p, targets = found.logits.softmax(1), found.targets
        first = first if rows else p.argmax(1)
        known.add(p)
        elsewhere = None if against is None else predictions(network, against).logits.softmax(1)
        if elsewhere is not None:
            other.add(elsewhere)
        kind = "subnet" if rows else "main"
        rows.append(_row(run, kind, str(subnet), found, p, first, elsewhere))
        if on_row is not None:
            on_row(str(subnet))
    rows = _with_costs(run, chosen, rows, timed=timed, repeats=repeats, console=console)
    return [*rows, _ensemble(run, rows, targets, first, known, other if against is not None else None)]


def _row(
    run: OpenedRun, kind: Any, depths: str, found: Predictions, p: Tensor, first: Tensor, elsewhere: Tensor | None
) -> SubnetAnalysisRow:
    return SubnetAnalysisRow(
        run=run.run.resolve().name,
        method=label_of(run),
        kind=kind,
        depths=depths,
        top1=_share(p.argmax(1) == found.targets),
        loss=float(F.cross_entropy(found.logits, found.targets)),
        ece=calibration_error(p, found.targets),
        agreement=_share(p.argmax(1) == first),
        gmacs=math.nan,
        latency_ms=None,
        pareto=False,
        unknown=None if elsewhere is None else separation(-p.amax(1), -elsewhere.amax(1)),
        disagreement=None,
    )


def _share(hits: Tensor) -> float:
    return float(100 * hits.double().mean())


def _with_costs(
    run: OpenedRun, chosen: Sequence[Subnet], rows: Sequence[SubnetAnalysisRow], *, timed: bool, repeats: int,
    console: Console | None,
) -> list[SubnetAnalysisRow]:  # fmt: skip
    training = run.training
    example = to_device(training.task.example(training.data, 1), training.device)
    judged = [SubnetRow(subnet, top1=row.top1) for subnet, row in zip(chosen, rows, strict=True)]
    judged, _ = measure_in_sight(
        run.network, training.stages, example, judged, timed=(1,) if timed else (), repeats=repeats, console=console
    )
    front = {row.subnet for row in pareto_front(judged)}
    return [
        replace(row, gmacs=float(cost.gmacs or 0.0), latency_ms=cost.latency_ms, pareto=cost.subnet in front)
        for row, cost in zip(rows, judged, strict=True)
    ]


def _ensemble(
    run: OpenedRun, rows: Sequence[SubnetAnalysisRow], targets: Tensor, first: Tensor, known: _Together,
    other: _Together | None,
) -> SubnetAnalysisRow:  # fmt: skip
    p = known.mean
    found = Predictions(p.clamp(min=torch.finfo(p.dtype).tiny).log(), targets)
    row = _row(run, "ensemble", f"{known.count} networks", found, p, first, None if other is None else other.mean)
    apart = None if other is None else separation(known.disagreement, other.disagreement)
    return replace(row, gmacs=math.fsum(r.gmacs for r in rows), disagreement=apart)


def unknown_images(run: OpenedRun, source: str, data_dir: str | None) -> EvalBatches:
    """Images of another data set, as the network of a run takes them.

    Args:
        run: of classification.
        source: name of a data set, as for train, or a folder of images with train and val in it.
        data_dir: where the data set is; default: as in the run.

    Raises:
        ValueError: there is no such data set, or its images do not fit.
    """
    training = run.training
    folder = Path(source).is_dir()
    changed: dict[str, Any] = {"dataset": "imagefolder" if folder else source}
    changed |= {"train_images": None, "num_classes": None}
    changed["data_dir"] = source if folder else data_dir or training.config.data_dir
    other = load_data(replace(training.config, **changed))
    images = other.val if len(other.val) else other.test
    if not len(images):
        raise ValueError(f"against {source}: {other.name} has neither validation nor test images")
    if isinstance(images, ImageSet):
        channels = images.images.shape[1]
        if channels != training.data.in_chans and channels != 1:
            raise ValueError(
                f"against {source}: its images have {channels} channels, those of the run {training.data.in_chans}; "
                "give another data set"
            )
        images = ImageSet(images.images.expand(-1, training.data.in_chans, -1, -1), images.labels)
    return EvalBatches(images, training.data, training.config, device=training.device)


def stage_means(rows: Sequence[SubnetAnalysisRow]) -> dict[tuple[int, int], dict[tuple[int, int], float]]:
    """Mean accuracy over the subnets that keep so many blocks of two stages, by the numbers of the stages, from 0.

    A network of one stage has the pair (0, 0).

    >>> row = SubnetAnalysisRow("a", "ST", "subnet", "2-1", 90.0, *[0.0] * 4, None, False, None, None)
    >>> stage_means([row, replace(row, depths="2-2", top1=80.0)])
    {(0, 1): {(2, 1): 90.0, (2, 2): 80.0}}
    """
    each = [
        (tuple(map(int, row.depths.split("-"))), row.top1)
        for row in rows
        if row.kind != "ensemble" and ":" not in row.depths
    ]
    count = len(each[0][0])
    found: dict[tuple[int, int], dict[tuple[int, int], float]] = {}
    for a, b in [*combinations(range(count), 2)] or [(0, 0)]:
        sums: dict[tuple[int, int], list[float]] = {}
        for depths, top1 in each:
            sums.setdefault((depths[a], depths[b]), []).append(top1)
        found[a, b] = {place: math.fsum(tops) / len(tops) for place, tops in sorted(sums.items())}
    return found


def subnet_analysis_table(rows: Sequence[SubnetAnalysisRow]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells; columns that no row has are left out."""
    heads = ["depths", "", "top-1 %", "loss", "ECE %", "agreement %", "GMACs", "ms", "unknown %", "by disagreement %"]
    lines = [
        [
            row.depths + {"main": " (main)", "subnet": "", "ensemble": " (ensemble)"}[row.kind],
            "*" * row.pareto,
            f"{row.top1:.2f}",
            f"{row.loss:.4f}",
            f"{row.ece:.2f}",
            f"{row.agreement:.1f}",
            f"{row.gmacs:.4g}",
            _cell(row.latency_ms, "{:.3g}"),
            _cell(row.unknown, "{:.1f}"),
            _cell(row.disagreement, "{:.1f}"),
        ]
        for row in rows
    ]
    shown = [at for at in range(len(heads)) if any(line[at] != "–" for line in lines)]
    return [heads[at] for at in shown], [[line[at] for at in shown] for line in lines]


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
