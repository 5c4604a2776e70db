"""What a training step costs, measured: time and memory beside the least FLOPs of the very same draws."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unloaf.analysis.flops import method_flops
from unloaf.batchnorm import frozen_statistics
from unloaf.inputs import resize
from unloaf.methods import CommonTraining, TrainingMethod
from unloaf.methods.step import SubnetTraining
from unloaf.passes import logits_of
from unloaf.stages import call_model, inner_module
from unloaf.subnet import active_subnet


@dataclass(frozen=True)
class StepTimeRow:
    """Cost of a method's step; "relative" is always to a step of common training right before.

    Attributes:
        method: its label.
        seconds: median time of a step.
        relative: median over the repeats of the relative time.
        spread: lowest and highest relative time.
        limit: mean relative FLOPs with exact prefix sharing, the least possible.
        over_limit: median over the repeats of relative time / relative FLOPs.
        separate: median relative time with a complete pass for each subnet; None for methods of one pass.
        separate_limit: mean relative FLOPs of separate passes.
        peak_bytes: peak memory of a step: tensors saved for the backward pass, parameters apart (CPU), or the peak of
            the allocator (CUDA).
        relative_memory: of the peak.
    """

    method: str
    seconds: float
    relative: float
    spread: tuple[float, float]
    limit: float
    over_limit: float
    separate: float | None
    separate_limit: float
    peak_bytes: int
    relative_memory: float


_COMMON = "common"


def step_time_rows(
    methods: Mapping[str, TrainingMethod], x: Any, y: Any, *, repeats: int = 10, warmup: int = 2
) -> list[StepTimeRow]:
    """Measure a step of each method, interleaved in one process, and of the same step with separate passes.

    Args:
        methods: label to method; "common" must be among them.
        x: a batch, on the device to measure.
        y: its targets.
        repeats: rounds over all methods; each draws anew.
        warmup: rounds before that are not counted.

    Raises:
        ValueError: no common training among the methods, or fewer than one repeat.
    """
    if not isinstance(methods.get(_COMMON), CommonTraining):
        raise ValueError(f"methods are {sorted(methods)}; 'common' must be among them, all else is relative to it")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; give at least 1")
    pairs: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for step in range(-warmup, repeats):
        for label, method in methods.items():
            variants = [False, True] if isinstance(method, SubnetTraining) else [False]
            for separate in variants:
                # A step of common training right before each: what else the machine does slows both alike.
                common = _timed(methods[_COMMON], x, y, max(step, 0), separate=False)
                taken = common if label == _COMMON else _timed(method, x, y, max(step, 0), separate=separate)
                if step >= 0:
                    pairs.setdefault((label, separate), []).append((taken, common))
    peaks = {label: _peak_bytes(method, x, y) for label, method in methods.items()}
    return [_row(label, methods[label], x, pairs, peaks) for label in methods]


def separate_backward(method: SubnetTraining, x: Any, y: Any) -> None:
    """The same step with a complete forward and backward pass for each subnet: what sharing is measured against."""
    passes = method.draw(x)
    model = inner_module(method.model)
    logits = logits_of(call_model(method.model, x))
    method.criterion(logits, y).backward()
    teacher = logits.detach()
    known: list[Tensor | None] = [None] * len(passes)
    for index, request in enumerate(passes):
        inputs = x if request.side is None else resize(x, request.side)
        with active_subnet(model, method.stages, request.subnet), frozen_statistics(model):
            student = logits_of(call_model(model, inputs))
        known[index] = student.detach()
        (method.subnet_weight * method.subnet_term(index, student, teacher, known)).backward()
    method.step += 1


def _run(method: TrainingMethod, x: Any, y: Any, step: int, *, separate: bool = False) -> None:
    method.model.zero_grad(set_to_none=True)
    method.step = step
    if separate:
        assert isinstance(method, SubnetTraining)
        separate_backward(method, x, y)
    else:
        method.backward(x, y)


def _timed(method: TrainingMethod, x: Any, y: Any, step: int, *, separate: bool) -> float:
    wait: Callable[[], Any] = torch.cuda.synchronize if getattr(x, "is_cuda", False) else lambda: None
    wait()
    start = time.perf_counter()
    _run(method, x, y, step, separate=separate)
    wait()
    return time.perf_counter() - start


def _peak_bytes(method: TrainingMethod, x: Any, y: Any, steps: int = 3) -> int:
    """Highest peak over a few draws."""
    if getattr(x, "is_cuda", False):
        torch.cuda.reset_peak_memory_stats()
        for step in range(steps):
            _run(method, x, y, step)
        return torch.cuda.max_memory_allocated()
    peak = 0
    for step in range(steps):
        saved = _SavedTensors(method)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            _run(method, x, y, step)
        peak = max(peak, saved.peak)
    return peak


class _SavedTensors:
    """Bytes that autograd keeps for backward passes; a storage counts once, parameters do not count."""

    def __init__(self, method: TrainingMethod) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in method.model.parameters()}
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


def _row(
    label: str,
    method: TrainingMethod,
    x: Any,
    pairs: Mapping[tuple[str, bool], Sequence[tuple[float, float]]],
    peaks: Mapping[str, int],
) -> StepTimeRow:
    mine = pairs[label, False]
    relative = [taken / common for taken, common in mine]
    flops = [method_flops(method, x, [step]) for step in range(len(mine))]
    limits = [f.shared / f.common for f in flops]
    separate = [taken / common for taken, common in pairs.get((label, True), ())]
    return StepTimeRow(
        method=label,
        seconds=statistics.median(taken for taken, _ in mine),
        relative=statistics.median(relative),
        spread=(min(relative), max(relative)),
        limit=statistics.fmean(limits),
        over_limit=statistics.median(r / limit for r, limit in zip(relative, limits, strict=True)),
        separate=statistics.median(separate) if separate else None,
        separate_limit=statistics.fmean(f.separate / f.common for f in flops),
        peak_bytes=peaks[label],
        relative_memory=peaks[label] / peaks[_COMMON],
    )
