"""The most memory a training step holds: saved tensors on a CPU, the allocator's peak on CUDA."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn


def peak_bytes(model: nn.Module, step: Callable[[int], None], *, device: torch.device, steps: int = 3) -> int:
    """Highest peak over a few steps, in bytes; `step` makes the step of a number and begins without gradients.

    On CUDA all that the allocator has given out counts, weights and gradients too; elsewhere the tensors that autograd
    keeps for the backward pass, without parameters.

    >>> model, x = nn.Linear(4, 2), torch.ones(3, 4)
    >>> peak_bytes(model, lambda step: model(x).square().sum().backward(), device=x.device)  # x, and what is squared
    72
    """
    if device.type == "cuda":
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        for index in range(steps):
            step(index)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    peak = 0
    for index in range(steps):
        saved = _SavedTensors(model)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            step(index)
        peak = max(peak, saved.peak)
    return peak


class _SavedTensors:
    """Bytes that autograd keeps for backward passes; a storage counts once, parameters do not count."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.holders: Counter[int] = Counter()
        self.live = self.peak = 0

    def pack(self, tensor: Tensor) -> _Held:
        return _Held(self, tensor)

    def unpack(self, held: _Held) -> Tensor:
        return held.tensor

    def change(self, tensor: Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.parameters:
            return
        before = self.holders[storage.data_ptr()]
        self.holders[storage.data_ptr()] += by
        if before == 0 or before + by == 0:
            self.live += by * storage.nbytes()
            self.peak = max(self.peak, self.live)


class _Held:
    """A saved tensor; told off when autograd drops it."""

    def __init__(self, account: _SavedTensors, tensor: Tensor) -> None:
        # Detached: holding a tensor that holds its own graph would never be dropped.
        self.account, self.tensor = account, tensor.detach()
        account.change(self.tensor, 1)

    def __del__(self) -> None:
        self.account.change(self.tensor, -1)
