"""Whether passes may share calls: whether a model, with recorded outputs in the place of calls, gives what it gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.buffers import Buffers
from unloaf.stages.probe import Call, drawing_alike
from unloaf.stages.stage import call_model


def is_replayable(
    model: nn.Module,
    example: Any,
    blocks: Mapping[str, nn.Module],
    calls: Mapping[str, Call],
    output: Any,
    start: Buffers,
) -> bool:
    """Whether the calls hand on nothing but what they return, and the output depends on nothing but the input.

    Not so where a block appends to a list that it was given, or leaves a feature on itself that the head reads. In
    between other inputs have to be run, so that what is left over from the trace is told from what a call returns.

    Args:
        model: in eval mode.
        example: what was traced.
        blocks: the blocks of all stages by path.
        calls: from `trace`.
        output: of the model in the trace.
        start: the buffers with which the trace began.
    """
    known = _known(output)
    if not known or known[0].is_meta:
        return True
    modules = {**blocks, **dict(between_blocks(model, blocks))}
    recorded = {module: calls[path] for path, module in modules.items() if path in calls and calls[path].intact}
    inside = set(blocks.values())
    # Each with its counterpart, so that one sees what the other's calls leave: blocks and the rest, every second call.
    parts = [
        [module for module in recorded if module in inside],
        [module for module in recorded if module not in inside],
        list(recorded)[::2],
        list(recorded)[1::2],
    ]
    found = (_output(model, example, {m: recorded[m] for m in part}, start) for part in parts)
    return all(len(other) == len(known) and all(map(_close, known, other)) for other in found)


def _output(model: nn.Module, example: Any, recorded: Mapping[nn.Module, Call], start: Buffers) -> list[Tensor]:
    with drawing_alike(model), start.again(), _replayed(recorded):
        try:
            return _known(call_model(model, example))
        except Exception:  # it misses what a call would have left
            return []


@contextmanager
def _replayed(recorded: Mapping[nn.Module, Call]) -> Iterator[None]:
    before = {module: module.__dict__.get("forward") for module in recorded}
    try:
        for module, call in recorded.items():
            module.__dict__["forward"] = lambda *_, output=call.output, **__: output
        yield
    finally:
        for module, forward in before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def between_blocks(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that neither are, hold, nor belong to a block."""
    holders = {"", *(path.rpartition(".")[0] for path in blocks)}
    holders |= {parent[:i] for parent in holders for i, letter in enumerate(parent) if letter == "."}

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if inner in holders or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                if inner not in blocks:
                    yield from walk(inner, child)
            elif inner not in blocks and not isinstance(child, nn.Identity):
                yield inner, child

    return walk("", model)


def _known(output: Any) -> list[Tensor]:
    """The logits, or the first tensor; of nested outputs (a detector's boxes, image by image) all tensors."""
    found = output["logits"] if isinstance(output, Mapping) and "logits" in output else output
    found = getattr(found, "logits", found)
    if isinstance(found, Tensor):
        return [found]
    items = [*found.values()] if isinstance(found, Mapping) else found if isinstance(found, (tuple, list)) else []
    first = [item for item in items if isinstance(item, Tensor)][:1] if isinstance(found, (tuple, list)) else []
    return first or [tensor for item in items for tensor in _known(item)]


def _close(one: Tensor, another: Tensor) -> bool:
    if one.shape != another.shape:
        return False
    # Kernels of accelerators may add in another order.
    tolerance = 1e-4 if one.dtype in (torch.float32, torch.float64) else 1e-2
    scale = float(one.abs().nan_to_num(0, 0, 0).amax()) if one.numel() else 0.0
    return torch.allclose(one, another, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
