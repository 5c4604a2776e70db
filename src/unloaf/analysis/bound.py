"""How far the cross-entropy of subnets can be from that of their main network (Ye et al. 2023, ST++, equation 12).

The derivation, with its constants, is in docs/methods/stimulative-training.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unloaf.analysis.logits import predictions
from unloaf.analysis.runs import label_of, names_of
from unloaf.data import SPLIT_SEED
from unloaf.engine.checkpoint import load_checkpoint
from unloaf.engine.setup import where
from unloaf.errors import CheckpointError
from unloaf.evaluation import choose_subnets
from unloaf.runs.opened import OpenedRun, checkpoints_of, load_weights
from unloaf.subnet import Subnet
from unloaf.tasks.methods import scaled_logits

_HALVINGS = 80  # of an interval: float64 tells no more


@dataclass(frozen=True)
class BoundRow:
    """A subnet at a checkpoint, beside the main network; in nats, means over the images where nothing else is said.

    Attributes:
        run: name of the run.
        method: how it was trained.
        epoch: how many epochs were trained by then.
        depths: the subnet.
        ce_main: cross-entropy of the main network.
        ce_subnet: cross-entropy of the subnet.
        gap: distance of the two on an image.
        kl: KL divergence from the main network's prediction to the subnet's.
        bound: the largest distance that an image's KL and the main network's cross-entropy allow.
        gap_median: of the distance, over the images.
        bound_median: of the bound, over the images.
    """

    run: str
    method: str
    epoch: float
    depths: str
    ce_main: float
    ce_subnet: float
    gap: float
    kl: float
    bound: float
    gap_median: float
    bound_median: float


class Distances(NamedTuple):
    """Of each image, (images,), in nats: see `BoundRow`."""

    ce_main: Tensor
    ce_subnet: Tensor
    gap: Tensor
    kl: Tensor
    bound: Tensor


def distances(main: Tensor, subnet: Tensor, targets: Tensor) -> Distances:
    """Cross-entropies of two networks, their distance, and the bound on it.

    Args:
        main: logits of the main network, (images, classes).
        subnet: logits of the subnet for the same images.
        targets: class indices, (images,).

    >>> main, subnet = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.6, 0.4]]).log()
    >>> found = distances(main, subnet, torch.tensor([0]))
    >>> round(found.gap.item(), 4), round(found.kl.item(), 4), round(found.bound.item(), 4)
    (0.2877, 0.0915, 0.2877)
    """
    log_p, log_q = (logits.double().log_softmax(1) for logits in (main, subnet))
    at = targets.unsqueeze(1)
    own, other = (log.gather(1, at).squeeze(1) for log in (log_p, log_q))
    kl = (log_p.exp() * (log_p - log_q)).sum(1).clamp(min=0)
    rest = log_p.scatter(1, at, -torch.inf).logsumexp(1)  # log(1 - p), exact also where p is nearly 1
    return Distances(-own, -other, (own - other).abs(), kl, largest_distance(own, rest, kl))


def largest_distance(log_p: Tensor, log_rest: Tensor, kl: Tensor) -> Tensor:
    """The largest ``|log p - log q|`` that a KL divergence allows, q the probability that a student gives the label.

    A KL divergence is at least that of the two-class predictions (p, 1 - p) and (q, 1 - q); the largest distance at
    which that is reached is found by halving an interval. With two classes it is attained.

    Args:
        log_p: logarithm of the teacher's probability of the label.
        log_rest: logarithm of 1 - p.
        kl: divergence from teacher to student, in nats.

    Returns:
        of the same shape, in nats; 0 where the divergence is 0.

    >>> one = torch.tensor([0.5], dtype=torch.float64)
    >>> round(largest_distance(one.log(), one.log(), torch.tensor([0.0], dtype=torch.float64)).item(), 6)
    0.0
    """
    p, rest = log_p.exp(), log_rest.exp()
    # A student that is less sure: log(p / q) = t is at most (kl + (1 - p) log(1 / (1 - p))) / p.
    entropy = torch.where(rest > 0, -rest * log_rest, torch.zeros_like(rest))
    below = _largest(lambda t: _two_classes(p, rest, log_rest, -t) <= kl, (kl + entropy) / p)
    above = _largest(lambda t: _two_classes(p, rest, log_rest, t) <= kl, -log_p)
    return torch.maximum(below, above)


def _two_classes(p: Tensor, rest: Tensor, log_rest: Tensor, t: Tensor) -> Tensor:
    """KL divergence from (p, 1 - p) to (q, 1 - q) with q = p exp(t)."""
    left = rest - p * torch.expm1(t)  # 1 - q
    second = torch.where(rest > 0, rest * (log_rest - left.log()), torch.zeros_like(rest))
    return torch.where(left > 0, -p * t + second, torch.where(rest > 0, torch.inf, -p * t))


def _largest(holds: Callable[[Tensor], Tensor], high: Tensor) -> Tensor:
    """The largest number up to ``high`` for which it holds: up from one for which it does not there is none."""
    low = torch.zeros_like(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = holds(middle)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return high


def constant(ce: float, kl: float) -> float:
    """Equation 12's constant: the largest distance of a subnet's cross-entropy where these two losses are so low.

    Args:
        ce: the main network's cross-entropy on the image, in nats.
        kl: divergence from its prediction to the subnet's, in nats.

    Returns:
        ``-log(1 - exp(ce) * sqrt(kl / 2))``, by Pinsker's inequality; infinity where that is no number.

    >>> round(constant(0.2231, 0.0915), 4)
    0.3111
    >>> constant(3.0, 1.0)
    inf
    """
    share = torch.tensor(ce, dtype=torch.float64).exp() * (kl / 2) ** 0.5
    return float(-torch.log1p(-share)) if share < 1 else float("inf")


def bound_rows(
    opened: Sequence[OpenedRun],
    *,
    split: str = "train",
    subnets: int = 4,
    images: int = 2048,
    on_row: Callable[[BoundRow], None] | None = None,
) -> tuple[list[BoundRow], list[str]]:
    """Gap and bound of subnets at each checkpoint that runs kept, and notes on what is missing.

    The main network has the batch-norm statistics of its training, subnets have theirs re-estimated. Predictions are
    those that the loss on labels saw: of directions, where the run was trained on these.

    Args:
        opened: from `unloaf.analysis.runs.open_alike`, of classification; their weights are those of the last
            checkpoint afterwards.
        split: train, where the losses are that the theorem bounds, val or test.
        subnets: so many beside the main network, drawn as `unloaf.choose_subnets` does.
        images: that are looked at, drawn once for all.
        on_row: is called with each row as soon as it is known.

    Raises:
        ValueError: a run is of another task or loss, has no checkpoint, or no such images.
    """
    rows: list[BoundRow] = []
    notes = []
    for name, run in zip(names_of(opened), opened, strict=True):
        _check(run, split)
        epochs = set()
        for epoch, fault in _checkpoints(run):
            if fault:
                notes.append(fault)
                continue
            epochs.add(epoch)
            for row in _at_checkpoint(run, name, epoch, split=split, subnets=subnets, images=images):
                rows.append(row)
                if on_row is not None:
                    on_row(row)
        if run.epoch < run.config.epochs:
            notes.append(f"{name}: is not finished, {run.epoch} of {run.config.epochs} epochs are trained")
        if len(epochs) < min(4, run.config.epochs):
            notes.append(
                f"{name}: kept checkpoints of {len(epochs)} of its {run.config.epochs} epochs; to see the course over "
                f"training give --checkpoint-hist {run.config.epochs} where it is trained"
            )
    if not rows:
        raise ValueError(f"no checkpoint can be read: {'; '.join(notes)}")
    return rows, notes


def _check(run: OpenedRun, split: str) -> None:
    run.check_classifier("bound")
    if run.config.bce_loss:
        raise ValueError(f"{run.run}: its loss is a binary one for each class, of which probabilities do not sum to 1")
    if not len(getattr(run.training.data, split)):
        raise ValueError(f"{run.run}: {run.training.data.name} has no {split} images")


def _checkpoints(run: OpenedRun) -> Iterator[tuple[float, str]]:
    """Loads one after another into the network: epochs trained by then, or what is wrong with it."""
    for path in checkpoints_of(run.run):
        try:
            found = load_checkpoint(path)
            load_weights(run.network, found, run.weights)
        except CheckpointError as error:
            yield 0.0, f"{run.run}: {path.name} is left out: {error}"
            continue
        position: Any = found.state["position"]
        yield position["epoch"] - 1 + position["step"] / run.training.steps_per_epoch, ""


def _at_checkpoint(
    run: OpenedRun, name: str, epoch: float, *, split: str, subnets: int, images: int
) -> Iterator[BoundRow]:
    batches, stages = _batches(run, split, images), run.training.stages
    main = predictions(run.network, batches)
    for subnet in choose_subnets(stages, subnets + 1):
        if subnet == Subnet.full(stages):
            continue
        small = predictions(run.subnet(subnet), batches)
        seen = [scaled_logits(run.config, logits) for logits in (main.logits, small.logits)]
        found = distances(seen[0], seen[1], main.targets)
        means = {field: float(getattr(found, field).mean()) for field in found._fields}
        medians = {f"{field}_median": float(getattr(found, field).median()) for field in ("gap", "bound")}
        yield BoundRow(name, label_of(run), round(epoch, 3), str(subnet), **means, **medians)


def _batches(run: OpenedRun, split: str, images: int) -> Any:
    """Some images of a split, the same ones at each checkpoint, not augmented."""
    training = run.training
    every = getattr(training.data, split)
    drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(SPLIT_SEED))[:images]
    part = every.subset(drawn.sort().values)
    return training.task.eval_batches(part, training.data, training.config, where(training.accelerator))


def bound_table(rows: Sequence[BoundRow]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: a line for each run and checkpoint, means over its subnets.

    >>> row = BoundRow("a", "ST", 1.0, "1-1", 0.1, 0.4, 0.3, 0.05, 0.35, 0.2, 0.25)
    >>> bound_table([row, row])[1]
    [['a', 'ST', '1', '0.1000', '0.4000', '0.0500', '0.3000', '0.3500', '0.2000', '0.2500']]
    """
    names = ("ce_main", "ce_subnet", "kl", "gap", "bound", "gap_median", "bound_median")
    heads = ["run", "method", "epoch", "CE main\nnats", "CE subnets\nnats", "KL\nnats", "gap\nnats", "bound\nnats",
             "median\ngap", "median\nbound"]  # fmt: skip
    lines = []
    for key in dict.fromkeys((row.run, row.method, row.epoch) for row in rows):
        mine = [row for row in rows if (row.run, row.method, row.epoch) == key]
        means = [sum(getattr(row, name) for row in mine) / len(mine) for name in names]
        lines.append([key[0], key[1], f"{key[2]:g}", *(f"{value:.4f}" for value in means)])
    return heads, lines
