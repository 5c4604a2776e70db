"""`unloaf bench`: a network and the methods to measure in, a table and its rows out."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from unloaf.analysis.step_time import StepTimeRow, step_time_rows
from unloaf.engine.environment import environment
from unloaf.engine.memory import keep_freed_memory
from unloaf.engine.models import build_model
from unloaf.inputs import SmallerInputs
from unloaf.methods import (
    CommonTraining,
    GroupKnowledgeTraining,
    StimulativeTraining,
    StochasticDepth,
    TrainingMethod,
    stimulative_plus,
)
from unloaf.sampling import InterStageSampler
from unloaf.stages import Stage, find_stages

_Factory = Callable[[nn.Module, Sequence[Stage], int], TrainingMethod]

_CASES: dict[str, _Factory] = {
    "common": lambda model, stages, n: CommonTraining(model),
    "stochastic-depth": lambda model, stages, n: StochasticDepth(model, stages),
    "st": lambda model, stages, n: StimulativeTraining(model, stages, num_subnets=n),
    "st-inter-stage": lambda model, stages, n: StimulativeTraining(
        model, stages, num_subnets=n, sampler=InterStageSampler()
    ),
    "st++": lambda model, stages, n: stimulative_plus(model, stages, num_subnets=n),
    "st++-one-side": lambda model, stages, n: stimulative_plus(
        model, stages, num_subnets=n, subnet_inputs=SmallerInputs(per="step")
    ),
    "gkt": lambda model, stages, n: GroupKnowledgeTraining(model, stages),
}


def bench_step(
    *,
    model: str,
    input_size: int,
    batch_size: int,
    num_subnets: int,
    methods: Sequence[str],
    repeats: int,
    output: str | None,
) -> list[StepTimeRow]:
    """Measure a training step of each method on noise, on the fastest device there is.

    Args:
        model: a name as for ``unloaf train``.
        input_size: side of the images in pixels.
        batch_size: images per step.
        num_subnets: subnets per step of ST and ST++.
        methods: out of common, stochastic-depth, st, st-inter-stage, st++, st++-one-side, gkt.
        repeats: rounds; medians count.
        output: a folder for step_time.json and step_time.csv, or None.

    Raises:
        ValueError: an unknown method or model, or a model that cannot take the inputs.
    """
    unknown = sorted(set(methods) - set(_CASES))
    if unknown:
        raise ValueError(f"methods: {', '.join(unknown)} is not known; give some of {', '.join(_CASES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    net = build_model(model, num_classes=1000, in_chans=3, img_size=input_size).to(device).train()
    x = torch.randn(batch_size, 3, input_size, input_size, generator=generator).to(device)
    y = torch.randint(1000, (batch_size,), generator=generator).to(device)
    stages = find_stages(net, x[:1])
    labels = dict.fromkeys(["common", *methods])
    rows = step_time_rows({label: _CASES[label](net, stages, num_subnets) for label in labels}, x, y, repeats=repeats)
    if output is not None:
        settings = {"model": model, "input_size": input_size, "batch_size": batch_size, "num_subnets": num_subnets}
        _write(Path(output), rows, settings | {"repeats": repeats, "device": str(device)})
    return rows


def _write(folder: Path, rows: Sequence[StepTimeRow], settings: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "environment": environment(), "rows": [asdict(row) for row in rows]}
    (folder / "step_time.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with (folder / "step_time.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def table(rows: Sequence[StepTimeRow]) -> Table:
    """The rows for the terminal; times and memory relative to common training."""
    result = Table(
        box=SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
        caption="relative to a step of common training in the same round; separate: a complete pass for each subnet",
    )
    result.add_column("method")
    for head in ("s/step", "time", "lowest-highest", "FLOPs limit", "time/limit", "separate", "its FLOPs", "memory"):
        result.add_column(head, justify="right")
    for row in rows:
        result.add_row(
            row.method,
            f"{row.seconds:.3f}",
            f"{row.relative:.2f}x",
            f"{row.spread[0]:.2f}-{row.spread[1]:.2f}",
            f"{row.limit:.2f}x",
            f"{row.over_limit:.2f}",
            "" if row.separate is None else f"{row.separate:.2f}x",
            f"{row.separate_limit:.2f}x",
            f"{row.relative_memory:.2f}x",
        )
    return result
