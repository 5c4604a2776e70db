"""A trained run as a cascade: its chain and threshold set on validation images, judged on test images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Unpack

import torch
from rich.console import Console
from torch import Tensor

from unloaf.anytime import Anytime, Confidence
from unloaf.batchnorm import tracking_norms
from unloaf.display import show_progress
from unloaf.engine.setup import where
from unloaf.evaluation import accuracy, choose_subnets
from unloaf.export import parse_subnet
from unloaf.inputs import to_device
from unloaf.measure.chains import Candidate, Costs, chain_costs, judge_candidate, pick_chain
from unloaf.measure.exits import (
    UNREADABLE,
    AnytimePoint,
    ExitRecords,
    Target,
    at_thresholds,
    pick_threshold,
    record_exits,
)
from unloaf.measure.throughput import images_per_second
from unloaf.methods.table import METHODS
from unloaf.runs.opened import OpenedRun, Opening, open_trained
from unloaf.subnet import Subnet
from unloaf.tasks.classification import Classification

_MOST_TRIED = 64  # subnets of which a chain is made
_MOST_TIMED = 256  # images
CURVE = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)  # thresholds

Batches = Iterable[tuple[Any, Tensor]]


@dataclass(frozen=True)
class NetworkRow:
    """A way to use a run.

    Attributes:
        name: depths of a subnet that runs alone, or that of the cascade.
        kind: "main" as trained, "main, re-estimated", "subnet", "chosen subnet" or "cascade".
        top1: accuracy in percent on the images that judge.
        gmacs: billions of multiply-adds for an image, of a cascade on average.
        images_per_second: measured, by batch size; empty where that was not asked for.
    """

    name: str
    kind: str
    top1: float
    gmacs: float
    images_per_second: dict[int, float]


@dataclass(frozen=True)
class AnytimeJudgement:
    """What a run is worth as a cascade."""

    run: Path  # its folder
    label: str  # its method
    checkpoint: str  # name of the checkpoint's folder
    epoch: int  # whole epochs that were trained by then
    weights: str  # "model", or "model_ema" for the moving average
    chain: tuple[str, ...]  # the exits
    confidence: str  # on what images leave
    exit_gmacs: tuple[float, ...]  # of an image that leaves at each exit
    target: str  # for what the threshold was set
    val: AnytimePoint | None  # on the images on which it was set; None where the threshold was given
    test: AnytimePoint  # on the images that judge
    judged_on: str  # which images these are
    curve: tuple[AnytimePoint, ...]  # on them, at thresholds that nobody chose
    rows: tuple[NetworkRow, ...]  # the main network, subnets alone and the cascade, on them
    device: str  # that was timed, or ""
    threads: int  # of torch, on the CPU
    notes: tuple[str, ...]  # what a reader has to know


@dataclass(frozen=True)
class _Split:
    """On what a run is tuned, and on what it is judged."""

    val: Batches | None
    test: Batches
    judged_on: str
    notes: tuple[str, ...]


def judge_anytime(
    run: Path,
    *,
    subnets: Sequence[str] = (),
    target: Target | None = None,
    threshold: float | None = None,
    confidence: Confidence = "max-probability",
    exits: int = 4,
    batch_size: int | None = None,
    timed: Sequence[int] = (),
    repeats: int = 5,
    console: Console | None = None,
    **opening: Unpack[Opening],
) -> tuple[AnytimeJudgement, Anytime, OpenedRun]:
    """Makes a cascade of a run and judges it; writes nothing, and the run may still be training.

    Chain and threshold are set on validation images, never on those that judge. Where a data set has validation images
    alone, every second one sets them and the others judge. Batch-norm statistics of every exit, the main network's too,
    are re-estimated on training images.

    Args:
        run: a folder that `unloaf train` made.
        subnets: the chain, by depths, smallest first; default: the ordered subnets that reach the target at the
            least cost, with the main network last.
        target: what the threshold is to reach on validation images; default: half a point below the last exit.
        threshold: the threshold itself, in place of a target; only with ``subnets``.
        confidence: on what images leave; see `Anytime`.
        exits: at most so many are chosen.
        batch_size: images in a pass; default: as in the run.
        timed: batch sizes at which images per second are measured.
        repeats: rounds that are timed.
        console: shows a progress bar where it is a terminal.
        opening: see `open_trained`.

    Returns:
        the judgement, the cascade, and the run that it was made of.

    Raises:
        ValueError: no run, no classifier, no validation images, no such subnets, or no threshold reaches the target.
        CheckpointError: no checkpoint is intact.
    """
    if threshold is not None and (target is not None or not subnets):
        raise ValueError("a threshold is given in place of a target, and only with the subnets of the chain")
    opened = _opened(run, batch_size, opening)
    asked = _Asked(tuple(subnets), target or Target(max_drop=0.5), threshold, confidence, exits)
    split = _split(opened, needs_val=threshold is None)
    made = _made(opened, split, asked, console)
    anytime, gmacs = made.anytime, made.records.gmacs
    answered = _answered(anytime, split.test, gmacs)
    alone = _alone(made, asked.target, Subnet.full(opened.training.stages))
    speeds = _speeds(anytime, [subnet for _, subnet in alone], split.test, timed, repeats, console)
    rows = _rows(opened, split.test, alone, made, answered)
    judgement = AnytimeJudgement(
        run=run,
        label=METHODS[opened.config.method].label,
        checkpoint=opened.checkpoint,
        epoch=opened.epoch,
        weights=opened.weights,
        chain=tuple(map(str, anytime.subnets)),
        confidence=confidence,
        exit_gmacs=gmacs,
        target=f"a threshold of {threshold:g}" if threshold is not None else str(asked.target),
        val=made.val,
        test=answered,
        judged_on=split.judged_on,
        curve=tuple(at_thresholds(made.records, CURVE)),
        rows=tuple(replace(row, images_per_second=speeds.get(row.name, {})) for row in rows),
        device=_device_name(opened.training.device) if timed else "",
        threads=torch.get_num_threads(),
        notes=(*opened.notes, *split.notes, *made.notes),
    )
    return judgement, anytime, opened


@dataclass(frozen=True)
class _Asked:
    """Of which cascade a user asks."""

    subnets: tuple[str, ...]
    target: Target
    threshold: float | None
    confidence: Confidence
    exits: int


@dataclass(frozen=True)
class _Made:
    """A cascade, and what was found on the way to it."""

    anytime: Anytime
    judged: Sequence[Candidate]  # on the validation images
    costs: Costs
    val: AnytimePoint | None
    records: ExitRecords  # on the images that judge
    notes: Sequence[str]


def _opened(run: Path, batch_size: int | None, opening: Opening) -> OpenedRun:
    opened = open_trained(run, **opening)
    if not isinstance(opened.training.task, Classification):
        raise ValueError(f"{run} is no classifier; images leave a cascade when their class is sure")
    if not opened.recalibrate and tracking_norms(opened.network):
        raise ValueError("recalibrate 0: each exit of a cascade has statistics of its own; give 2 or more")
    if batch_size is None:
        return opened
    config = replace(opened.training.config, batch_size=batch_size)
    return replace(opened, training=replace(opened.training, config=config))


def _made(opened: OpenedRun, split: _Split, asked: _Asked, console: Console | None) -> _Made:
    stages, network = opened.training.stages, opened.network.eval()
    costs = chain_costs(network, stages, opened.noise(1, 0).to(opened.training.device))
    chosen, notes = _candidates(opened, asked.subnets)
    judged: list[Candidate] = []
    if split.val is not None and asked.threshold is None:
        judged = _judged(opened, chosen, split.val, asked.confidence, console)
    chain = tuple(chosen)
    if not asked.subnets:
        chain = pick_chain(judged, costs, asked.target, confidence=asked.confidence, most=asked.exits)
    anytime = Anytime(network, stages, chain, confidence=asked.confidence)
    anytime.recalibrate(list(opened.calibration()))
    val, threshold = None, asked.threshold
    if threshold is None:
        assert split.val is not None
        val = pick_threshold(record_exits(anytime, split.val), asked.target)
        threshold = val.threshold
    anytime.set_threshold(threshold)
    return _Made(anytime, judged, costs, val, record_exits(anytime, split.test), notes)


def _split(opened: OpenedRun, *, needs_val: bool) -> _Split:
    training, data = opened.training, opened.training.data
    if len(data.val) and len(data.test) and data.test is not data.val:
        return _Split(training.eval_batches("val"), training.eval_batches("test"), "test", ())
    if not needs_val:
        split = "test" if len(data.test) else "val"
        if not len(getattr(data, split)):
            raise ValueError(f"{opened.run}: {data.name} has neither validation nor test images to judge on")
        return _Split(None, training.eval_batches(split), split, ())
    if len(data.val) < 2:
        raise ValueError(
            f"{opened.run}: {data.name} has no validation images, and a threshold that is set on the test images says "
            "nothing about them; train with --val-split, or give --subnets and --threshold"
        )
    everyone = torch.arange(len(data.val))
    even, odd = (
        training.task.eval_batches(data.val.subset(everyone[k::2]), data, training.config, where(training.accelerator))
        for k in (0, 1)
    )
    note = f"{data.name} has no test images: every second validation image set the threshold, the others judge it"
    return _Split(even, odd, "held-back validation", (note,))


def _candidates(opened: OpenedRun, asked: Sequence[str]) -> tuple[list[Subnet], list[str]]:
    stages = opened.training.stages
    if asked:
        return [parse_subnet(stages, text) for text in asked], []
    chosen = choose_subnets(stages, _MOST_TRIED, seed=opened.config.seed)
    count = prod(len(stage.legal_depths) for stage in stages)
    note = f"{len(chosen)} of {count} ordered subnets were tried for the chain; give --subnets for others"
    return chosen, [note] if len(chosen) < count else []


def _judged(
    opened: OpenedRun, chosen: Sequence[Subnet], val: Batches, confidence: Confidence, console: Console | None
) -> list[Candidate]:
    found, calibration = [], list(opened.calibration())
    with show_progress(console, total=len(chosen), label="subnets", lines=True) as display:
        for subnet in chosen:
            network, stages = opened.network, opened.training.stages
            found.append(judge_candidate(network, stages, subnet, val, calibration=calibration, confidence=confidence))
            display.advance(str(subnet))
    return found


def _answered(anytime: Anytime, batches: Batches, gmacs: Sequence[float]) -> AnytimePoint:
    """The cascade as it runs, image by image."""
    exits, right = [], 0
    device = next(anytime.model.parameters()).device
    for x, y in batches:
        known = y != UNREADABLE
        output = anytime(to_device(x, device))
        exits.append(output.exits.cpu()[known])
        right += int((output.logits.argmax(-1).cpu() == y.cpu())[known].sum())
    left = torch.bincount(torch.cat(exits), minlength=len(gmacs)).double()
    images = int(left.sum())
    shares = left / images
    mean = float(shares @ torch.tensor(gmacs, dtype=torch.float64))
    return AnytimePoint(anytime.thresholds[0], 100 * right / images, mean, tuple(shares.tolist()), images)


def _alone(made: _Made, goal: Target, main: Subnet) -> list[tuple[str, Subnet]]:
    """The main network, the subnet that one would take in place of a cascade, and those of the chain."""
    picked = _picked(made.judged, made.costs, goal, main)
    listed = [("main, re-estimated", main)]
    listed += [("chosen subnet", picked)] if picked not in (None, main) else []
    return listed + [("subnet", one) for one in made.anytime.subnets if one not in (main, picked)]


def _picked(judged: Sequence[Candidate], costs: Costs, goal: Target, main: Subnet) -> Subnet | None:
    """By the same validation images and for the same target; None where no subnet reaches it."""
    tops = {one.subnet: (one.top1, costs([one.subnet])[0]) for one in judged}
    if main not in tops:
        return None
    if goal.max_gmacs is not None:
        budget = goal.max_gmacs
        within = [subnet for subnet, (_, gmacs) in tops.items() if gmacs <= budget]
        return max(within, key=lambda subnet: (tops[subnet][0], -tops[subnet][1]), default=None)
    wanted = goal.min_top1 if goal.min_top1 is not None else tops[main][0] - (goal.max_drop or 0.0)
    good = [subnet for subnet, (top1, _) in tops.items() if top1 >= wanted - 1e-9]
    return min(good, key=lambda subnet: (tops[subnet][1], -tops[subnet][0]), default=None)


def _rows(
    opened: OpenedRun, test: Batches, alone: Sequence[tuple[str, Subnet]], made: _Made, answered: AnytimePoint
) -> list[NetworkRow]:
    network, stages = opened.network, opened.training.stages
    calibration, main = list(opened.calibration()), alone[0][1]
    rows = [NetworkRow(str(main), "main", accuracy(network, test).top1, made.costs([main])[0], {})]
    for kind, subnet in alone:
        if subnet != main or tracking_norms(network):
            confidence = made.anytime.confidence
            found = judge_candidate(network, stages, subnet, test, calibration=calibration, confidence=confidence)
            rows.append(NetworkRow(str(subnet), kind, found.top1, made.costs([subnet])[0], {}))
    return [*rows, NetworkRow("cascade", "cascade", answered.top1, answered.gmacs, {})]


def _speeds(
    anytime: Anytime, subnets: Sequence[Subnet], test: Batches, timed: Sequence[int], repeats: int, console: Any
) -> dict[str, dict[int, float]]:
    if not timed:
        return {}
    device, images = next(anytime.model.parameters()).device, []
    for x, _ in test:
        images.append(to_device(x, device))
        if sum(map(len, images)) >= _MOST_TIMED:
            break
    some, different = torch.cat(images)[:_MOST_TIMED], list(dict.fromkeys(subnets))
    with show_progress(console, total=repeats + 1, label="images/s", lines=True) as display:
        found = images_per_second(
            anytime, different, some, batch_sizes=timed, repeats=repeats, on_round=lambda: display.advance("")
        )
    return dict(zip(["cascade", *map(str, different)], found, strict=True))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
