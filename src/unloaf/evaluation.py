"""How good is a network, and how good is each of its subnets: the same measure for both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unloaf.batchnorm import recalibrate_bn, tracking_norms
from unloaf.passes import logits_of
from unloaf.sampling import draw_generator, enumerate_subnets
from unloaf.stages import Stage, call_model, evaluating, inner_module
from unloaf.subnet import Subnet, active_subnet, check_subnet

Reduction = Callable[[Tensor], Tensor]
_IGNORED = -100
_MOST_LISTED = 4096  # ordered subnets; an EfficientNet-B7 has a million, whose list takes gigabytes


@dataclass(frozen=True)
class Accuracy:
    """How well a network does.

    Attributes:
        loss: mean cross-entropy, in nats.
        top1: accuracy in percent.
        top5: share of examples whose target is among the five highest logits, in percent (100 with up to 5 classes).

    >>> from unloaf.evaluation import Accuracy
    >>> Accuracy(loss=0.21, top1=93.2, top5=99.8).top1
    93.2
    """

    loss: float
    top1: float
    top5: float


@dataclass(frozen=True)
class SubnetRow:
    """A subnet judged.

    Attributes:
        subnet: which one; ``str(row.subnet)`` is its depths, "3-4-6-3".
        depths: kept blocks per stage.
        top1: accuracy in percent.
        top5: share of examples whose target is among the five highest logits, in percent (100 with up to 5 classes).
        loss: mean cross-entropy, in nats.
        params: parameters of the subnet as a network of its own.

    >>> from unloaf import Subnet, SubnetRow
    >>> str(SubnetRow(Subnet(((True, True), (True, False))), (2, 1), 93.2, 99.8, 0.21, 272_474).subnet)
    '2-1'
    """

    subnet: Subnet
    depths: tuple[int, ...]
    top1: float
    top5: float
    loss: float
    params: int


def evaluate_subnets(
    model: nn.Module,
    stages: Sequence[Stage],
    loader: Iterable[tuple[Any, Tensor]],
    *,
    subnets: Sequence[Subnet] | int | None = None,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    reduce: Reduction | None = None,
) -> list[SubnetRow]:
    """Accuracy of subnets of a model; the model is left as it was.

    Args:
        model: a trained network.
        stages: its stages.
        loader: batches ``(x, y)``, x a tensor or a mapping of keyword arguments, with class indices y, (batch,) or the
            leading dimensions of the logits; iterated per subnet.
        subnets: which ones; a number draws that many ordered ones, the main network among them; default: all ordered
            subnets (`enumerate_subnets`).
        calibration: batches of training inputs, ``x`` or ``(x, ...)``; before a subnet is judged, its batch-norm
            statistics are re-estimated from them on a copy. Without, a subnet is judged with the main network's
            statistics, which do not fit it. The main network always keeps its own.
        seed: of the sample, if ``subnets`` is a number.
        reduce: see `accuracy`.

    Returns:
        One row per subnet, in the order given.

    Raises:
        ValueError: a subnet of another model, a number below 1, an empty loader.

    Source: Ye et al. 2022 (ST) judge subnets after re-estimating batch-norm statistics.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(num_classes=10), torch.randn(4, 3, 32, 32)
    >>> stages = unloaf.find_stages(model, x)
    >>> rows = unloaf.evaluate_subnets(model, stages, [(x, torch.arange(4))], subnets=2, calibration=[x])
    >>> [row.depths for row in rows][0], rows[0].params > rows[1].params
    ((2, 2, 2, 2), True)
    """
    chosen = choose_subnets(stages, subnets, seed=seed)
    inner = inner_module(model)
    batches = None if calibration is None or not tracking_norms(inner) else calibration
    if batches is not None and iter(batches) is batches:
        batches = list(batches)  # a generator would be spent after the first subnet
    copied = copy.deepcopy(inner) if batches is not None else inner
    rows, device = [], next(inner.parameters()).device
    for subnet in chosen:
        judged = inner if subnet == Subnet.full(stages) else copied
        with active_subnet(judged, stages, subnet):
            if judged is not inner and batches is not None:
                recalibrate_bn(judged, (_to_device(batch, device) for batch in batches))
            result = accuracy(judged, loader, reduce=reduce)
        params = count_params(inner, stages, subnet)
        rows.append(SubnetRow(subnet, subnet.depths, result.top1, result.top5, result.loss, params))
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
    """The subnets that `evaluate_subnets` judges: those given, a drawn number of ordered ones, or all ordered ones.

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


def _to_device(batch: Any, device: torch.device) -> Any:
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    if isinstance(inputs, Mapping):
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return inputs.to(device)


def accuracy(model: nn.Module, loader: Iterable[tuple[Any, Tensor]], *, reduce: Reduction | None = None) -> Accuracy:
    """Loss and accuracy in evaluation mode, without autocast; the modes of the modules are put back.

    Args:
        model: gives logits, (batch, ..., classes).
        loader: batches ``(x, y)``, x a tensor or a mapping of keyword arguments, with class indices y, (batch, ...);
            entries of -100 (``ignore_index`` of torch's cross-entropy) are not counted.
        reduce: adds a tensor over processes, where each sees a share of the examples; every process gets the whole.

    Raises:
        ValueError: there was no example.
    """
    device = next(model.parameters(), torch.empty(0)).device
    # In double precision: sums over processes, or over another batch size, agree to the last digit shown.
    sums = torch.zeros(4, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    with evaluating(model):
        for x, y in loader:
            logits = logits_of(call_model(model, _to_device(x, device))).flatten(0, -2).float()
            targets = y.to(logits.device).flatten()
            best = logits.topk(min(5, logits.shape[-1])).indices == targets[:, None]
            loss = F.cross_entropy(logits, targets, reduction="sum")
            counted = (targets != _IGNORED).sum()
            sums += torch.stack([counted, best[:, 0].sum(), best.sum(), loss.double()]).to(sums)
    count, first, five, loss = (reduce(sums) if reduce else sums).tolist()
    if not count:
        raise ValueError("the loader yielded no example to judge on; give at least one batch (x, y)")
    return Accuracy(loss=loss / count, top1=100 * first / count, top5=100 * five / count)
