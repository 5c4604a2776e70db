"""What a run says: its epochs as lines of summary.csv; steps, epochs and continuing as lines of text."""

from __future__ import annotations

import json
import math
from typing import Any

from unloaf.config import Config
from unloaf.engine.checkpoint import Checkpoint, steps_per_epoch
from unloaf.engine.loop import EpochRow, StepRow, Training
from unloaf.engine.setup import Evaluation


def summary(row: EpochRow, config: Config) -> dict[str, Any]:
    """An epoch as a line of summary.csv; which columns there are depends on the configuration alone."""
    main = row.eval.main if row.eval else None
    values: dict[str, Any] = {
        "epoch": row.epoch,
        "time": round(row.seconds, 3),
        "train_loss": None if math.isnan(row.train_loss) else row.train_loss,
        "eval_loss": main.loss if main else None,
        "eval_top1": main.top1 if main else None,
        "eval_top5": main.top5 if main else None,
        "lr": row.lr,
    }
    if config.model_ema:
        average = row.eval.average if row.eval else None
        values |= {
            "ema_loss": average.loss if average else None,
            "ema_top1": average.top1 if average else None,
            "ema_top5": average.top5 if average else None,
        }
    if config.eval_subnets:
        tops = _tops(row.eval) if row.eval else []
        values |= {
            "subnets_top1_mean": sum(tops) / len(tops) if tops else None,
            "subnets_top1_min": min(tops) if tops else None,
            "main_top1_reestimated": row.eval.reestimated.top1 if row.eval and row.eval.reestimated else None,
        }
    return values


def _tops(found: Evaluation) -> list[float]:
    return [judged.top1 for judged in found.subnets if judged.top1 is not None]


def step_line(row: StepRow, training: Training, seconds: float) -> str:
    """A step as a line of text; seconds are for one step, images per second over all devices."""
    config, position = training.config, training.position
    world = training.accelerator.num_processes
    images = config.batch_size * world * config.accumulation(world)
    return (
        f"train {row.epoch}/{config.epochs} [{position.step}/{training.steps_per_epoch}]  "
        f"loss {row.loss:.4f} ({position.mean_loss:.4f})  lr {row.lr:.3g}  "
        f"{seconds:.3f} s/step  {images / seconds:.0f} images/s"
    )


def epoch_line(row: EpochRow, config: Config) -> str:
    """An epoch as a line of text."""
    parts = [f"epoch {row.epoch}/{config.epochs}", f"train loss {row.train_loss:.4f}"]
    if row.eval is not None:
        parts += [f"val loss {row.eval.main.loss:.4f}", f"val top-1 {row.eval.main.top1:.2f} %"]
        if row.eval.average is not None:
            parts.append(f"EMA top-1 {row.eval.average.top1:.2f} %")
        if row.eval.subnets:
            tops = _tops(row.eval)
            parts.append(f"subnets {min(tops):.2f} to {max(tops):.2f} %")
        if row.eval.reestimated is not None:
            parts.append(f"main re-estimated {row.eval.reestimated.top1:.2f} %")
    return "  ".join([*parts, f"lr {row.lr:.2g}", f"{row.seconds:.1f} s"])


def resumed_lines(training: Training, checkpoint: Checkpoint) -> list[str]:
    """Where a resumed run continues, and what becomes of its schedule if an epoch has other steps now."""
    lines = [f"resumed at step {training.steps_done} (epoch {training.position.epoch})"]
    position: Any = checkpoint.state["position"]
    before, now = steps_per_epoch(position, checkpoint.step), training.steps_per_epoch
    if before is not None and before != now:
        lines.append(
            f"an epoch has {now} steps now, it had {before}: run and schedule continue at the same share of epoch "
            f"{training.position.epoch}, after {training.position.step} of {now} steps ({position['step']} of {before} "
            f"before), and the numbers of steps only grow"
        )
    then = json.loads(checkpoint.metadata.get("unloaf_config", "{}")).get("epochs", training.config.epochs)
    return lines + _longer(training, then) if then < training.config.epochs else lines


def _longer(training: Training, before: int) -> list[str]:
    """What it means for a run that it is to have more epochs than its checkpoint knows of."""
    config, position = training.config, training.position
    told = [f"longer: {config.epochs} epochs instead of {before}, from epoch {position.epoch} on"]
    if config.sched in ("constant", "step", "multistep"):
        told.append(f"--sched {config.sched} continues as it was: it does not look at the number of epochs")
    else:
        now = training.optimizer.param_groups[0]["lr"]
        told.append(
            f"--sched {config.sched} is that of {config.epochs} epochs from here on: the learning rate was "
            f"{position.lr:.3g} and is {now:.3g} now; a run of {config.epochs} epochs from the beginning would have "
            "had another until here"
        )
    if config.subnet_schedule != "constant":
        told.append(f"--subnet-schedule {config.subnet_schedule} is that of {config.epochs} epochs from here on, too")
    return told
