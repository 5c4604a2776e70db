"""The plan of a step: which passes there are, what they share, and when each goes forward and backward. No tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from unloaf.inputs import View
from unloaf.stages import Stage
from unloaf.subnet import BlockMode, Subnet


class SubnetPass(NamedTuple):
    """A request: run this subnet.

    Attributes:
        subnet: which one.
        side: resize the input's shorter side to this many pixels; None is the main network's input.
        needs: indices of the requests whose logits the loss of this one reads (the main network's are always there).
        examples: run on the first so many examples of the batch; None is all of them. Passes with the same view of the
            batch, side, examples and change, share their prefixes.
        change: makes another batch of what the subnet would see; None to leave it as it is.
    """

    subnet: Subnet
    side: int | None = None
    needs: tuple[int, ...] = ()
    examples: int | None = None
    change: Callable[[Any], Any] | None = None

    @property
    def view(self) -> View:
        """What the pass sees of the batch."""
        return View(self.side, self.examples, self.change)


@dataclass(eq=False)
class Pass:
    """One call of the model; requests for the same subnet with the same view share it.

    Attributes:
        number: 0 for the main network, the others in the order of the requests.
        view: what it sees of the batch.
        modes: how it applies the blocks that it keeps, in the order of execution.
        requests: indices of those that it serves.
        needs: indices of the requests whose logits its losses read.
        branch: the last state shared with an earlier pass; None where it shares none.
        end: its last state.
        children: the passes that leave it.
    """

    number: int
    view: View
    modes: Mapping[str, BlockMode]
    requests: list[int] = field(default_factory=list)
    needs: set[int] = field(default_factory=set)
    branch: State | None = None
    end: State | None = None
    children: list[Pass] = field(default_factory=list)

    def depth_first(self) -> Iterator[Pass]:
        """This pass, then those that branch off it: all that need its graph, and no others in between."""
        yield self
        for child in self.children:
            yield from child.depth_first()


@dataclass(eq=False)
class State:
    """A node of the trie: these blocks have been applied, in this order, to this input; `owner` comes here first."""

    owner: Pass
    following: dict[tuple[str, BlockMode], State] = field(default_factory=dict)
    ending: Pass | None = None
    visits: int = 0


class Move(NamedTuple):
    """One thing to do: a pass goes forward, whereupon the losses of some passes can be called, or backward."""

    kind: Literal["forward", "backward"]
    of: Pass
    losses: tuple[Pass, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {self.of.number}"


class Plan:
    """The trie of a step.

    >>> from unloaf import Stage, Subnet
    >>> stages = (Stage("layer1", ("a", "b", "c"), (False, True, True)),)
    >>> plan = Plan(stages, [SubnetPass(Subnet.from_depths(stages, (depth,))) for depth in (2, 1)])
    >>> print(*plan.moves(), sep=", ")
    forward 0, forward 1, backward 1, forward 2, backward 2, backward 0
    """

    def __init__(self, stages: Sequence[Stage], requests: Sequence[SubnetPass]) -> None:
        self.roots: dict[View, State] = {}
        self.passes: list[Pass] = []
        self.main = self._insert(View(), Subnet.full(stages).modes(stages))
        for index, request in enumerate(requests):
            served = self._insert(request.view, request.subnet.modes(stages))
            served.requests.append(index)
            served.needs.update(request.needs)

    def _insert(self, view: View, modes: Mapping[str, BlockMode]) -> Pass:
        added = Pass(len(self.passes), view, modes)
        state = self.roots.setdefault(view, State(added))
        path = [state]
        for step in modes.items():
            state = state.following.setdefault(step, State(added))
            path.append(state)
        if state.ending is not None:  # the same subnet again
            return state.ending
        state.ending, added.end = added, state
        for visited in path:
            visited.visits += 1
            if visited.owner is not added:
                added.branch = visited
        if added.branch is not None:
            added.branch.owner.children.append(added)
        self.passes.append(added)
        return added

    def moves(self) -> list[Move]:
        """What to do, in order; the main network goes forward first and backward last.

        Passes go forward depth first. A loss is called right after its pass, or after the last of those whose logits it
        reads. A pass goes backward, its graph is gone, as soon as its losses are called and all that branch off it have
        gone backward: so one suffix is alive at a time, or a chain of them.
        """
        moves: list[Move] = []
        known: set[int] = set()
        waiting: list[Pass] = []  # for logits that their losses read
        alive: list[Pass] = []
        done: set[Pass] = set()
        for one in (one for first in self.passes if first.branch is None for one in first.depth_first()):
            known.update(one.requests)
            waiting.append(one)
            moves.append(Move("forward", one, tuple(ready for ready in waiting if ready.needs <= known)))
            waiting = [late for late in waiting if late not in moves[-1].losses]
            alive.append(one)
            for candidate in reversed(alive):
                if candidate is not self.main and candidate not in waiting and done.issuperset(candidate.children):
                    moves.append(Move("backward", candidate))
                    done.add(candidate)
            alive = [left for left in alive if left not in done]
        return [*moves, Move("backward", self.main)]
