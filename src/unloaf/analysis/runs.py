"""A trained run in, the accuracy of its network and of the networks inside it out. Never trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from unloaf.analysis.choice import pareto_front
from unloaf.analysis.costs import CostRow, gmacs, measure_subnets, measured_rounds, write_csv
from unloaf.engine.checkpoint import Checkpoint, load_checkpoint, load_strictly, newest_checkpoint
from unloaf.engine.config import Config, load_config
from unloaf.engine.display import show_progress
from unloaf.engine.errors import CheckpointError
from unloaf.engine.resuming import check_settings
from unloaf.engine.run_folder import checkpoints_in_sight, run_of
from unloaf.engine.training import Evaluation, Training, prepare
from unloaf.evaluation import Accuracy, choose_subnets, evaluate_subnets
from unloaf.stages import Stage, inner_module
from unloaf.subnet import Subnet, active_subnet

_MOST_JUDGED = 256  # by pareto, which nobody asked to take a day


@dataclass(frozen=True)
class NetworkRow:
    """A network inside a run, judged.

    Attributes:
        subnet: its depths, "3-4-6-3".
        top1: accuracy in percent.
        top5: share of images whose class is among the five highest logits, in percent.
        loss: mean cross-entropy, in nats.
        params: parameters as a network of its own.
        gmacs: billions of multiply-adds for one image.
    """

    subnet: str
    top1: float
    top5: float
    loss: float
    params: int
    gmacs: float


@dataclass(frozen=True)
class RunJudgement:
    """How good a run is at one of its checkpoints.

    Attributes:
        run: its folder.
        checkpoint: name of the checkpoint's folder.
        epoch: whole epochs that were trained by then.
        weights: "model", or "model_ema" for the moving average.
        params: parameters of the main network.
        gmacs: billions of multiply-adds of the main network for one image.
        main: the main network, by split.
        split: the images that judged the subnets.
        subnets: those that were asked for, the main network first; of pareto, smallest first.
        judged: all that were judged.
        notes: what a reader has to know of the checkpoint, the images and the choice of the subnets.
        costs: the same subnets as `judged`, with measured time where that was asked for.
    """

    run: Path
    checkpoint: str
    epoch: int
    weights: str
    params: int
    gmacs: float
    main: dict[str, Accuracy]
    split: str
    subnets: tuple[NetworkRow, ...]
    judged: tuple[NetworkRow, ...]
    notes: tuple[str, ...]
    costs: tuple[CostRow, ...] = ()


def judge_run(
    run: Path,
    *,
    subnets: str | None = None,
    recalibrate: int | None = None,
    checkpoint: str = "last",
    split: str | None = None,
    ema: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    timed: Sequence[int] = (),
    repeats: int = 30,
    console: Console | None = None,
) -> RunJudgement:
    """Judges a run at a checkpoint; writes nothing, and the run may still be training.

    The main network is judged as it was while it trained: the accuracy on the validation images is the one in
    summary.csv, digit for digit, on the same kind of device.

    Args:
        run: a folder that `unloaf train` made.
        subnets: "all" ordered ones, "pareto" for those that no other beats, a number for so many, drawn as
            `--eval-subnets` draws them, or None.
        recalibrate: training images that re-estimate a subnet's batch-norm statistics; default: as in the run.
        checkpoint: "last" for the newest that is not damaged, "best" for the best on the validation images.
        split: "val" or "test"; default: both for the main network, val for the subnets if there is one.
        ema: judge the moving average of the weights.
        batch_size: images in a pass; default: as in the run.
        workers: processes that read images; default: as in the run.
        data_dir: where the images are now; default: as in the run.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        timed: batch sizes at which the time of the judged subnets is measured.
        repeats: passes that are timed, of each subnet and batch size.
        console: shows a progress bar where it is a terminal.

    Raises:
        ValueError: the folder is no run, has no such checkpoint or images, its args.yaml was changed, or the network
            has no subnets.
        CheckpointError: no checkpoint is intact.
    """
    config, found, weights, notes = open_checkpoint(run, checkpoint, ema=ema)
    training = prepare_for_one_process(
        config, recalibrate=recalibrate, workers=workers, data_dir=data_dir, device=device
    )
    if batch_size is not None:
        training = replace(training, config=replace(training.config, batch_size=batch_size))
    load_weights(inner_module(training.model), found, weights)
    splits = _splits(training, split, run)
    judged = {name: training.evaluate(name) for name in splits}
    chosen, more = _chosen(training.stages, subnets, seed=config.seed, run=run)
    rows = _judge(training, chosen, split=splits[0], console=console)
    costs = _costs(training, chosen, rows, timed=timed, repeats=repeats, console=console)
    position: Any = found.state["position"]
    network = inner_module(training.model)
    return RunJudgement(
        run=run,
        checkpoint=found.path.name,
        epoch=position["epoch"] - 1,
        weights=weights,
        params=sum(p.numel() for p in network.parameters()),
        gmacs=gmacs(network, _example(training)),
        main={name: evaluation.main for name, evaluation in judged.items()},
        split=splits[0],
        subnets=tuple(pareto_front(rows) if subnets == "pareto" else rows),
        judged=tuple(rows),
        notes=(*notes, *_left_out(judged), *more),
        costs=tuple(costs),
    )


def _left_out(judged: Mapping[str, Evaluation]) -> list[str]:
    """A note for each split of which images cannot be read."""
    counts = {split: len(evaluation.bad_images) for split, evaluation in judged.items()}
    return [f"{n} of the {split} images cannot be read and were left out" for split, n in counts.items() if n]


def checkpoint_of(run: Path, which: str) -> tuple[Checkpoint, list[str]]:
    """The newest good checkpoint of a run ("last") or its best one, and what is to be said of damaged ones."""
    if not checkpoints_in_sight(run):
        raise ValueError(f"{run} has no checkpoint yet; the first is written at the end of an epoch")
    best = run / "model_best"
    if which == "best":
        if best.is_symlink() and not best.exists():
            raise ValueError(f"{best} leads to {best.readlink()}, which is not there; leave --checkpoint out")
        if not best.exists():
            raise ValueError(f"{run} has no model_best: no epoch was validated yet; leave --checkpoint out")
        return _patiently(lambda: load_checkpoint(best)), []
    found, notes = _patiently(lambda: newest_checkpoint(run / "checkpoints"))
    if found is None:
        raise ValueError(f"{run} has no checkpoint any more; look at {run / 'checkpoints'}")
    return found, notes


def open_checkpoint(run: Path, which: str, *, ema: bool) -> tuple[Config, Checkpoint, str, list[str]]:
    """The settings of a run, one of its checkpoints, the name of the weights to take, and notes on what was found.

    Raises:
        ValueError: the folder is no run, it has no such checkpoint or weights, or the checkpoint was trained with other
            settings than args.yaml has.
        CheckpointError: no checkpoint is intact.
    """
    config = load_config(run_of(run) / "args.yaml")
    found, notes = checkpoint_of(run, which)
    check_settings(config, found)
    weights = "model_ema" if ema else "model"
    if weights not in found.weights:
        raise ValueError(f"{run} kept no moving average of its weights; leave --ema out")
    return config, found, weights, notes


def _patiently(read: Any) -> Any:
    """A run that trains on may replace a checkpoint while it is read: what fails is tried again."""
    for _ in range(2):
        try:
            return read()
        except CheckpointError:
            continue
    return read()


def prepare_for_one_process(config: Config, **given: Any) -> Training:
    """The run for weights of a checkpoint, without what only training needs: several devices, trackers, a second copy.

    What is given as None stays as in the run.
    """
    alone = replace(
        config,
        amp=False,
        cutmix=0.0,
        fsdp=False,
        grad_checkpointing=False,
        mixup=0.0,
        model_ema=False,
        sync_bn=False,
        torchcompile=False,
        trackers=(),
        **{name: value for name, value in given.items() if value is not None},
    )
    return prepare(alone, resumed=True)


def load_weights(model: nn.Module, checkpoint: Checkpoint, weights: str) -> None:
    """Puts the weights of a checkpoint, "model" or "model_ema", into the network that its args.yaml describes."""
    # The weights alone: batch-norm statistics of several processes are merged in them, as they were when judged.
    try:
        load_strictly(model, checkpoint.weights[weights])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{checkpoint.path} does not fit its args.yaml: {reason}") from error


def _splits(training: Training, asked: str | None, run: Path) -> list[str]:
    data = training.data
    there = [name for name in ("val", "test") if len(getattr(data, name))]
    if asked is not None and asked not in there:
        raise ValueError(f"{run}: {data.name} has no {asked} images; it has {' and '.join(['train', *there])}")
    if not there:
        raise ValueError(f"{run}: {data.name} has neither validation nor test images; nothing can be judged")
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
        "(give all instead of pareto to judge every one)"
    )
    return chosen, [note] if len(chosen) < count else []


def _judge(training: Training, chosen: Sequence[Subnet], *, split: str, console: Console | None) -> list[NetworkRow]:
    if not chosen:
        return []
    model, stages, example = inner_module(training.model), training.stages, _example(training)
    batches, calibration = training.eval_batches(split), training.calibration_batches()
    rows = []
    with show_progress(console or Console(quiet=True), total=len(chosen), label="subnets") as display:
        for subnet in chosen:
            [row] = evaluate_subnets(model, stages, batches, subnets=[subnet], calibration=calibration)
            with active_subnet(model, stages, subnet):
                cost = gmacs(model, example)
            rows.append(NetworkRow(str(subnet), row.top1, row.top5, row.loss, row.params, cost))
            display.advance(str(subnet))
    return rows


def _costs(
    training: Training,
    chosen: Sequence[Subnet],
    rows: Sequence[NetworkRow],
    *,
    timed: Sequence[int],
    repeats: int,
    console: Console | None,
) -> list[CostRow]:
    """The judged subnets again, with their time if batch sizes are given."""
    judged = [CostRow(r.subnet, r.params, r.gmacs, top1=r.top1, top5=r.top5, loss=r.loss) for r in rows]
    if not timed or not chosen:
        return judged
    model, example = inner_module(training.model), _example(training)
    with show_progress(console or Console(quiet=True), total=measured_rounds(repeats), label="time") as display:
        measured = measure_subnets(
            model,
            training.stages,
            example,
            chosen,
            batch_sizes=timed,
            repeats=repeats,
            on_pass=lambda: display.advance(""),
        )
    return [replace(row, timings=cost.timings) for row, cost in zip(judged, measured, strict=True)]


def _example(training: Training) -> torch.Tensor:
    data = training.data
    return torch.zeros(1, data.in_chans, data.img_size, data.img_size, device=training.device)


def write_subnets(judgement: RunJudgement, path: Path) -> None:
    """Writes every subnet that was judged as a CSV file, in one piece; an older one is replaced.

    Raises:
        ValueError: the folder cannot be written.
    """
    shared = {"split": judgement.split, "weights": judgement.weights, "checkpoint": judgement.checkpoint}
    write_csv([asdict(row) | shared for row in judgement.judged], path)
