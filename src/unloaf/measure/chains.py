"""Which chain of nested subnets makes the cheapest cascade."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.anytime import Confidence, Scores, scores
from unloaf.batchnorm import estimated_statistics, statistics_replaced
from unloaf.inputs import to_device
from unloaf.measure.exits import UNREADABLE, AnytimePoint, ExitRecords, Target, pick_threshold
from unloaf.measure.flops import forward_events
from unloaf.passes import logits_of
from unloaf.stages import Stage, between_blocks, call_model, evaluating
from unloaf.subnet import Subnet, active_subnet, check_stages

_TRIED = 48  # thresholds for a chain
_WORTH = 0.99  # a further exit has to save a hundredth of the GMACs

Costs = Callable[[Sequence[Subnet]], tuple[float, ...]]


@dataclass(frozen=True)
class Candidate:
    """A subnet on validation images, with statistics of its own.

    Attributes:
        subnet: which one.
        scores: of each image.
        correct: (images,), whether its class is the label.
    """

    subnet: Subnet
    scores: Scores
    correct: Tensor

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return 100 * float(self.correct.double().mean())


def judge_candidate(
    model: nn.Module,
    stages: Sequence[Stage],
    subnet: Subnet,
    loader: Iterable[tuple[Any, Tensor]],
    *,
    calibration: Iterable[Any],
    confidence: Confidence,
) -> Candidate:
    """A subnet on all images of a loader; its batch-norm statistics are estimated before. The model stays as it is."""
    own = estimated_statistics(model, stages, subnet, calibration)
    device = next(model.parameters(), torch.empty(0)).device
    found, correct = [], []
    with evaluating(model), active_subnet(model, stages, subnet), statistics_replaced(model, own):
        for x, y in loader:
            known = y != UNREADABLE
            said = scores(logits_of(call_model(model, to_device(x, device))), confidence)
            found.append(Scores(*(values.cpu()[known] for values in said)))
            correct.append(found[-1].predicted == y[known].cpu())
    return Candidate(subnet, Scores(*map(torch.cat, zip(*found, strict=True))), torch.cat(correct))


def chain_costs(model: nn.Module, stages: Sequence[Stage], image: Tensor) -> Costs:
    """A function from a chain to the GMACs of an image that leaves at each of its exits.

    From one pass of the main network: a block that can be skipped keeps the shape, so that the others cost the same
    without it.
    """
    blocks = check_stages(model, stages)
    events = forward_events(model, blocks | dict(between_blocks(model, blocks)), image)

    def costs(chain: Sequence[Subnet]) -> tuple[float, ...]:
        seen: set[tuple[str, ...]] = set()
        totals, total = [], 0
        for subnet in chain:
            kept, prefix = subnet.modes(stages), ()
            for path, flops in events:
                if path in blocks and path not in kept:
                    continue
                prefix = (*prefix, path)
                total += 0 if prefix in seen else flops
                seen.add(prefix)
            totals.append(total / 2e9)
        return tuple(totals)

    return costs


def records_of(chain: Sequence[Candidate], costs: Costs, confidence: Confidence) -> ExitRecords:
    """The exits of a chain, from what its subnets said by themselves."""
    before: Scores | None = None
    sure = []
    for one in chain:
        sure.append(one.scores.confidence(before, confidence))
        before = one.scores
    correct = torch.stack([one.correct for one in chain])
    return ExitRecords(torch.stack(sure), correct, costs([one.subnet for one in chain]))


def pick_chain(
    candidates: Sequence[Candidate], costs: Costs, target: Target, *, confidence: Confidence, most: int = 4
) -> tuple[Subnet, ...]:
    """The chain that reaches the target at the least mean GMACs, or within the budget is the most accurate.

    The best of two exits first; then subnets are put in between as long as they improve it.

    Args:
        candidates: on the same images, among them the main network, on which every chain ends.
        costs: from `chain_costs`.
        target: see `pick_threshold`.
        confidence: on what images leave.
        most: exits, at least 2.

    Raises:
        ValueError: no chain reaches the target.
    """
    main = max(candidates, key=lambda one: sum(one.subnet.depths))
    others = [one for one in candidates if one.subnet != main.subnet]
    best: list[Candidate] = []
    point: AnytimePoint | None = None
    reason = ValueError("there is no subnet beside the main network; give some")
    while len(best) < most:
        grown: list[Candidate] = []
        for chain in _longer(best or [main], others):
            try:
                found = pick_threshold(records_of(chain, costs, confidence), target, most=_TRIED)
            except ValueError as error:
                reason = error
                continue
            if point is None or _better(found, point, target, alike=bool(grown) or not best):
                grown, point = chain, found
        if not grown:
            break
        best = grown
    if not best:
        raise reason
    return tuple(one.subnet for one in best)


def _longer(chain: Sequence[Candidate], others: Sequence[Candidate]) -> list[list[Candidate]]:
    """The chains with one subnet more, which lies between two of it or before the first."""
    found = []
    for index, after in enumerate(chain):
        before = chain[index - 1].subnet if index else None
        for one in others:
            inside = before is None or (before <= one.subnet and before != one.subnet)
            if inside and one.subnet <= after.subnet and one.subnet != after.subnet:
                found.append([*chain[:index], one, *chain[index:]])
    return found


def _better(one: AnytimePoint, another: AnytimePoint, target: Target, *, alike: bool) -> bool:
    """Whether it is better; a chain that is longer than another has to be so by more than chance finds."""
    if target.max_gmacs is not None:
        return (one.top1, -one.gmacs) > (another.top1, -another.gmacs)
    return (one.gmacs, -one.top1) < (another.gmacs * (1 if alike else _WORTH), -another.top1)
