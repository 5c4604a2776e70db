"""One process of the study: trains and judges a run, or measures what the steps of a table's rows cost.

Started by run.py with a file of instructions; leaves its result in a file.
"""

from __future__ import annotations

import csv
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmarks.accuracy.jobs import command, described
from rich.console import Console

from unloaf.config import Config
from unloaf.config.figures import FIGURES
from unloaf.engine.loop import Training, prepare, train_step
from unloaf.engine.run import train
from unloaf.environment import environment
from unloaf.errors import NonFiniteLossError, StoppedError
from unloaf.evaluation import choose_subnets
from unloaf.measure.flops import counting_flops, method_flops
from unloaf.runs.opened import checkpoint_of, load_weights
from unloaf.stages import inner_module
from unloaf.subnet import Subnet

ROOT = Path(__file__).resolve().parents[2]

_TO_SET_UP = 3  # steps in which kernels are chosen and memory is found
_FEWEST = 20  # steps that are timed, however long they take
_COUNTED = 10  # steps that are run for their FLOPs


def train_and_judge(order: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run: trained to its end, from wherever it was, and judged."""
    config = _config(order["config"])
    record: dict[str, Any] = {"settings": described(config), "epochs": config.epochs, "split": order["split"]}
    try:
        path = train(config, console=Console(quiet=True), resume="auto").path
    except NonFiniteLossError as error:
        return record | {"failed": str(error), FIGURES[config.task].of_rows: None, "subnets": {}} | _origin(config)
    with (path / "summary.csv").open(encoding="utf-8") as file:
        seconds = sum(float(row["time"]) for row in csv.DictReader(file))
    return record | judge(path, config, order) | {"train_seconds": round(seconds, 1)} | _origin(config)


def _config(values: Mapping[str, Any]) -> Config:
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Config(**given)


def judge(path: Path, config: Config, order: Mapping[str, Any]) -> dict[str, Any]:
    """The decisive figure of the last checkpoint and of subnets in it, with batch-norm statistics of their own, in
    percent.

    The main network is judged both ways: with the running statistics that training left, and ("_reestimated") with
    statistics re-estimated as its subnets have them. The figure is called "top1" for classifiers, "metric" elsewhere.
    """
    # Precision is the process's own, and judging is in float32 whatever it is.
    training = prepare(replace(config, torchcompile=False))
    task, figure = training.task, training.task.figures.of_rows
    if figure == "top1":
        training = replace(training, config=replace(training.config, batch_size=250))
    found, _ = checkpoint_of(path, "last")
    model, stages = inner_module(training.model), training.stages
    load_weights(model, found, "model")
    rows = task.evaluate_subnets(
        model,
        stages,
        training.eval_batches(order["split"]),
        training.data,
        subnets=_chosen(stages, order["subnets"]),
        calibration=training.calibration_batches(),
    )
    both, *others = sorted(rows, key=lambda row: row.subnet != Subnet.full(stages))
    main: Any = both.running or both
    more = {"top5": round(main.top5, 3), "loss": round(main.loss, 5)} if figure == "top1" else {}
    return {
        figure: round(getattr(main, figure), 3),
        f"{figure}_reestimated": round(getattr(both, figure), 3),
        **more,
        "subnets": {str(row.subnet): round(getattr(row, figure), 3) for row in others},
    }


def _chosen(stages: Any, asked: int | list[str] | None) -> list[Subnet]:
    if isinstance(asked, list):
        given = [tuple(map(int, depths.split("-"))) for depths in asked]
        # A network that is itself trained alone has fewer blocks than some of them, the smallest one fewer stages.
        same = [d for d in given if len(d) == len(stages)]
        fit = [d for d in same if all(n in s.legal_depths for n, s in zip(d, stages, strict=True))]
        subnets = [Subnet.from_depths(stages, depths) for depths in fit]
        full = Subnet.full(stages)
        return [full, *(subnet for subnet in subnets if subnet != full)]
    return choose_subnets(stages, None if asked is None else asked + 1)


def _origin(config: Config) -> dict[str, Any]:
    about = environment()
    return {
        "command": command(config),
        "hardware": about["hardware"],
        "threads": about["threads"],
        "versions": {name: about["versions"][name] for name in ("unloaf", "torch", "timm")},
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def _commit() -> str | None:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def measure(order: Mapping[str, Any]) -> dict[str, Any]:
    """Time and FLOPs of a step relative to a step of common training, over steps drawn from the whole run.

    The two take turns; the ratio is of the sums. On a CPU it is the processor time of this process that counts, which
    other processes disturb least. What reads images and logs is left out.
    """
    common, training = (prepare(_config(order[name])) for name in ("baseline", "row"))
    batches = next(iter(common.batches.epoch(1)))
    pairs: list[tuple[float, float]] = []
    draws = random.Random(0)
    steps = [draws.randrange(training.config.epochs * training.steps_per_epoch) for _ in range(order["rounds"])]
    for step in range(_TO_SET_UP):
        for either in (common, training):
            _timed(either, batches, step)
    until = time.monotonic() + order["seconds"]
    for step in steps:
        pairs.append((_timed(common, batches, step), _timed(training, batches, step)))
        if len(pairs) >= _FEWEST and time.monotonic() > until:
            break
    return {
        "time": round(sum(own for _, own in pairs) / sum(base for base, _ in pairs), 3),
        "time_error": round(statistics.stdev(own / base for base, own in pairs) / len(pairs) ** 0.5, 3),
        "flops": round(_flops(common, training, batches, steps[: order["draws"]]), 3),
        "rounds": len(pairs),
    } | _origin(training.config)


def _flops(common: Training, training: Training, batches: Any, steps: Sequence[int]) -> float:
    """FLOPs of a step relative to a step of common training; of other tasks than classification counted in the steps
    themselves, of which a few must do.
    """
    if training.task.figures.of_rows == "top1":
        plain = prepare(replace(training.config, torchcompile=False)) if training.config.torchcompile else training
        flops = method_flops(plain.method, batches[0].x, steps)
        return flops.shared / flops.common
    totals = []
    for either in (common, training):
        with counting_flops() as counter:
            for step in steps[:_COUNTED]:
                _timed(either, batches, step)
        totals.append(counter.get_total_flops())
    return totals[1] / totals[0]


def _timed(training: Training, batches: Any, step: int) -> float:
    cuda = training.device.type == "cuda"
    clock: Callable[[], float] = time.perf_counter if cuda else time.process_time
    training.model.train()
    training.method.step = step
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    train_step(training, batches)
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def main() -> int:
    """Does what the file says; 143 when it was told to stop before the end."""
    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1 if order["threads"] is None else order["threads"])
    try:
        result = measure(order) if order["kind"] == "measure" else train_and_judge(order)
    except StoppedError as error:
        return error.code
    Path(order["result"]).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
