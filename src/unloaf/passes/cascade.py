"""A chain of exits on one batch: each exit computes what no earlier one did, for the examples that are left.

The model is called once for each exit. Where the calls of its modules so far are those of an earlier exit, with equal
statistics, a module returns what it returned then. `find_sharing` runs a copy on noise to learn what can be returned
so; the batches of a user run in `CascadePasses`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from unloaf.batchnorm import statistics_replaced
from unloaf.passes.containers import tensors_in, with_tensors
from unloaf.passes.guards import not_compiled
from unloaf.passes.replay import Site, shadows
from unloaf.stages import Stage, call_model, stand_in
from unloaf.subnet import BlockMode, Subnet, active_subnet, replaced_forwards

_Mode = BlockMode | Literal["between"]
Call = tuple[int, str, _Mode, int]  # after which node, of which module, how, with which group of statistics


class Exit(NamedTuple):
    """One subnet of a chain.

    Attributes:
        subnet: which one.
        statistics: buffers that it reads in the place of the model's, by name.
        groups: for each module path, the number of the first exit with the same statistics in it; 0 where left out.
    """

    subnet: Subnet
    statistics: Mapping[str, Tensor]
    groups: Mapping[str, int]


@dataclass(frozen=True)
class Kept:
    """What is done with the output of a call that a later exit would repeat.

    Attributes:
        axes: of each of its tensors, the one along which examples lie; None where it has none of its own for each.
        last: the last exit that reads it.
        copied: whether someone overwrites it in place.
        empty: whether only its shape is read.
    """

    axes: tuple[int | None, ...]
    last: int
    copied: bool
    empty: bool


@dataclass(frozen=True)
class Sharing:
    """Which calls of a chain are shared; of names and numbers, so that it survives a deepcopy.

    Attributes:
        nodes: a number for each call after the same calls.
        kept: the outputs that a later exit reads, by number.
        origins: of each exit, for each module it calls, which exit computes its output: an earlier one, or this one.
        copies_input: whether the model overwrites its input.
    """

    nodes: Mapping[Call, int]
    kept: Mapping[int, Kept]
    origins: tuple[Mapping[str, int], ...]
    copies_input: bool


class CascadePasses:
    """Runs the exits of a chain on one batch, in their order; to be used inside `open`."""

    def __init__(self, model: nn.Module, stages: Sequence[Stage], exits: Sequence[Exit], sharing: Sharing) -> None:
        self.model, self.stages, self.exits, self.sharing = model, stages, exits, sharing
        self.index, self.node, self.inside = 0, 0, 0
        self.modes: Mapping[str, BlockMode] = {}
        self.records: dict[int, Any] = {}
        self._paths: dict[nn.Module, str] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Shadow the model's modules for the time of the passes."""
        made = shadows(self, self.model, self.stages, [one.subnet for one in self.exits])
        modules = modules_of(self.model)
        if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
            self._paths = {module: path for path, module in self.model.named_modules() if module in made}
        compiled = any(module._compiled_call_impl is not None for module in modules)
        try:
            with not_compiled(self.model) if compiled else nullcontext(), replaced_forwards(made):
                yield
        finally:
            self.records.clear()

    def run(self, index: int, inputs: Any) -> Any:
        """What the model returns as this exit."""
        one = self.exits[index]
        self.index, self.node, self.inside = index, 0, 0
        self.modes = one.subnet.modes(self.stages)
        if self.sharing.copies_input and index + 1 < len(self.exits):
            inputs = inputs.clone()
        with statistics_replaced(self.model, one.statistics), self._hooks_of_computed():
            return call_model(self.model, inputs)

    def keep(self, rows: Tensor) -> None:
        """Forget all examples but these, and what no later exit reads."""
        kept = self.sharing.kept
        left = {node: value for node, value in self.records.items() if kept[node].last > self.index}
        self.records = {node: _rows(value, kept[node], rows) for node, value in left.items()}

    def block(self, site: Site, block: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Skip the block, or replay or compute it."""
        mode = self.modes.get(site.path)
        if mode is None:
            return stand_in(site.form, args, kwargs)
        if mode == "branch":
            assert site.branch is not None
            return self._call(site.path, mode, site.branch, (block, *args), kwargs)
        return self._call(site.path, mode, site.forward, args, kwargs)

    def between(self, site: Site, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Replay or compute the module."""
        if self.inside:  # the same module once more, within a block or a stem
            return site.forward(*args, **kwargs)
        return self._call(site.path, "between", site.forward, args, kwargs)

    def _call(self, path: str, mode: _Mode, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        group = self.exits[self.index].groups.get(path, 0)
        # A call that the noise did not lead to, nothing behind which is shared, has the number -1.
        self.node = node = self.sharing.nodes.get((self.node, path, mode, group), -1)
        kept = self.sharing.kept.get(node)
        if node in self.records:
            value = self.records[node]
            return with_tensors(value, Tensor.clone) if kept and kept.copied and not kept.empty else value
        value = self._computed(forward, args, kwargs)
        if kept is not None and kept.last > self.index:
            self.records[node] = _recorded(value, kept)
        return value

    def _computed(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.inside += 1
        try:
            return forward(*args, **kwargs)
        finally:
            self.inside -= 1

    @contextmanager
    def _hooks_of_computed(self) -> Iterator[None]:
        """Hooks see what is computed: not a skipped block, nor a second time what an earlier exit has computed."""
        origins = self.sharing.origins[self.index]
        silent = [module for module, path in self._paths.items() if origins.get(path) != self.index]
        held = [(module, module._forward_hooks, module._forward_pre_hooks) for module in silent]
        try:
            for module in silent:
                module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
            yield
        finally:
            for module, after, before in held:
                module._forward_hooks, module._forward_pre_hooks = after, before


def _recorded(value: Any, kept: Kept) -> Any:
    if kept.empty:
        # A NaN in its place takes no memory, and would be seen in the logits.
        return with_tensors(value, lambda tensor: tensor.new_full((), torch.nan).expand(tensor.shape))
    return with_tensors(value, Tensor.clone) if kept.copied else value


def _rows(value: Any, kept: Kept, rows: Tensor) -> Any:
    axes = iter(kept.axes)

    def some(tensor: Tensor) -> Tensor:
        axis = next(axes)
        if axis is None:
            return tensor
        if kept.empty:
            return tensor.narrow(axis, 0, len(rows))
        return tensor.index_select(axis, rows)

    return with_tensors(value, some)


@dataclass(eq=False)
class _Seen:
    """A call in a trial: what it gave, and who got that."""

    path: str
    mode: _Mode
    value: Any
    shapes: list[torch.Size]
    visits: list[int]
    given: list[tuple[Tensor, int]]

    @property
    def overwritten(self) -> bool:
        return any(tensor._version != version for tensor, version in self.given)


class _Trial(CascadePasses):
    """All exits on noise, to see what the calls give and what becomes of it."""

    def __init__(self, model: nn.Module, stages: Sequence[Stage], exits: Sequence[Exit]) -> None:
        super().__init__(model, stages, exits, Sharing({}, {}, ({},) * len(exits), copies_input=False))
        self.nodes: dict[Call, int] = {}
        self.seen: dict[int, _Seen] = {}

    def _call(self, path: str, mode: _Mode, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        call = (self.node, path, mode, self.exits[self.index].groups.get(path, 0))
        self.node = node = self.nodes.setdefault(call, len(self.nodes) + 1)
        before = self.seen.get(node)
        if before is not None and before.shapes:
            before.visits.append(self.index)
            value = with_tensors(before.value, Tensor.clone)
            before.given += [(tensor, tensor._version) for tensor in tensors_in(value)]
            return value
        value = self._computed(forward, args, kwargs)
        tensors = tensors_in(value)
        visits = [*(before.visits if before else []), self.index]
        shapes = [tensor.shape for tensor in tensors]
        copy = with_tensors(value, Tensor.clone) if tensors else None
        self.seen[node] = _Seen(path, mode, copy, shapes, visits, [(tensor, tensor._version) for tensor in tensors])
        return value


def find_sharing(model: nn.Module, stages: Sequence[Stage], exits: Sequence[Exit], noise: Tensor) -> Sharing:
    """Which calls the exits share, tried on noise.

    Args:
        model: a copy in eval mode, without hooks.
        stages: its stages.
        exits: the chain, smallest first.
        noise: three examples.

    Raises:
        ValueError: a block returns what cannot be returned again for some of the examples, or an exit would not give
            what the subnet gives.
    """
    trials = []
    for size in (2, 3):
        trial = _Trial(model, stages, exits)
        inputs = noise[:size].clone()
        version = inputs._version
        with trial.open():
            for index in range(len(exits)):
                trial.run(index, inputs)
        trials.append((trial, inputs._version != version))
    (two, overwritten), (three, _) = trials
    sharing = _sharing_of(two, three, copies_input=overwritten)
    reasons = []
    for empty in (True, False):
        tried = _with_empty(sharing, two, len(exits)) if empty else sharing
        reason = _difference(model, stages, exits, noise, tried)
        if reason is None:
            return tried
        reasons.append(reason)
    raise ValueError(
        f"{type(model).__name__} does not give the logits of subnet {reasons[-1]} where earlier calls are returned "
        "again; it hands on more than its modules return, and cannot be run as a cascade"
    )


def _sharing_of(two: _Trial, three: _Trial, *, copies_input: bool) -> Sharing:
    kept: dict[int, Kept] = {}
    origins: tuple[dict[str, int], ...] = tuple({} for _ in two.exits)
    for node, seen in two.seen.items():
        other = three.seen.get(node)
        axes = _axes(seen.shapes, other.shapes) if other is not None else None
        if axes is None and len(seen.visits) > 1 and seen.mode != "between":
            raise ValueError(
                f"block {seen.path!r} returns something else than tensors with the examples of the batch along one "
                "axis, so that examples cannot leave; the model cannot be run as a cascade"
            )
        again = axes is not None and len(seen.visits) > 1
        if again:
            assert axes is not None
            kept[node] = Kept(axes, max(seen.visits), seen.overwritten, empty=False)
        for index in seen.visits:
            origin = seen.visits[0] if again else index
            origins[index][seen.path] = max(origin, origins[index].get(seen.path, 0))
    return Sharing(two.nodes, kept, origins, copies_input)


def _axes(two: Sequence[torch.Size], three: Sequence[torch.Size]) -> tuple[int | None, ...] | None:
    """Along which axis of each tensor the examples lie; None if that cannot be told."""
    if not two or len(two) != len(three):
        return None
    axes: list[int | None] = []
    for small, large in zip(two, three, strict=True):
        if len(small) != len(large):
            return None
        changed = [axis for axis in range(len(small)) if small[axis] != large[axis]]
        if len(changed) > 1 or any((small[axis], large[axis]) != (2, 3) for axis in changed):
            return None
        axes.append(changed[0] if changed else None)
    return tuple(axes)


def _with_empty(sharing: Sharing, trial: _Trial, exits: int) -> Sharing:
    """The same without the values that are followed by another call that is returned: nobody computes with them."""
    read = set()  # what an exit returns last before it computes
    for index in range(1, exits):
        shared = [n for n, seen in trial.seen.items() if n in sharing.kept and index in seen.visits[1:]]
        read |= {max(shared)} if shared else set()
    floating = {n for n, seen in trial.seen.items() if all(t.is_floating_point() for t, _ in seen.given)}
    kept = {
        node: replace(one, empty=node in floating and node not in read and None not in one.axes)
        for node, one in sharing.kept.items()
    }
    return replace(sharing, kept=kept)


def _difference(
    model: nn.Module, stages: Sequence[Stage], exits: Sequence[Exit], noise: Tensor, sharing: Sharing
) -> Subnet | None:
    """The first subnet that does not give its own output; the first example leaves after the first exit."""
    alone, passes = [], CascadePasses(model, stages, exits, sharing)
    for one in exits:
        with active_subnet(model, stages, one.subnet), statistics_replaced(model, one.statistics):
            alone.append(tensors_in(call_model(model, noise.clone())))
    nan = not any(kept.empty for kept in sharing.kept.values())  # that of a network of its own
    rows = torch.arange(1, len(noise), device=noise.device)
    with passes.open():
        for index, expected in enumerate(alone):
            try:
                found = tensors_in(passes.run(index, noise.clone() if index == 0 else noise[rows]))
            except Exception:  # whatever a model raises that looks at values
                return exits[index].subnet
            passes.keep(rows if index == 0 else torch.arange(len(rows), device=noise.device))
            if index:
                expected = [t.index_select(0, rows) if t.ndim and len(t) == len(noise) else t for t in expected]
            if len(found) != len(expected) or not all(
                _close(a, b, nan=nan) for a, b in zip(expected, found, strict=True)
            ):
                return exits[index].subnet
    return None


def _close(one: Tensor, another: Tensor, *, nan: bool) -> bool:
    if one.shape != another.shape:
        return False
    tolerance = 1e-4 if one.dtype in (torch.float32, torch.float64) else 2e-2
    scale = float(one.abs().nan_to_num(0, 0, 0).amax()) if one.numel() else 0.0
    return torch.allclose(one, another, rtol=tolerance, atol=tolerance * scale, equal_nan=nan)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model. A fifth of the time of ``model.modules()``, which counts in networks of milliseconds."""
    found: dict[nn.Module, None] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting += [child for child in module._modules.values() if child is not None]
    return list(found)


def without_hooks(model: nn.Module) -> nn.Module:
    """The model, whose forward hooks are taken off for good: a copy, on which nobody means to look."""
    for module in model.modules():
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    return model


def outside_inference_mode() -> Any:
    """A context in which it is told which tensors are overwritten."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
