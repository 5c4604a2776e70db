"""The exits of a chain as modules of their own, for exporters: each takes what earlier ones hand on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.passes.cascade import CascadePasses, Exit, Kept, Sharing
from unloaf.passes.containers import tensors_in, with_tensors
from unloaf.passes.readout import Readout, logits_of
from unloaf.stages import Stage, copy_of


class Segment(nn.Module):
    """What one exit adds: ``segment(*given) -> (logits, *made)``, for the examples that are left.

    Attributes:
        takes: names of what it is given: "images" at the first exit, later what earlier exits made under these names.
        makes: names of what it hands on to later ones.
        axes: of each of `makes`, the axis of the examples.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        exits: Sequence[Exit],
        sharing: Sharing,
        index: int,
        example: Tensor,
        readout: Readout | None = None,
    ) -> None:
        super().__init__()
        self.model = copy_of(model).eval()
        for name, tensor in exits[index].statistics.items():
            self.model.get_buffer(name).copy_(tensor)
        self.stages, self.sharing, self.index, self.readout = tuple(stages), sharing, index, readout
        self.exits = tuple(one._replace(statistics={}) for one in exits)
        self._example = example
        self._before, after, read = _records(model, stages, exits, sharing, index, example)
        self._before = {node: value for node, value in self._before.items() if sharing.kept[node].last >= index}
        self._read = [node for node in self._before if node in read and not sharing.kept[node].empty]
        self._made = [node for node in after if node not in self._before and not sharing.kept[node].empty]
        self.takes = (
            ["images"] if index == 0 else [n for node in self._read for n, _ in _named(node, self._before, sharing)]
        )
        made = [pair for node in self._made for pair in _named(node, after, sharing)]
        self.makes, self.axes = [name for name, _ in made], [axis for _, axis in made]
        if not self.takes:
            raise ValueError(f"exit {index} has nothing in common with earlier ones; export it as a subnet of its own")

    @property
    def examples(self) -> tuple[Tensor, ...]:
        """What earlier exits made of the example."""
        return (self._example,) if self.index == 0 else tuple(tensor for tensor, _ in self._taken())

    @property
    def taken_axes(self) -> list[int]:
        """Of each of `takes`, the axis of the examples."""
        return [0] if self.index == 0 else [axis for _, axis in self._taken()]

    def _taken(self) -> list[tuple[Tensor, int]]:
        return [
            (tensor, axis)
            for node in self._read
            for tensor, axis in zip(tensors_in(self._before[node]), self.sharing.kept[node].axes, strict=True)
            if axis is not None
        ]

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Logits, and what later exits take."""
        passes = CascadePasses(self.model, self.stages, self.exits, self.sharing)
        images = given[0]
        if self.index:
            tensors = iter(given)
            kept = self.sharing.kept[self._read[0]]
            size = given[0].shape[next(axis for axis in kept.axes if axis is not None)]
            passes.records = {
                node: _filled(value, self.sharing.kept[node], size, tensors if node in self._read else None)
                for node, value in self._before.items()
            }
            images = _empty(self._example, 0, size)
        with passes.open():
            logits = logits_of(passes.run(self.index, images), self.readout)
            made = [
                tensor
                for node in self._made
                for tensor, axis in zip(tensors_in(passes.records[node]), self.sharing.kept[node].axes, strict=True)
                if axis is not None
            ]
        return (logits, *made)


def _records(
    model: nn.Module, stages: Sequence[Stage], exits: Sequence[Exit], sharing: Sharing, index: int, example: Tensor
) -> tuple[dict[int, Any], dict[int, Any], set[int]]:
    """What is kept before an exit and after it, on an example, and which of it the exit reads."""
    passes, read = CascadePasses(model, stages, exits, sharing), _Reads()
    with torch.no_grad(), passes.open():
        for earlier in range(index):
            passes.run(earlier, example.clone())
        before = dict(passes.records)
        read.update(before)
        passes.records = read
        passes.run(index, example.clone())
        return before, dict(read), read.found


class _Reads(dict[int, Any]):
    """Records that tell which of them were read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __getitem__(self, node: int) -> Any:
        self.found.add(node)
        return super().__getitem__(node)


def _named(node: int, records: dict[int, Any], sharing: Sharing) -> list[tuple[str, int]]:
    """Name and axis of each tensor of a record that holds examples."""
    axes = sharing.kept[node].axes
    several = len(tensors_in(records[node])) > 1
    return [
        (f"hidden_{node}_{i}" if several else f"hidden_{node}", axis) for i, axis in enumerate(axes) if axis is not None
    ]


def _filled(value: Any, kept: Kept, size: Any, tensors: Any) -> Any:
    """The record of an example with the examples that are given, or none where nobody reads them."""
    axes = iter(kept.axes)

    def fill(tensor: Tensor) -> Tensor:
        axis = next(axes)
        if axis is None:
            return tensor
        return _empty(tensor, axis, size) if tensors is None else next(tensors)

    return with_tensors(value, fill)


def _empty(tensor: Tensor, axis: int, size: Any) -> Tensor:
    shape = [size if i == axis else length for i, length in enumerate(tensor.shape)]
    return torch.full((), torch.nan, dtype=tensor.dtype, device=tensor.device).expand(shape)
