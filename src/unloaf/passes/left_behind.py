"""What a call leaves behind beside its output, for a loss that may read it: then it is no call to replay."""

from __future__ import annotations

from torch import Tensor, nn

from unloaf.passes.containers import tensors_in

_EVERY_MODULE_HAS = frozenset(nn.Module().__dict__)


class _Same:
    """A tensor that equals itself alone; it is kept, so that no other one gets its address."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.tensor is other.tensor

    __hash__ = object.__hash__


def left_in(module: nn.Module) -> list[_Same | float]:
    """The tensors and numbers that are kept as attributes, of a module and of those inside it: an auxiliary loss, a
    map of attention, a cache, a count.

    >>> import torch
    >>> module = nn.Sequential(nn.ReLU())
    >>> module[0].latest = torch.zeros(2)
    >>> before = left_in(module)
    >>> before == left_in(module)
    True
    >>> module[0].latest = torch.zeros(2)
    >>> before == left_in(module)
    False
    """
    kept = (item for inner in module.modules() for item in inner.__dict__.items())
    values = [value for name, value in kept if name not in _EVERY_MODULE_HAS]
    numbers = [value for value in values if type(value) in (int, float)]
    return [*numbers, *(_Same(tensor) for value in values for tensor in tensors_in(value))]


def has_inner_hooks(module: nn.Module) -> bool:
    """Whether hooks wait for calls inside a module, which do not come when it is replayed; those of torch's own norms
    of weights only prepare such a call.
    """
    return any(
        not type(hook).__module__.startswith("torch.nn.utils.")
        for inner in module.modules()
        if inner is not module
        for hook in (*inner._forward_pre_hooks.values(), *inner._forward_hooks.values())
    )
