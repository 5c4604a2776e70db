"""`unloaf bench`: networks, modes and methods to measure in; rows, tables, files and a picture out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from unloaf.analysis.step_time import StepTimeRow
from unloaf.bench.files import tables, write_plot, write_rows
from unloaf.bench.networks import STANDARD, chosen_networks
from unloaf.bench.session import METHODS, MODES, Clock, Plan, measure
from unloaf.engine.devices import usable_device
from unloaf.engine.display import show_progress
from unloaf.engine.memory import keep_freed_memory

__all__ = ["METHODS", "MODES", "STANDARD", "bench_step", "tables"]


def bench_step(
    *,
    model: tuple[str, ...],
    methods: Sequence[str],
    input_size: int | None = None,
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
    """Measure a training step of each method on noise, for each network and mode.

    A network, a mode or a method that cannot be measured here costs its own rows alone: a line says why.

    Args:
        model: names as for ``unloaf train``, NAME@SIDE for another side, or standard for `STANDARD`.
        methods: out of `METHODS`; common training is always measured.
        input_size: side of the images in pixels, see `chosen_networks`.
        batch_size: images per step.
        num_classes: of the heads; default: 10 for cifar/, else 1000.
        num_subnets: subnets per step of ST and ST++.
        modes: "eager", "compiled" (`unloaf.compile_blocks`) or both; where the machine cannot compile the eager figures
            take its place.
        amp: bfloat16 through autocast.
        channels_last: memory format of weights and images.
        device: "auto", "cpu", "cuda" or "cuda:1".
        repeats: rounds; medians count.
        minutes: begin nothing after so long; what is measured by then counts.
        output: a folder for step_time.json, .csv and .svg, written anew after each network and mode, or None.
        plot: a file for the picture, as SVG, or None.
        console: where progress and what was left out is said; default: nowhere.

    Raises:
        ValueError: an unknown method or mode, no such device, or nothing at all could be measured.

    >>> rows = bench_step(model=("cifar/resnet14",), methods=["st"], batch_size=2, repeats=1, device="cpu")
    >>> [(row.method, row.setup.input_size, row.rounds) for row in rows]
    [('common', 32, 1), ('st', 32, 1)]
    """
    _check("methods", methods, METHODS)
    _check("modes", modes, MODES)
    where = _device(device)
    if where.type == "cpu":
        keep_freed_memory()
    networks = chosen_networks(tuple(model), input_size=input_size, num_classes=num_classes)
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
    settings |= {name: list(v) if isinstance(v, tuple) else v for name, v in vars(plan).items()} | {
        "device": str(where)
    }
    rows: list[StepTimeRow] = []
    notes: list[str] = []
    total = len(networks) * len(plan.modes)
    clock = Clock(minutes, parts=total)
    with show_progress(console or Console(quiet=True), total=total, label="bench step") as display:

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
