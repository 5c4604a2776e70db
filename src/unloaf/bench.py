"""`unloaf bench`: networks, modes and methods to measure in; rows, tables, files and a picture out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from unloaf.display import show_progress
from unloaf.engine.devices import keep_freed_memory, usable_device
from unloaf.environment import environment
from unloaf.files.writing import write_whole
from unloaf.measure.bench import MODES, VARIANTS, Clock, Plan, measure
from unloaf.measure.costs import write_csv
from unloaf.measure.networks import chosen_networks
from unloaf.measure.step_time import StepTimeRow, by_setup
from unloaf.pages.plots import step_time_bars

_HEADS = ("ms/step", "time", "lowest-highest", "FLOPs limit", "time/limit", "separate", "its FLOPs", "memory")
_CAPTION = "relative to a step of common training in the same round; separate: a complete pass for each subnet"


def bench_step(
    *,
    model: tuple[str, ...],
    methods: Sequence[str],
    img_size: int | None = None,
    batch_size: int = 16,
    num_classes: int | None = None,
    num_subnets: int = 6,
    modes: Sequence[str] = ("eager",),
    amp: bool = False,
    channels_last: bool = False,
    device: str = "auto",
    repeats: int = 10,
    minutes: float | None = None,
    output: str | None = None,
    plot: str | None = None,
    console: Console | None = None,
) -> list[StepTimeRow]:
    """Measure a training step of each method on noise, for each network and mode; options of `unloaf bench step`.

    A network, a mode or a method that cannot be measured here costs its own rows alone: a line on the console says why.
    Files are written again after each network and mode.

    Raises:
        ValueError: an unknown method or mode, no such device, or nothing at all could be measured.

    >>> rows = bench_step(model=("cifar/resnet14",), methods=["st"], batch_size=2, repeats=1, device="cpu")
    >>> [(row.method, row.setup.input_size, row.rounds) for row in rows]
    [('common', 32, 1), ('st', 32, 1)]
    """
    _check("methods", methods, VARIANTS)
    _check("modes", modes, MODES)
    where = _device(device)
    if where.type == "cpu":
        keep_freed_memory()
    networks = chosen_networks(tuple(model), img_size=img_size, num_classes=num_classes)
    plan = Plan(
        methods=tuple(dict.fromkeys(["common", *methods])),
        modes=tuple(dict.fromkeys(modes)),
        batch_size=batch_size,
        num_subnets=num_subnets,
        amp=amp,
        channels_last=channels_last,
        device=where,
        repeats=repeats,
    )
    settings = {"model": [f"{network.name}@{network.side}" for network in networks], "minutes": minutes}
    settings |= {name: list(v) if isinstance(v, tuple) else v for name, v in vars(plan).items()}
    settings["device"] = str(where)
    rows: list[StepTimeRow] = []
    notes: list[str] = []
    total = len(networks) * len(plan.modes)
    clock = Clock(minutes, parts=total)
    with show_progress(console, total=total, label="bench step") as display:

        def say(line: str) -> None:
            notes.append(line)
            display.line(line)

        for network in networks:
            for measured in measure(network, plan, clock=clock, say=say):
                rows += measured
                display.advance(network.name)
                if output is not None:
                    write_rows(Path(output), rows, settings, notes=notes)
    if not rows:
        raise ValueError(notes[0] if notes else "nothing was measured; give more --minutes")
    if plot is not None:
        write_plot(Path(plot), rows)
    return rows


def _check(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown or not given:
        raise ValueError(f"{name}: {', '.join(unknown) or 'none'} is not known; give some of {', '.join(known)}")


def _device(name: str) -> torch.device:
    device = usable_device(name)
    if device.type not in ("cpu", "cuda"):
        if name != "auto":
            raise ValueError(f"device {name}: steps are measured on cpu and cuda; give one of them")
        return torch.device("cpu")
    return device


def tables(rows: Sequence[StepTimeRow]) -> list[Table]:
    """A table for each network and mode; times and memory relative to common training.

    >>> [made] = tables([StepTimeRow("common", 0.1, 1.0, (1.0, 1.0), 1.0, 1.0, None, 1.0, 10, 1.0)])
    >>> made.row_count
    1
    """
    groups = by_setup(rows)
    made = [_table(group) for group in groups.values()]
    for table, setup in zip(made, groups, strict=True):
        table.title = setup.title
    if made:
        made[-1].caption = _CAPTION
    return made


def _table(rows: Sequence[StepTimeRow]) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", title_style="bold", title_justify="left", pad_edge=False)
    table.add_column("method", no_wrap=True)
    for head in _HEADS:
        table.add_column(head, justify="right")
    for row in rows:
        one_pass = row.separate is None
        table.add_row(
            row.method,
            f"{1000 * row.seconds:.4g}",
            f"{row.relative:.2f}x",
            f"{row.spread[0]:.2f}-{row.spread[1]:.2f}",
            f"{row.limit:.2f}x",
            f"{row.over_limit:.2f}",
            "" if one_pass else f"{row.separate:.2f}x",
            "" if one_pass else f"{row.separate_limit:.2f}x",
            f"{row.relative_memory:.2f}x",
        )
    return table


def write_rows(
    folder: Path, rows: Sequence[StepTimeRow], settings: Mapping[str, Any], *, notes: Sequence[str] = ()
) -> None:
    """Writes step_time.json (command, hardware, versions, settings, notes, rows), step_time.csv and step_time.svg.

    Raises:
        ValueError: the folder cannot be written.
    """
    records = [row.record() for row in rows]
    document = {"settings": settings, "environment": environment(), "notes": list(notes), "rows": records}
    write_whole(folder / "step_time.json", json.dumps(document, indent=2) + "\n")
    if records:
        write_csv([_flat(record) for record in records], folder / "step_time.csv")
        write_plot(folder / "step_time.svg", rows)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the two ends of the spread in columns of their own."""
    ends = dict(zip(("lowest", "highest"), record["spread"], strict=True))
    return {name: value for name, value in record.items() if name != "spread"} | ends


def write_plot(file: Path, rows: Sequence[StepTimeRow]) -> None:
    """Writes the bars of `unloaf.pages.plots.step_time_bars` as SVG.

    Raises:
        ValueError: the file cannot be written.
    """
    write_whole(file, step_time_bars(by_setup(rows)), advice="give another file")
