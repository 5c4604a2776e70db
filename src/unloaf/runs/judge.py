"""A trained run in, the accuracy of its main network and of its subnets out. Never trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Unpack

from rich.console import Console

from unloaf.display import show_progress
from unloaf.engine.setup import Evaluation, Training
from unloaf.evaluation import SubnetRow, choose_subnets
from unloaf.inputs import to_device
from unloaf.measure.costs import Timing, measure_in_sight, write_csv
from unloaf.measure.pareto import pareto_front
from unloaf.measure.records import cost_records
from unloaf.runs.opened import Opening, open_trained
from unloaf.stages import Stage, inner_module
from unloaf.subnet import Subnet

_MOST_JUDGED = 256  # by pareto, which nobody asked to take a day


@dataclass(frozen=True)
class RunJudgement:
    """How good a run is at one of its checkpoints."""

    run: Path  # its folder
    checkpoint: str  # name of the checkpoint's folder
    epoch: int  # whole epochs that were trained by then
    weights: str  # "model", or "model_ema" for the moving average
    params: int  # parameters of the main network
    gmacs: float  # billions of multiply-adds of the main network for one image
    task: str
    main: dict[str, Any]  # the task's figures of the main network, its running batch-norm statistics, by split
    split: str  # the images on which the subnets were evaluated
    subnets: tuple[SubnetRow, ...]  # those that were asked for, the main network first; of pareto, smallest first
    # All that were evaluated, the main network first and among its subnets evaluated as they are, with re-estimated
    # statistics.
    judged: tuple[SubnetRow, ...]
    notes: tuple[str, ...]  # what a reader has to know of the checkpoint, the images and the choice of the subnets
    # Of each of `judged` the measured time by batch size, where that was asked for; else empty.
    times: tuple[tuple[Timing, ...], ...] = ()


def judge_run(
    run: Path,
    *,
    subnets: str | None = None,
    split: str | None = None,
    batch_size: int | None = None,
    timed: Sequence[int] = (),
    repeats: int = 30,
    console: Console | None = None,
    **opening: Unpack[Opening],
) -> RunJudgement:
    """Judges a run at a checkpoint; writes nothing, and the run may still be training.

    The main network is evaluated as in training, with its running batch-norm statistics: the accuracy on the validation
    images is the one in summary.csv, digit for digit, on the same kind of device. Beside its subnets it is
    evaluated as they are too, with statistics that were re-estimated.

    Args:
        run: a folder that `unloaf train` made.
        subnets: "all" ordered ones, "pareto" for the Pareto front, a number for so many, drawn as
            `--eval-subnets` draws them, or None.
        split: "val" or "test"; default: both for the main network, val for the subnets if there is one.
        batch_size: images in a pass; default: as in the run.
        timed: batch sizes at which the time of the evaluated subnets is measured.
        repeats: passes that are timed, of each subnet and batch size.
        console: shows a progress bar where it is a terminal.
        opening: see `open_trained`.

    Raises:
        ValueError: the folder is not a run, has no such checkpoint or images, its args.yaml was changed, or the network
            has no subnets.
        CheckpointError: no checkpoint is intact.
    """
    images = opening.get("recalibrate")
    if images is not None and images < 2:
        raise ValueError(f"recalibrate {images}: give at least 2 images")
    opened = open_trained(run, need_subnets=False, **opening)
    training = opened.training
    if batch_size is not None:
        training = replace(training, config=replace(training.config, batch_size=batch_size))
    splits = _splits(training, split, run)
    judged = {name: training.evaluate(name) for name in splits}
    chosen, more = _chosen(training.stages, subnets, seed=opened.config.seed, run=run)
    rows, times = _judge(training, chosen, split=splits[0], console=console), []
    if rows:
        rows, times = measure_in_sight(
            opened.network, training.stages, _example(training), rows, timed=timed, repeats=repeats, console=console
        )
    params, gmacs = opened.cost(opened.network)
    return RunJudgement(
        run=run,
        checkpoint=opened.checkpoint,
        epoch=opened.epoch,
        weights=opened.weights,
        params=params,
        gmacs=gmacs,
        task=opened.config.task,
        main={name: evaluation.main for name, evaluation in judged.items()},
        split=splits[0],
        subnets=tuple(pareto_front(rows, by=training.task.figures.of_rows) if subnets == "pareto" else rows),
        judged=tuple(rows),
        notes=(*opened.notes, *_left_out(judged), *more),
        times=tuple(times),
    )


def _left_out(judged: Mapping[str, Evaluation]) -> list[str]:
    """A note for each split of which images cannot be read."""
    counts = {split: len(evaluation.bad_images) for split, evaluation in judged.items()}
    return [f"{n} of the {split} images cannot be read and were left out" for split, n in counts.items() if n]


def _splits(training: Training, asked: str | None, run: Path) -> list[str]:
    data = training.data
    there = [name for name in ("val", "test") if len(getattr(data, name))]
    if asked is not None and asked not in there:
        raise ValueError(f"{run}: {data.name} has no {asked} images; it has {' and '.join(['train', *there])}")
    if not there:
        raise ValueError(f"{run}: {data.name} has neither validation nor test images; nothing can be evaluated")
    if asked is not None:
        return [asked]
    return there[:1] if data.test is data.val else there


def _chosen(stages: Sequence[Stage], asked: str | None, *, seed: int, run: Path) -> tuple[list[Subnet], list[str]]:
    if asked is None:
        return [], []
    if not stages:
        raise ValueError(f"{run}: its network has no residual blocks that could be skipped, so it has no subnets")
    if asked == "all":
        return choose_subnets(stages), []
    if asked != "pareto":
        return choose_subnets(stages, int(asked) + 1, seed=seed), []
    chosen = choose_subnets(stages, _MOST_JUDGED, seed=seed)
    count = prod(len(stage.legal_depths) for stage in stages)
    note = (
        f"{len(chosen)} of {count} ordered subnets were drawn; others may be better "
        "(give all instead of pareto to evaluate every one)"
    )
    return chosen, [note] if len(chosen) < count else []


def _judge(training: Training, chosen: Sequence[Subnet], *, split: str, console: Console | None) -> list[SubnetRow]:
    if not chosen:
        return []
    model, stages = inner_module(training.model), training.stages
    batches, calibration = training.eval_batches(split), training.calibration_batches()
    with show_progress(console, total=len(chosen), label="subnets", lines=True) as display:
        return training.task.evaluate_subnets(
            model, stages, batches, training.data, subnets=chosen, calibration=calibration,
            on_row=lambda row: display.advance(str(row.subnet)),
        )  # fmt: skip


def _example(training: Training) -> Any:
    return to_device(training.task.example(training.data, 1), training.device)


def write_subnets(judgement: RunJudgement, path: Path) -> None:
    """Writes every subnet that was evaluated as a CSV file, in one piece; an older one is replaced.

    Raises:
        ValueError: the folder cannot be written.
    """
    shared = {"split": judgement.split, "weights": judgement.weights, "checkpoint": judgement.checkpoint}
    write_csv([record | shared for record in cost_records(judgement.judged)], path)
