"""How large the logits of networks are, and of the subnets inside them (Ye et al. 2023, ST++, figure 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unloaf.analysis.runs import label_of, names_of, split_of
from unloaf.evaluation import choose_subnets
from unloaf.inputs import to_device
from unloaf.measure.exits import UNREADABLE
from unloaf.passes import logits_of
from unloaf.runs.opened import OpenedRun
from unloaf.stages import call_model, evaluating
from unloaf.subnet import Subnet


@dataclass(frozen=True)
class LogitsRow:
    """The logits of a network over a data set.

    Attributes:
        run: name of the run.
        method: how it was trained.
        depths: the subnet, the main network first.
        main: whether it is the main network.
        top1: accuracy in percent.
        magnitude: L2 norm of an example's logits, mean over the examples.
        magnitude_sd: standard deviation over the examples.
        confidence: highest probability, mean over the examples, in percent.
        cosine: between an example's logits and those of the main network, mean over the examples; 1 of the main
            network.
    """

    run: str
    method: str
    depths: str
    main: bool
    top1: float
    magnitude: float
    magnitude_sd: float
    confidence: float
    cosine: float


class Predictions(NamedTuple):
    """What a network says of a data set.

    Attributes:
        logits: (examples, classes), float64 on the CPU.
        targets: class indices, (examples,).
    """

    logits: Tensor
    targets: Tensor


def predictions(model: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> Predictions:
    """The logits of a classifier for all batches, in evaluation mode; images that cannot be read do not count."""
    device, logits, targets = next(model.parameters()).device, [], []
    with evaluating(model):
        for x, y in batches:
            read = y.cpu() != UNREADABLE
            logits.append(logits_of(call_model(model, to_device(x, device))).double().cpu()[read])
            targets.append(y.cpu()[read])
    return Predictions(torch.cat(logits), torch.cat(targets))


class Magnitude(NamedTuple):
    """Figures of `LogitsRow` by their names there."""

    top1: float
    magnitude: float
    magnitude_sd: float
    confidence: float
    cosine: float


def magnitude_of(found: Predictions, main: Tensor) -> Magnitude:
    """Size and direction of logits.

    Args:
        found: of the network, (examples, classes).
        main: logits of the main network for the same examples.

    >>> logits = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    >>> found = magnitude_of(Predictions(logits, torch.tensor([1, 0])), 2 * logits)
    >>> found.top1, found.magnitude, round(found.cosine, 6)
    (50.0, 3.0, 1.0)
    """
    norms = found.logits.norm(dim=1)
    hits = (found.logits.argmax(1) == found.targets).double()
    sd = norms.std() if len(norms) > 1 else norms.sum() * 0
    confidence, cosine = found.logits.softmax(1).amax(1), F.cosine_similarity(found.logits, main)
    return Magnitude(*(float(v) for v in (100 * hits.mean(), norms.mean(), sd, 100 * confidence.mean(), cosine.mean())))


def logits_rows(
    opened: Sequence[OpenedRun],
    *,
    split: str | None = None,
    subnets: int | None = 8,
    seed: int = 0,
    on_row: Callable[[LogitsRow], None] | None = None,
) -> list[LogitsRow]:
    """Size of the logits of main networks and of their subnets; a network trained alone is a run of its own.

    The main network has the batch-norm statistics of its training, subnets have theirs re-estimated.

    Args:
        opened: from `unloaf.analysis.runs.open_alike`, of classification.
        split: "val" or "test"; default: val if there is one.
        subnets: so many beside the main network, drawn as `unloaf.choose_subnets` does; None for all ordered ones.
        seed: of the draw.
        on_row: is called with each row as soon as it is known.

    Raises:
        ValueError: a run is of another task.

    Source: Ye et al. 2023 (ST++), section 3.3.1 and figure 4.
    """
    rows = []
    for name, run in zip(names_of(opened), opened, strict=True):
        run.check_classifier("logits")
        batches, stages = run.training.eval_batches(split_of(run, split)), run.training.stages
        whole = predictions(run.network, batches)
        for subnet in choose_subnets(stages, None if subnets is None else subnets + 1, seed=seed):
            main = subnet == Subnet.full(stages)
            found = whole if main else predictions(run.subnet(subnet), batches)
            figures = magnitude_of(found, whole.logits)._asdict()
            rows.append(LogitsRow(name, label_of(run), str(subnet), main, **figures))
            if on_row is not None:
                on_row(rows[-1])
    return rows


def logits_table(rows: Sequence[LogitsRow]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, a line for each network."""
    heads = ["run", "method", "depths", "top-1 %", "magnitude", "sd", "confidence %", "cosine to main"]
    lines = [
        [
            row.run, row.method, f"{row.depths}{' (main)' if row.main else ''}", f"{row.top1:.2f}",
            f"{row.magnitude:.3f}", f"{row.magnitude_sd:.3f}", f"{row.confidence:.1f}", f"{row.cosine:.3f}",
        ]
        for row in rows
    ]  # fmt: skip
    return heads, lines
