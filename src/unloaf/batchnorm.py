"""Batch-norm statistics of a subnet: left alone in training, re-estimated before it is judged or exported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from unloaf.stages import call_model, modes_kept


def tracking_norms(model: nn.Module) -> list[Any]:
    """The modules that keep running statistics: batch norms of torch and timm, instance norms that track them.

    Typed as Any because they share attributes, not a class.
    """
    # Not getattr: for modules that lack the attribute it raises inside, which took most of the time of a search.
    return [module for module in model.modules() if module.__dict__.get("track_running_stats", False)]


# The buffers of each norm, and those that stand in for them while its statistics are frozen: kept, because making them
# anew costs small networks more than the norm itself.
_standins: WeakKeyDictionary[nn.Module, dict[str, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Passes inside normalise with their batch's statistics, as in training, but leave the running ones alone.

    They move buffers of the same shape that stand in for the model's: so a norm does the same with and without, and a
    compiled block needs no second graph; a ``state_dict`` taken inside holds them. Modules in eval mode keep using
    their running statistics.
    """
    held = [(norm, dict(norm._buffers)) for norm in tracking_norms(model) if norm.training]
    try:
        for norm, buffers in held:
            known = _standins.setdefault(norm, {})
            for name, own in buffers.items():
                if own is None or (name in known and known[name][1] is own):  # frozen already
                    continue
                if name not in known or known[name][0] is not own:
                    known[name] = own, torch.zeros_like(own)
                norm._buffers[name] = known[name][1]
        yield
    finally:
        for norm, buffers in held:
            norm._buffers.update(buffers)


def _averages_without_momentum(norm: nn.Module) -> bool:
    """Whether ``momentum=None`` means a plain average, as in torch's batch norms; its instance norms take it for 0."""
    return not isinstance(norm, nn.modules.instancenorm._InstanceNorm)


# Models inside `statistics_unless_raised`.
_guarded: WeakSet[nn.Module] = WeakSet()


@contextmanager
def statistics_unless_raised(model: nn.Module) -> Iterator[None]:
    """Passes inside move the running statistics; if anything raises they are put back: a failed step changes none.

    Inside another one for the same model it does nothing: a loop that undoes a whole step undoes its parts.
    """
    if model in _guarded:
        yield
        return
    buffers: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for norm in tracking_norms(model):
        if norm.training:
            for buffer in norm._buffers.values():
                if buffer is not None:
                    buffers.setdefault((buffer.device, buffer.dtype), []).append(buffer)
    # One copy of all buffers of a kind instead of one of each: this runs in every step.
    before = [(group, torch.cat([buffer.flatten() for buffer in group])) for group in buffers.values()]
    _guarded.add(model)
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for group, values in before:
                for buffer, value in zip(group, values.split([b.numel() for b in group]), strict=True):
                    buffer.copy_(value.view_as(buffer))
        raise
    finally:
        _guarded.discard(model)


def recalibrate_bn(model: nn.Module, batches: Iterable[Any]) -> int:
    """Re-estimate the running statistics of all batch norms: the plain average over the given batches.

    Call it inside `active_subnet`, on a copy, to judge or export a subnet. Only batch norms run in training mode, and
    no gradient is computed.

    Args:
        model: changed in place: ``running_mean``, ``running_var``, ``num_batches_tracked``.
        batches: inputs, tensors or mappings, or ``(inputs, ...)`` tuples as loaders yield them; on the model's device.

    Returns:
        The number of batches used; 0, with nothing changed, for a model without batch norm.

    Raises:
        ValueError: no batch was given though the model has batch norms.

    >>> import torch, unloaf
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1, affine=False)).eval()
    >>> unloaf.recalibrate_bn(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
    2
    >>> model[0].running_mean
    tensor([4.])
    """
    norms = tracking_norms(model)
    if not norms:
        return 0
    momenta = [(norm, norm.momentum) for norm in norms]
    count = 0
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            for batch in batches:
                if count == 0:
                    for norm in norms:
                        norm.reset_running_stats()
                        norm.train()
                for norm in norms:
                    momentum = None if _averages_without_momentum(norm) else 1 / (count + 1)
                    norm.momentum = momentum
                call_model(model, batch if isinstance(batch, (Tensor, Mapping)) else batch[0])
                count += 1
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
    if count == 0:
        raise ValueError(
            "no batch was given to re-estimate batch-norm statistics from; give at least one, better 2,000 images"
        )
    return count
