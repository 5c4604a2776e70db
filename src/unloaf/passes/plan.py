"""The trie of a step: which passes there are, which share what, and in which order they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from unloaf.inputs import View
from unloaf.passes.containers import tensors_in
from unloaf.passes.draws import RandomState
from unloaf.stages import Stage
from unloaf.subnet import BlockMode, Subnet


class SubnetPass(NamedTuple):
    """A request: run this subnet.

    Attributes:
        subnet: which one.
        side: resize the input's shorter side to this many pixels; None is the main network's input.
        needs: indices of the requests whose logits the loss of this one reads (the main network's are always there).
        examples: run on the first so many examples of the batch; None is all of them. Passes with the same view of the
            batch, side and examples, share their prefixes.
    """

    subnet: Subnet
    side: int | None = None
    needs: tuple[int, ...] = ()
    examples: int | None = None

    @property
    def view(self) -> View:
        """What the pass sees of the batch."""
        return View(self.side, self.examples)


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
        return cls(value, tensors, [tensor._version for tensor in tensors], [None] * len(tensors), random)

    def intact(self) -> bool:
        """False once someone has overwritten the output in place (``bn -> ReLU(inplace=True)``)."""
        return all(t._version == v for t, v in zip(self.tensors, self.versions, strict=True))


@dataclass(eq=False)
class State:
    """A node of the trie: these blocks have been applied, in this order, to this input."""

    owner: Run
    following: dict[tuple[str, BlockMode], State] = field(default_factory=dict)
    records: dict[tuple[str, int], Record] = field(default_factory=dict)
    ending: Run | None = None
    visits: int = 0


@dataclass(eq=False)
class Run:
    """One call of the model; requests for the same subnet with the same view share it."""

    view: View
    modes: Mapping[str, BlockMode]
    requests: list[int] = field(default_factory=list)
    needs: set[int] = field(default_factory=set)
    parent: Run | None = None
    branch: State | None = None  # the last state shared with an earlier run
    end: State | None = None
    children: list[Run] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    leaves: list[tuple[Record, int, Tensor]] = field(default_factory=list)
    logits: Tensor | None = None
    done: bool = False

    def depth_first(self) -> Iterator[Run]:
        """This run, then the runs that branch off it: all that need its graph, and no others in between."""
        yield self
        for child in self.children:
            yield from child.depth_first()


class Plan:
    """The trie of a step."""

    def __init__(self, stages: Sequence[Stage], passes: Sequence[SubnetPass]) -> None:
        self.roots: dict[View, State] = {}
        self.main = self._insert(View(), Subnet.full(stages).modes(stages))
        firsts = [self.main]
        for index, request in enumerate(passes):
            run = self._insert(request.view, request.subnet.modes(stages))
            run.requests.append(index)
            run.needs.update(request.needs)
            if run.parent is None and run not in firsts:
                firsts.append(run)
        self.runs = [run for first in firsts for run in first.depth_first()]

    def _insert(self, view: View, modes: Mapping[str, BlockMode]) -> Run:
        run = Run(view, modes)
        state = self.roots.get(view)
        if state is None:
            state = self.roots[view] = State(run)
        path = [state]
        branch = None if state.owner is run else state
        for step in modes.items():
            if step in state.following:
                state = branch = state.following[step]
            else:
                state.following[step] = state = State(run)
            path.append(state)
        if state.ending is not None:  # the same subnet again
            return state.ending
        state.ending, run.end = run, state
        for visited in path:
            visited.visits += 1
        if branch is not None:
            run.branch, run.parent = branch, branch.owner
            branch.owner.children.append(run)
        return run
