"""Calls of the model that compute what is new and replay what was computed before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from unloaf.batchnorm import Statistics
from unloaf.passes.containers import tensors_in, version_of, with_tensors
from unloaf.passes.draws import Draws, RandomState
from unloaf.passes.guards import CheckpointGuard, not_compiled, uncompiled
from unloaf.passes.left_behind import has_inner_hooks, left_in
from unloaf.passes.plan import Move, Pass, Plan, State, SubnetPass
from unloaf.passes.terms import Losses, Terms
from unloaf.stages import Form, Stage, between_blocks, inner_module, stand_in
from unloaf.subnet import Subnet, branches, check_stages, check_subnet, replaced_forwards, replaces_forward

Key = tuple[State, str, int]  # in this state the call of this module ("" for a block) of this number


@dataclass(eq=False)
class Record:
    """The output of a module call, the random state it left, and the gradients that later passes returned for it."""

    value: Any
    tensors: list[Tensor]
    versions: list[int]
    grads: list[Tensor | None]
    random: RandomState

    @classmethod
    def of(cls, value: Any, random: RandomState = ()) -> Record:
        """The record of a value, with the tensors in it."""
        tensors = tensors_in(value)
        return cls(value, tensors, [version_of(tensor) for tensor in tensors], [None] * len(tensors), random)

    def intact(self) -> bool:
        """False once someone has overwritten the output in place (``bn -> ReLU(inplace=True)``)."""
        return all(version_of(t) == v for t, v in zip(self.tensors, self.versions, strict=True))


@dataclass(eq=False)
class Trace:
    """What a pass has recorded, and the leaves it started from: copies of others' recorded tensors without graphs."""

    records: dict[Key, Record] = field(default_factory=dict)
    leaves: list[tuple[Record, int, Tensor]] = field(default_factory=list)


class Site(NamedTuple):
    """Where a forward is replaced.

    Attributes:
        path: of the module.
        forward: what computes it.
        branch: what computes a block without its skip connection, if a subnet asks for that.
        form: of a block's output, where it is a tuple.
    """

    path: str
    forward: Callable[..., Any]
    branch: Callable[..., Any] | None = None
    form: Form | None = None


class Player(Protocol):
    """Decides what the calls of a model's modules give."""

    def block(self, site: Site, block: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """What a block returns."""

    def between(self, site: Site, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """What a module before, between or behind the blocks returns."""


def shadows(
    player: Player, model: nn.Module, stages: Sequence[Stage], subnets: Sequence[Subnet]
) -> dict[nn.Module, Callable[..., Any]]:
    """For each block, and each outermost module between them, what replaces its ``forward`` and asks the player.

    Args:
        player: decides about each call.
        model: the user's own module.
        stages: its stages.
        subnets: those that it is going to run as.
    """
    blocks = check_stages(model, stages)
    branch: dict[str, Callable[..., Any]] = {}
    for subnet in set(subnets):
        branch |= branches(model, stages, subnet)
    made: dict[nn.Module, Callable[..., Any]] = {
        blocks[path]: partial(player.block, Site(path, blocks[path].forward, branch.get(path), stage.form(path)))
        for stage in stages
        for path in stage.blocks
    }
    for path, module in between_blocks(model, blocks):
        made.setdefault(module, partial(player.between, Site(path, module.forward)))
    return {module: replaces_forward(shadow) for module, shadow in made.items()}


class Session:
    """Runs the passes of a plan through the model, recording and replaying.

    Args:
        model: possibly wrapped.
        stages: its stages.
        inputs: the batch.
        requests: the subnets to run.
        losses: of the passes.
        detach: let each pass but the main one start from leaves, so that it has a graph of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        inputs: Any,
        requests: Sequence[SubnetPass],
        losses: Losses,
        *,
        detach: bool,
    ) -> None:
        self.model, self.inner, self.call = uncompiled(model), inner_module(model), losses.call
        self.inputs, self.detach, self.cloning = inputs, detach, False
        self.inside = 0  # calls that are being computed: what they call is a part of them
        for request in requests:
            check_subnet(stages, request.subnet)
        self._shadows = shadows(self, self.inner, stages, [request.subnet for request in requests])
        self.plan, self.terms = Plan(stages, requests), Terms(len(requests), losses)
        self.sharing, self.observed = all(stage.replayable for stage in stages), losses.observing
        self.traces: dict[Pass, Trace] = {}
        self.statistics = Statistics(self.inner)
        self.rewind: Callable[[], None]  # lets a pass begin with the buffers that the main one began with
        self._records: dict[Key, Record] = {}
        self._guard = CheckpointGuard(type(self.inner).__name__, separate_graphs=detach)
        self._draws = Draws(next(self.inner.parameters(), torch.empty(0)).device, own=losses.alike)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Shadow the model's modules for the time of the passes."""
        try:
            with not_compiled(self.model), replaced_forwards(self._shadows):
                yield
        finally:
            self._shadows.clear()  # they refer to the session: a cycle would keep activations until collected

    def forward(self, move: Move) -> None:
        """Call the model as this pass, and then the losses that can be called."""
        one = move.of
        try:
            output = self._call(one)
        except RuntimeError as error:
            # Autograd refuses in-place changes of the leaves that a suffix starts from. Few models make one there, so
            # the leaves are cloned only once it has happened.
            if self.cloning or not self.traces[one].leaves or "in-place" not in str(error):
                raise
            self.cloning = True
            self.release(one)
            output = self._call(one)
        if self.state is not one.end:
            raise ValueError(
                f"{type(self.inner).__name__} did not call its blocks once each in the order of its stages; "
                "find the stages again on this model"
            )
        self.terms.add(move, output)

    def _call(self, one: Pass) -> Tensor:
        self.current, self.state, self.traces[one] = one, self.plan.roots[one.view], Trace()
        self.calls: Counter[tuple[State, str]] = Counter()
        self._guard.pack = None
        if one is self.plan.main:
            output = self.call(self.model, self._input(one))
            self._draws.end()
            return output
        self.rewind()
        with self._draws.again():
            return self.call(self.inner, self._input(one))

    def _input(self, one: Pass) -> Any:
        """What a pass sees of the batch.

        Where the batch has a graph of its own, passes beside the main one get leaves, so that this graph is run through
        once: in the main backward, with the sum of the gradients.
        """
        key = (self.state, "input", 0)
        record = self._records.get(key)
        if record is None:
            record = Record.of(one.view.of(self.inputs))
            self._records[key] = self.traces[self.plan.main].records[key] = record
        graphs = self.detach and one is not self.plan.main and any(tensor.requires_grad for tensor in record.tensors)
        return self._leaves(record, read=True) if graphs else record.value

    def block(self, site: Site, block: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Skip the block, or replay or compute it, as the pass says."""
        self._guard.check(block)
        mode = self.current.modes.get(site.path)
        if mode is None:
            return stand_in(site.form, args, kwargs)
        following = self.state.following.get((site.path, mode))
        if following is None:
            raise ValueError(f"block {site.path!r} was called out of the order of its stages; find the stages again")
        self.state = following
        if mode == "branch":
            assert site.branch is not None
            return self._replayed_or_computed((following, "", 0), block, site.branch, (block, *args), kwargs)
        return self._replayed_or_computed((following, "", 0), block, site.forward, args, kwargs)

    def between(self, site: Site, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Replay or compute the module."""
        if self.inside:  # the same module once more, within a block or a stem: its record is theirs
            return site.forward(*args, **kwargs)
        self._guard.check(module)
        self.calls[self.state, site.path] += 1
        key = (self.state, site.path, self.calls[self.state, site.path])
        return self._replayed_or_computed(key, module, site.forward, args, kwargs)

    def _replayed_or_computed(
        self,
        key: Key,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """The recorded output of this call in this state, or else a computed one, recorded if a later pass needs it."""
        record = self._records.get(key)
        if record is not None and record.intact():
            if self._draws.own:
                self._draws.set(record.random)
            # At the branch the next module really reads it; before, nobody computes, unless a loss observes it.
            return self._leaves(record, read=self.observed or self.state is self.current.branch)
        if self.current is self.plan.main:
            self._draws.mark(shared=False)
        left = left_in(module) if self.observed else None
        self.inside += 1
        try:
            value = forward(*args, **kwargs)
        finally:
            self.inside -= 1
        random = self._draws.mark(shared=True)
        seen = left is not None and (has_inner_hooks(module) or left != left_in(module))
        if key[0].visits > 1 and self.sharing and not seen:
            record = Record.of(value, random)
            if record.tensors:
                self._records[key] = self.traces[self.current].records[key] = record
        return value

    def _leaves(self, record: Record, *, read: bool) -> Any:
        """What was recorded, each tensor without its graph if a graph is not shared."""
        given: dict[int, Tensor] = {}
        for index, tensor in enumerate(record.tensors):
            output = tensor
            if self.detach and tensor.requires_grad:
                output = tensor.detach().requires_grad_()
                self.traces[self.current].leaves.append((record, index, output))
            given[id(tensor)] = output.clone() if read and (self.cloning or output is tensor) else output
        return with_tensors(record.value, lambda tensor: given[id(tensor)])

    def release(self, done: Pass) -> None:
        """Forget all that a finished pass recorded."""
        for key, record in self.traces.pop(done).records.items():
            if self._records.get(key) is record:  # not one that a later pass has put in its place
                del self._records[key]
