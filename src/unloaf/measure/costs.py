"""What a subnet costs: parameters, multiply-adds, measured time."""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unloaf.evaluation import SubnetRow, count_params
from unloaf.files.writing import write_whole
from unloaf.inputs import batch_of
from unloaf.measure.flops import counting_flops
from unloaf.printable import printable
from unloaf.stages import Stage, call_model, evaluating, inner_module
from unloaf.subnet import Subnet, active_subnet, check_subnet

_WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """How long a forward pass takes: eval mode, no gradients, float32.

    >>> Timing(batch_size=32, median_ms=8.0, p95_ms=9.5, repeats=30, device="cpu", threads=1).images_per_second
    4000.0
    """

    batch_size: int  # images in a pass
    median_ms: float  # over the repeats
    p95_ms: float  # 95 % of the passes took at most this long
    repeats: int  # passes that were timed
    device: str  # what computed, "cpu" or the name of the accelerator
    threads: int  # of torch, on the CPU

    @property
    def images_per_second(self) -> float:
        """Throughput, from the median."""
        return 1000 * self.batch_size / self.median_ms


def gmacs(model: nn.Module, image: Any) -> float:
    """Billions of multiply-adds of a forward pass, by torch's flop counter: convolutions, linear layers, attention.

    >>> from torch import nn
    >>> round(gmacs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 32, 32)) * 1e9)  # 8 * 3 * 9 * 32 * 32
    221184
    """
    with evaluating(model), counting_flops() as counter:
        call_model(model, image)
    return counter.get_total_flops() / 2e9


def subnet_cost(model: nn.Module, stages: Sequence[Stage], example: Any, subnet: Subnet) -> tuple[int, float]:
    """Parameters of a subnet, and billions of multiply-adds for these inputs.

    >>> import unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(), torch.zeros(1, 3, 224, 224)
    >>> stages = unloaf.find_stages(model, x)
    >>> subnet_cost(model, stages, x, unloaf.Subnet.from_depths(stages, (1, 1, 1, 1)))[0]
    5418792
    """
    check_subnet(stages, subnet)
    with active_subnet(model, stages, subnet):
        return count_params(model, stages, subnet), gmacs(model, example)


def measure_subnets(
    model: nn.Module,
    stages: Sequence[Stage],
    example: Any,
    rows: Sequence[SubnetRow],
    *,
    latency: bool = False,
    batch_size: int = 1,
    repeats: int = 30,
    on_row: Callable[[SubnetRow], None] | None = None,
) -> list[SubnetRow]:
    """The rows with parameters, GMACs and, if asked for, the measured time of their subnets; the rest of them stays.

    Args:
        model: on the device to measure; it is left as it was.
        stages: from `find_stages`.
        example: a batch, of which the first example is used; a mapping is passed as keywords.
        rows: from `evaluate_subnets`, or ``[SubnetRow(subnet), ...]`` of subnets that were not evaluated.
        latency: also measure how long a forward pass takes; see `time_subnets`.
        batch_size: examples in a pass that is timed.
        repeats: passes of each subnet that are timed.
        on_row: is called with each row once its costs are counted, before anything is timed.

    Raises:
        ValueError: no row, a subnet of another model, a batch size or number of repeats below 1.

    >>> import unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(), torch.zeros(1, 3, 224, 224)
    >>> stages = unloaf.find_stages(model, x)
    >>> [row] = unloaf.measure_subnets(model, stages, x, [unloaf.SubnetRow(unloaf.Subnet.full(stages))])
    >>> row.params, round(row.gmacs, 2), row.latency_ms
    (11689512, 1.81, None)
    """
    if not rows:
        raise ValueError("there is no row to measure; give what evaluate_subnets returns, or [SubnetRow(subnet), ...]")
    inner, one = inner_module(model), batch_of(example, 1)
    measured = []
    for row in rows:
        params, cost = subnet_cost(inner, stages, one, row.subnet)
        measured.append(replace(row, params=params, gmacs=cost))
        if on_row is not None:
            on_row(measured[-1])
    if not latency:
        return measured
    subnets = [row.subnet for row in rows]
    times = time_subnets(inner, stages, example, subnets, batch_sizes=[batch_size], repeats=repeats)
    return [replace(row, latency_ms=timing.median_ms) for row, [timing] in zip(measured, times, strict=True)]


def time_subnets(
    model: nn.Module,
    stages: Sequence[Stage],
    example: Any,
    subnets: Sequence[Subnet],
    *,
    batch_sizes: Sequence[int] = (1, 32),
    repeats: int = 30,
    on_pass: Callable[[], None] | None = None,
) -> list[tuple[Timing, ...]]:
    """Measured time of subnets: of each a `Timing` per batch size; arguments are those of `measure_subnets`.

    The subnets take turns, in another order in each round, so that other load on the machine hits all alike. A
    pass that is timed comes right after one of the same subnet that is not, so that none pays for the caches of
    another. ``on_pass`` is called after each round.

    Raises:
        ValueError: no subnet, a subnet of another model, a batch size or number of repeats below 1.

    >>> import unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(), torch.zeros(1, 3, 32, 32)
    >>> stages = unloaf.find_stages(model, x)
    >>> subnets = unloaf.enumerate_subnets(stages)[:2]
    >>> [[t.batch_size for t in times] for times in time_subnets(model, stages, x, subnets, repeats=2)]
    [[1, 32], [1, 32]]
    """
    sizes = list(dict.fromkeys(batch_sizes))
    if not subnets:
        raise ValueError("there is no subnet to measure; give at least one")
    if not sizes or min(sizes) < 1:
        raise ValueError(f"batch_sizes is {tuple(batch_sizes)}; give one or more numbers of at least 1")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; give at least 1")
    for subnet in subnets:
        check_subnet(stages, subnet)
    inner = inner_module(model)
    device = next(inner.parameters(), torch.empty(0)).device
    taken: dict[tuple[int, int], list[float]] = {(i, size): [] for size in sizes for i in range(len(subnets))}
    batches = {size: batch_of(example, size) for size in sizes}
    generator = torch.Generator().manual_seed(0)
    with evaluating(inner):
        for _ in range(_WARM_UP + repeats):
            for index in torch.randperm(len(subnets), generator=generator).tolist():
                with active_subnet(inner, stages, subnets[index]):
                    for size, batch in batches.items():
                        call_model(inner, batch)
                        taken[index, size].append(milliseconds(lambda b=batch: call_model(inner, b), device))
            if on_pass is not None:
                on_pass()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [tuple(_timing(size, taken[i, size][_WARM_UP:], name) for size in sizes) for i in range(len(subnets))]


def measure_in_sight(
    model: nn.Module,
    stages: Sequence[Stage],
    example: Any,
    rows: Sequence[SubnetRow],
    *,
    timed: Sequence[int] = (),
    repeats: int,
    console: Any,
    counted: tuple[nn.Module, Any] | None = None,
) -> tuple[list[SubnetRow], list[tuple[Timing, ...]]]:
    """The rows with their costs, and `Timing` of each at the ``timed`` batch sizes, whose smallest is their latency.

    Progress is shown on the console. ``counted`` are a model and an example without data, in place of these, for GMACs.
    """
    from unloaf.display import show_progress

    with show_progress(console, total=len(rows), label="GMACs", lines=True) as display:
        empty, one = counted or (model, example)
        rows = measure_subnets(empty, stages, one, rows, on_row=lambda row: display.advance(str(row.subnet)))
    if not timed:
        return rows, []
    with show_progress(console, total=_WARM_UP + repeats, label="time", lines=True) as display:
        subnets, on_pass = [row.subnet for row in rows], lambda: display.advance("")
        times = time_subnets(model, stages, example, subnets, batch_sizes=timed, repeats=repeats, on_pass=on_pass)
    smallest = [min(timings, key=lambda timing: timing.batch_size) for timings in times]
    return [replace(row, latency_ms=t.median_ms) for row, t in zip(rows, smallest, strict=True)], times


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long that takes: on CUDA the time between two events on the stream, elsewhere that of the wall clock."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            work()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)
    _wait_for(device)
    before = time.perf_counter()
    work()
    _wait_for(device)
    return 1000 * (time.perf_counter() - before)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _timing(size: int, milliseconds: Sequence[float], device: str) -> Timing:
    # The nearest rank: a value that was measured.
    p95 = sorted(milliseconds)[math.ceil(0.95 * len(milliseconds)) - 1]
    median = statistics.median(milliseconds)
    return Timing(size, median, max(p95, median), len(milliseconds), device, torch.get_num_threads())


def write_csv(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes records with the same names as a CSV file, in one piece; its folder is made, an older file replaced.

    Raises:
        ValueError: the file cannot be written.
        DiskFullError: there is no room for it.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: printable(value) if isinstance(value, str) else value for name, value in record.items()}
        for record in records
    )
    write_whole(path, text.getvalue())
