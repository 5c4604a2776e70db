"""Batch-norm statistics of a subnet: left alone in training, re-estimated before it is evaluated or exported."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unloaf.buffers import Buffers
from unloaf.stages import Stage, call_model, is_list_of_images, modes_kept
from unloaf.subnet import Subnet, active_subnet


def tracking_norms(model: nn.Module) -> list[Any]:
    """The modules that keep running statistics: batch norms of torch and timm, instance norms that track them, and
    others of their interface, ``running_mean`` or ``running_var`` and a ``momentum`` (EvoNorm, InplaceAbn).

    Typed as Any because they share attributes, not a class.
    """
    return [module for module in model.modules() if _tracks(module)]


def _tracks(module: nn.Module) -> bool:
    # Not getattr: for modules that lack the attribute it raises inside, which took most of the time of a search.
    tracks = module.__dict__.get("track_running_stats")
    if tracks is not None or not any(module._buffers.get(name) is not None for name in _STATISTICS):
        return bool(tracks)
    return isinstance(getattr(module, "momentum", None), (int, float))


def _split(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules with buffers: norms that read no statistics in training mode, and all others."""
    known, others = [], []
    for module in model.modules():
        if type(module).__module__.startswith("torch.ao."):  # trained quantisation reads those of the norms it holds
            return [], [module for module in model.modules() if module._buffers]
        if module._buffers:
            kind: Any = type(module)
            tracks = module.__dict__.get("track_running_stats") is not None
            (known if tracks and kind.forward.__module__.startswith(_READS_NONE) else others).append(module)
    return known, others


_STATISTICS = ("running_mean", "running_var")
_READS_NONE = ("torch.nn.modules.", "timm.layers.")


# The buffers of each norm, and those that stand in for them while its statistics are frozen: kept, because making them
# again costs small networks more than the norm itself.
_standins: WeakKeyDictionary[nn.Module, dict[str, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


class Statistics:
    """Running statistics of a model's norms and all its other buffers, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._norms, others = _split(model)
        self._others = Buffers(others)

    @contextmanager
    def frozen(self) -> Iterator[Callable[[], None]]:
        """Passes inside normalise with their batch's statistics, as in training, but leave all buffers alone.

        Batch norms move buffers of the same shape that stand in for the model's: so a norm does the same with and
        without, and a compiled block needs no second graph; a ``state_dict`` taken inside holds them. Modules in eval
        mode keep using their running statistics. All other buffers begin as they were when this object was made, again
        after each call of the function that is given, and end as they are now.
        """
        held = [(norm, dict(norm._buffers)) for norm in self._norms if norm.training]
        with self._others.again() as begin:
            try:
                for norm, buffers in held:
                    known = _standins.setdefault(norm, {})
                    for name, own in buffers.items():
                        if own is None or (name in known and known[name][1] is own):  # frozen already
                            continue
                        if name not in known or known[name][0] is not own:
                            known[name] = own, torch.zeros_like(own)
                        norm._buffers[name] = known[name][1]
                yield begin
            finally:
                for norm, buffers in held:
                    norm._buffers.update(buffers)

    @contextmanager
    def unless_raised(self) -> Iterator[None]:
        """Passes inside move running statistics and other buffers; if anything raises, a failed step, all are put back.

        To be entered before the first pass.
        """
        buffers: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for norm in self._norms:
            if norm.training:
                for buffer in norm._buffers.values():
                    if buffer is not None:
                        buffers.setdefault((buffer.device, buffer.dtype), []).append(buffer)
        # One copy of all buffers of a kind instead of one of each: this runs in every step.
        before = [(group, torch.cat([buffer.flatten() for buffer in group])) for group in buffers.values()]
        try:
            yield
        except BaseException:
            self._others.put_back()
            with torch.no_grad():
                for group, values in before:
                    for buffer, value in zip(group, values.split([b.numel() for b in group]), strict=True):
                        buffer.copy_(value.view_as(buffer))
            raise


def _averages_without_momentum(norm: nn.Module) -> bool:
    """Whether ``momentum=None`` means a plain average, as in torch's batch norms; its instance norms take it for 0."""
    kind: Any = type(norm)
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and kind.forward.__module__.startswith(_READS_NONE)


def _forget(norm: Any) -> None:
    if hasattr(norm, "reset_running_stats"):
        norm.reset_running_stats()
    else:
        for name, value in zip(_STATISTICS, (0.0, 1.0), strict=True):
            if norm._buffers.get(name) is not None:
                norm._buffers[name].fill_(value)


def _momentum(norm: nn.Module, usual: float | None, share: float) -> float:
    """The momentum with which a batch gets a share of the average, in the sense in which the norm means its own.

    In torch and timm it is the weight of the new batch, whatever its value, usually 0.1; in user-defined norms it may
    be that of the old average (TensorFlow), usually 0.9.
    """
    in_torch = isinstance(norm, nn.modules.batchnorm._NormBase) or type(norm).__module__.startswith("timm.")
    return 1 - share if not in_torch and usual is not None and usual > 0.5 else share


def _warn_of_what_cannot_be_estimated(model: nn.Module, inputs: Any) -> None:
    """Modules with running statistics that move in training mode, by no momentum that can be set."""
    paths = [path for path, m in model.named_modules() if not _tracks(m) and any(map(_is_running, m._buffers.items()))]
    if not paths:
        return
    modules = [model.get_submodule(path) for path in paths]
    start = Buffers(modules)
    for module in modules:
        module.training = True
    call_model(model, inputs)
    for module in modules:
        module.training = False
    moved = start.moved
    start.put_back()
    if moved:
        named = ", ".join(f"{path} ({type(m).__name__})" for path, m in zip(paths, modules, strict=True) if m in moved)
        warnings.warn(
            f"running statistics that have no momentum are not re-estimated: {named}; they stay those of the network "
            "as it was trained",
            stacklevel=3,
        )


def _is_running(item: tuple[str, Tensor | None]) -> bool:
    return item[0].startswith("running_") and item[1] is not None


def _examples(inputs: Any) -> int:
    """How many there are: of a mapping, in its first tensor; all alike where no tensor says it."""
    if is_list_of_images(inputs):
        return len(inputs)
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return next((len(x) for x in tensors if isinstance(x, Tensor) and x.dim()), 1)


def recalibrate_bn(model: nn.Module, batches: Iterable[Any]) -> int:
    """Re-estimate the running statistics of all batch norms: the average over the given batches.

    Means and (unbiased) variances of the batches are averaged, each by its number of examples: a batch of two counts as
    two. Call it inside `active_subnet`, on a copy, to evaluate or export a subnet. Only batch norms run in training
    mode, and no gradient is computed. Norms of other classes (EvoNorm) count where they have ``running_mean`` or
    ``running_var`` and a ``momentum``; running statistics that move by no such momentum are left, with a warning that
    names them.

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
    count, total, plain = 0, 0, True
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            for batch in batches:
                inputs = batch if isinstance(batch, (Tensor, Mapping)) else batch[0]
                if count == 0:
                    _warn_of_what_cannot_be_estimated(model, inputs)
                    for norm in norms:
                        _forget(norm)
                        norm.train()
                size = _examples(inputs)
                count, total = count + 1, total + size
                plain = plain and total == count * size  # all are of the same size so far
                for norm, usual in momenta:
                    # None where it will do: a momentum that changes makes a compiled block compile again.
                    as_usual = plain and _averages_without_momentum(norm)
                    norm.momentum = None if as_usual else _momentum(norm, usual, size / max(1, total))
                call_model(model, inputs)
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
    if count == 0:
        raise ValueError(
            "no batch was given to re-estimate batch-norm statistics from; give at least one, better 2,000 images"
        )
    return count


def names_of_statistics(model: nn.Module, stages: Sequence[Stage], subnet: Subnet) -> list[str]:
    """Names of the ``running_mean`` and ``running_var`` that a subnet reads."""
    kept = subnet.modes(stages)
    skipped = tuple(f"{path}." for stage in stages for path in stage.blocks if path not in kept)
    return [
        f"{path}.{name}"
        for path, norm in _named_norms(model)
        for name in _STATISTICS
        if not f"{path}.".startswith(skipped) and norm._buffers.get(name) is not None
    ]


@contextmanager
def statistics_replaced(model: nn.Module, statistics: Mapping[str, Tensor]) -> Iterator[None]:
    """Passes inside read, and move, these buffers in the place of the model's; by reference, nothing is copied."""
    before = []
    try:
        for name, tensor in statistics.items():
            path, _, buffer = name.rpartition(".")
            buffers = model.get_submodule(path)._buffers
            before.append((buffers, buffer, buffers[buffer]))
            buffers[buffer] = tensor
        yield
    finally:
        for buffers, buffer, tensor in before:
            buffers[buffer] = tensor


def estimated_statistics(
    model: nn.Module, stages: Sequence[Stage], subnet: Subnet, batches: Iterable[Any]
) -> dict[str, Tensor]:
    """What `recalibrate_bn` makes of a subnet's statistics, by name of the buffer; the model keeps its own."""
    fresh = {
        f"{path}.{name}": buffer.clone()
        for path, norm in _named_norms(model)
        for name, buffer in norm.named_buffers(recurse=False)
    }
    with active_subnet(model, stages, subnet), statistics_replaced(model, fresh):
        recalibrate_bn(model, batches)
    return {name: fresh[name] for name in names_of_statistics(model, stages, subnet)} if fresh else {}


def _named_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    tracking = set(tracking_norms(model))
    return [(path, module) for path, module in model.named_modules() if module in tracking]
