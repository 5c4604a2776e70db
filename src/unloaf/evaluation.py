"""How good is a network, and how good is each of its subnets: the same measure for both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unloaf.batchnorm import recalibrate_bn, tracking_norms
from unloaf.inputs import to_device
from unloaf.passes import Readout, logits_of
from unloaf.sampling import draw_generator, enumerate_subnets
from unloaf.stages import Stage, call_model, copy_of, evaluating, inner_module
from unloaf.subnet import Subnet, active_subnet, check_subnet

Reduction = Callable[[Tensor], Tensor]
Metric = Callable[[Tensor, Any], Tensor | float]
_IGNORED = -100
_MOST_LISTED = 4096  # ordered subnets; an EfficientNet-B7 has a million, whose list takes gigabytes


@dataclass(frozen=True)
class Accuracy:
    """How well a network does; NaN throughout where it gives NaN for an example, which is no prediction.

    Attributes:
        loss: mean cross-entropy, in nats.
        top1: accuracy in percent.
        top5: share of examples whose target is among the five highest logits, in percent (100 with up to 5 classes).
        metric: of another measure that was asked for in place of these, then NaN; see `evaluate_subnets`.

    >>> from unloaf.evaluation import Accuracy
    >>> Accuracy(loss=0.21, top1=93.2, top5=99.8).top1
    93.2
    """

    loss: float
    top1: float
    top5: float
    metric: float | None = None


@dataclass(frozen=True)
class SubnetRow:
    """A subnet: how good it is and what it costs, None where that is not known.

    Attributes:
        subnet: which one; ``str(row.subnet)`` is its depths, "3-4-6-3".
        top1: accuracy in percent; NaN, like top5 and loss, where a metric was given, or the network gives NaN.
        top5: share of examples whose target is among the five highest logits, in percent (100 with up to 5 classes).
        loss: mean cross-entropy, in nats.
        params: parameters of the subnet as a network of its own.
        gmacs: billions of multiply-adds for one example.
        latency_ms: median milliseconds of a forward pass.
        metric: mean over the examples of the metric that was given.
        statistics: the batch-norm statistics with which it was evaluated: "running", those that the main network
            gathered in training, or "re-estimated", from calibration batches; None for a network without any.
        running: of the main network where it was evaluated with re-estimated statistics, as its subnets are: how
            good it is with its running ones, as it is used; None of every other row.

    >>> from unloaf import Subnet, SubnetRow
    >>> row = SubnetRow(Subnet(((True, True), (True, False))), top1=93.2, params=272_474)
    >>> str(row.subnet), row.depths, row.gmacs
    ('2-1', (2, 1), None)
    """

    subnet: Subnet
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    params: int | None = None
    gmacs: float | None = None
    latency_ms: float | None = None
    metric: float | None = None
    statistics: Literal["running", "re-estimated"] | None = None
    running: Accuracy | None = None

    @property
    def depths(self) -> tuple[int, ...]:
        """Kept blocks per stage."""
        return self.subnet.depths


def evaluate_subnets(
    model: nn.Module,
    stages: Sequence[Stage],
    loader: Iterable[tuple[Any, Tensor]],
    *,
    subnets: Sequence[Subnet] | int | None = None,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    reduce: Reduction | None = None,
    readout: Readout | None = None,
    metric: Metric | None = None,
    ignore_index: int = _IGNORED,
    on_row: Callable[[SubnetRow], None] | None = None,
) -> list[SubnetRow]:
    """Accuracy of subnets of a model, or another measure; the model is left as it was.

    Args:
        model: a trained network.
        stages: its stages.
        loader: batches ``(x, y)``, x a tensor or a mapping of keyword arguments, with class indices y, (batch,) or the
            leading dimensions of the logits; iterated per subnet (an iterator, used up after one, is kept as a list).
        subnets: which ones; a number draws that many ordered ones, the main network among them; default: all ordered
            subnets (`enumerate_subnets`).
        calibration: batches of training inputs, ``x`` or ``(x, ...)``; before a network is evaluated, its batch-norm
            statistics are re-estimated from them on a copy: those of the main network too, so that all rows can be
            compared; ``row.running`` has its figures with running ones. Without, all are evaluated with the main
            network's statistics, which do not fit a subnet.
        seed: of the sample, if ``subnets`` is a number.
        reduce: see `accuracy`.
        readout: from the model's output to the logits, (batch, ..., classes); default the output itself, its ``logits``
            or ``["logits"]``.
        metric: evaluate by this instead of accuracy: from (outputs, targets) of a batch to a number for each example,
            or to their mean. Targets may then be anything.
        ignore_index: label of positions that are not evaluated.
        on_row: is called with each row as soon as it is known, to show how far it is.

    Returns:
        One row per subnet, in the order given, without GMACs and latency: `measure_subnets` fills them in.

    Raises:
        ValueError: a subnet of another model, a number below 1, an empty loader, batches that are no pairs or, without
            a metric, targets that are no class indices of the logits' leading dimensions.

    Source: Ye et al. 2022 (ST) evaluate subnets after re-estimating batch-norm statistics.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(num_classes=10), torch.randn(4, 3, 32, 32)
    >>> stages = unloaf.find_stages(model, x)
    >>> rows = unloaf.evaluate_subnets(model, stages, [(x, torch.arange(4))], subnets=2, calibration=[x])
    >>> str(rows[0].subnet), rows[0].statistics, rows[0].params > rows[1].params
    ('2-2-2-2', 're-estimated', True)
    """
    chosen = choose_subnets(stages, subnets, seed=seed)
    if isinstance(loader, Iterator) and (len(chosen) > 1 or calibration is not None):
        loader = list(loader)

    def measured(network: nn.Module) -> Accuracy:
        if metric is None:
            return accuracy(network, loader, reduce=reduce, readout=readout, ignore_index=ignore_index)
        return replace(_UNKNOWN, metric=mean_metric(network, loader, metric, reduce=reduce, readout=readout))

    return rows_of(model, stages, chosen, measured, calibration=calibration, on_row=on_row)


def rows_of(
    model: nn.Module,
    stages: Sequence[Stage],
    subnets: Sequence[Subnet],
    measured: Callable[[nn.Module], Accuracy],
    *,
    calibration: Iterable[Any] | None = None,
    on_row: Callable[[SubnetRow], None] | None = None,
) -> list[SubnetRow]:
    """A row of each subnet, by any measure of a network; see `evaluate_subnets`."""
    inner = inner_module(model)
    tracking = bool(tracking_norms(inner))
    batches = calibration if tracking else None
    if batches is not None and iter(batches) is batches:
        batches = list(batches)  # a generator would be spent after the first subnet
    judged = copy_of(inner) if batches is not None else inner
    rows, device = [], next(inner.parameters()).device
    for subnet in subnets:
        running = None
        if batches is not None and subnet == Subnet.full(stages):
            running = measured(inner)
        with active_subnet(judged, stages, subnet):
            if batches is not None:
                inputs = (batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches)
                recalibrate_bn(judged, ((to_device(x, device),) for x in inputs))
            found = measured(judged)
        row = SubnetRow(
            subnet,
            top1=found.top1,
            top5=found.top5,
            loss=found.loss,
            params=count_params(inner, stages, subnet),
            metric=found.metric,
            statistics=("running" if batches is None else "re-estimated") if tracking else None,
            running=running,
        )
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def count_params(model: nn.Module, stages: Sequence[Stage], subnet: Subnet) -> int:
    """Parameters of a subnet as a network of its own: all but those that belong to skipped blocks alone."""
    kept = subnet.modes(stages)
    skipped = tuple(f"{path}." for stage in stages for path in stage.blocks if path not in kept)
    # Named with duplicates and counted once each: a tensor shared with a kept block stays.
    used = {p: p.numel() for name, p in model.named_parameters(remove_duplicate=False) if not name.startswith(skipped)}
    return sum(used.values())


def choose_subnets(
    stages: Sequence[Stage], subnets: Sequence[Subnet] | int | None = None, *, seed: int = 0
) -> list[Subnet]:
    """The subnets that `evaluate_subnets` evaluates: those given, a drawn number of ordered ones, or all ordered ones.

    A number of them are the main network and others, none twice, or all if there are no more. Few of very many are
    drawn one by one and returned in that order, the others in the order of `enumerate_subnets`.

    Raises:
        ValueError: a subnet of another model, a number below 1.
    """
    if subnets is None:
        return enumerate_subnets(stages)
    if isinstance(subnets, int):
        if subnets < 1:
            raise ValueError(f"subnets is {subnets}; give a number of at least 1, a list of subnets, or None for all")
        count = prod(len(stage.legal_depths) for stage in stages)
        # Where most of them are wanted, single draws would meet the same ones again and again.
        listed = count <= max(_MOST_LISTED, 2 * subnets)
        return (_draw_from_list if listed else _draw_one_by_one)(stages, subnets, seed)
    for subnet in subnets:
        check_subnet(stages, subnet)
    return list(subnets)


def _draw_from_list(stages: Sequence[Stage], wanted: int, seed: int) -> list[Subnet]:
    everyone = enumerate_subnets(stages)
    order = torch.randperm(len(everyone) - 1, generator=draw_generator(seed, 0, 0, purpose="evaluation"))
    picked = sorted((order[: wanted - 1] + 1).tolist())
    return [everyone[0], *(everyone[i] for i in picked)]


def _draw_one_by_one(stages: Sequence[Stage], wanted: int, seed: int) -> list[Subnet]:
    drawn, step = {Subnet.full(stages): None}, 0
    while len(drawn) < wanted:
        generator = draw_generator(seed, step, 0, purpose="evaluation")
        picked = [int(torch.randint(len(stage.legal_depths), (1,), generator=generator)) for stage in stages]
        drawn[Subnet.from_depths(stages, [s.legal_depths[i] for s, i in zip(stages, picked, strict=True)])] = None
        step += 1
    return list(drawn)


def accuracy(
    model: nn.Module,
    loader: Iterable[tuple[Any, Tensor]],
    *,
    reduce: Reduction | None = None,
    readout: Readout | None = None,
    ignore_index: int = _IGNORED,
) -> Accuracy:
    """Loss and accuracy in evaluation mode, without autocast; the modes of the modules are put back.

    Args:
        model: gives logits, (batch, ..., classes).
        loader: batches ``(x, y)``, x a tensor or a mapping of keyword arguments, with class indices y, (batch, ...).
        reduce: adds a tensor over processes, where each sees a share of the examples; every process gets the whole.
        readout: from the model's output to the logits; default the output itself, its ``logits`` or ``["logits"]``.
        ignore_index: label of positions that are not counted.

    Raises:
        ValueError: there was no example, a batch is no pair, or y are no class indices, one for each row of logits.
    """
    device = next(model.parameters(), torch.empty(0)).device
    # In double precision: sums over processes, or over another batch size, agree to the last digit shown.
    sums = torch.zeros(4, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    with evaluating(model):
        for x, y in map(_pair, loader):
            logits = logits_of(call_model(model, to_device(x, device)), readout)
            _check_labels(logits, y)
            rows, targets = logits.flatten(0, -2).float(), y.to(logits.device).flatten().long()
            counted = targets != ignore_index
            best = rows.topk(min(5, rows.shape[-1])).indices == targets[:, None]
            loss = _summed_loss(rows, targets, ignore_index)
            hits = torch.stack([best[:, 0].sum(), best.sum()]).double()
            # NaN counts as highest: such rows would have an accuracy, that of guessing.
            hits = hits.masked_fill((rows.isnan().any(-1) & counted).any(), math.nan)
            sums += torch.cat([counted.sum()[None], hits, loss.double()[None]]).to(sums)
    count, first, five, loss = (reduce(sums) if reduce else sums).tolist()
    _check_count(count)
    return Accuracy(loss=loss / count, top1=100 * first / count, top5=100 * five / count)


def mean_metric(
    model: nn.Module,
    loader: Iterable[tuple[Any, Any]],
    metric: Metric,
    *,
    reduce: Reduction | None = None,
    readout: Readout | None = None,
) -> float:
    """A metric's mean over all examples, in evaluation mode, without autocast; arguments as `evaluate_subnets`.

    >>> import torch
    >>> batches = [(torch.ones(1, 1), torch.zeros(1, 1)), (3 * torch.ones(3, 1), torch.zeros(3, 1))]
    >>> mean_metric(torch.nn.Identity(), batches, lambda output, y: (output - y).abs().mean())
    2.5
    """
    device = next(model.parameters(), torch.empty(0)).device
    sums = torch.zeros(2, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    with evaluating(model):
        for x, y in map(_pair, loader):
            output = logits_of(call_model(model, to_device(x, device)), readout)
            value = torch.as_tensor(metric(output, y.to(output.device) if isinstance(y, Tensor) else y)).double()
            if value.ndim > 1 or (value.ndim and len(value) != len(output)):
                raise ValueError(
                    f"metric returned shape {tuple(value.shape)} for {len(output)} examples; "
                    f"give one number, or {len(output)}"
                )
            total = value.sum() if value.ndim else value * len(output)
            sums += torch.stack([torch.tensor(len(output), device=value.device), total]).to(sums)
    count, total = (reduce(sums) if reduce else sums).tolist()
    _check_count(count)
    return total / count


_UNKNOWN = Accuracy(loss=math.nan, top1=math.nan, top5=math.nan)


def _check_count(count: float) -> None:
    if not count:
        raise ValueError("the loader yielded no example to evaluate on; give at least one batch (x, y)")


def _pair(batch: Any) -> tuple[Any, Any]:
    """A batch of a loader, if it is a pair."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    found = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
    x, y = 0, 1
    if isinstance(batch, Mapping) and batch:
        x, *_, y = [*batch, *batch]
        found += f" with the keys {', '.join(map(str, batch))}"
    advice = f"[(batch[{x!r}], batch[{y!r}]) for batch in loader]"
    raise ValueError(f"a batch of the loader is {found}; evaluation takes pairs (x, y): {advice}, for instance")


def _check_labels(logits: Tensor, y: Any) -> None:
    """Raise ValueError unless y holds a class index for each row of the logits."""
    if not isinstance(y, Tensor):
        raise ValueError(f"y is {type(y).__name__}; accuracy needs a tensor of class indices, or give a metric")
    shapes = f"y has shape {tuple(y.shape)}, the logits {tuple(logits.shape)}"
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise ValueError(f"{shapes}; accuracy needs (..., classes) with at least 2 classes, or give a metric")
    if y.is_floating_point():
        raise ValueError(
            f"{shapes} in {y.dtype}; accuracy needs class indices (of shares of classes y.argmax(-1)), or give a metric"
        )
    if y.shape != logits.shape[:-1]:
        second = y.shape == (*logits.shape[:1], *logits.shape[2:])
        remedy = "readout=lambda output: output.movedim(1, -1)" if second else "one label for each row of logits"
        raise ValueError(f"{shapes}; the classes must be on the last axis: give {remedy}")


def _summed_loss(rows: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    try:
        return F.cross_entropy(rows, targets, reduction="sum", ignore_index=ignore_index)
    except IndexError as error:  # of torch on a CPU; a GPU asserts
        raise ValueError(
            f"{error} Labels are from 0 to {rows.shape[-1] - 1}, or {ignore_index} where there is none; correct them, "
            "or give ignore_index"
        ) from error
