"""Eval mode for a while: the model is afterwards as it was, whatever its own `train` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unloaf.buffers import Buffers


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Inside, modes may be switched; every module gets its own back, whatever happens.

    By way of its `train`, where its class has one of its own (LoRA layers merge their weights in eval mode and un-merge
    them in training mode), and in the end to the letter, as modules in one model may be in different modes.
    """
    flags = [(module, module.training) for module in model.modules()]
    switched = [(module, training) for module, training in flags if _has_own_train(module)]
    weights = {p: p.detach().clone() for module, _ in switched for p in module.parameters()}
    try:
        yield
    finally:
        for module, training in switched:  # outer ones first: each switches what it holds, which is switched again
            module.train(training)
        for module, training in flags:
            if module.training != training:
                module.training = training
        for parameter, before in weights.items():
            _undo_rounding(parameter, before)


def _has_own_train(module: nn.Module) -> bool:
    # Those of torch.nn, DistributedDataParallel's say, change nothing of what they hold; that of transformers' models
    # only asks for other kernels, where they use such.
    function = getattr(module.train, "__func__", None)
    if function is nn.Module.train:
        return False
    home = getattr(function, "__module__", "")
    plain = home == "transformers.modeling_utils" and not getattr(module, "use_kernels", False)
    return not (plain or home.startswith("torch.nn."))


def _undo_rounding(parameter: Tensor, before: Tensor) -> None:
    """The exact weights where they differ by rounding only, as ``(w + d) - d`` does from w."""
    with torch.no_grad():
        if torch.equal(parameter, before) or not before.is_floating_point():
            return
        tolerance = 64 * torch.finfo(before.dtype).eps
        if torch.allclose(parameter, before, rtol=tolerance, atol=tolerance * float(before.abs().max())):
            parameter.copy_(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients or autocast; modes and buffers are put back, whatever happens."""
    with modes_kept(model), buffers_kept(model):
        if any(module.training for module in model.modules()):
            model.eval()
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """What passes inside change of buffers in place, as observers of quantisation do in any mode, is undone.

    A buffer that a pass replaces by another one (a table that has grown) stays replaced.
    """
    start = Buffers(model.modules())
    try:
        yield
    finally:
        start.put_back(replaced=False)
