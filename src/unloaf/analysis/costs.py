"""What a subnet costs: parameters, multiply-adds, measured time."""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.analysis.flops import counting_flops
from unloaf.engine.files import write_whole
from unloaf.engine.names import printable
from unloaf.evaluation import count_params
from unloaf.stages import Stage, call_model, evaluating, inner_module
from unloaf.subnet import Subnet, active_subnet, check_subnet

_WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """How long a forward pass takes: eval mode, no gradients, float32.

    Attributes:
        batch_size: images in a pass.
        median_ms: median over the repeats, in milliseconds.
        p95_ms: 95 % of the passes took at most this long.
        images_per_second: batch size by median.
        repeats: passes that were timed.
        device: what computed, "cpu" or the name of the accelerator.
        threads: of torch, on the CPU.

    >>> Timing(batch_size=32, median_ms=8.0, p95_ms=9.5, repeats=30, device="cpu", threads=1).images_per_second
    4000.0
    """

    batch_size: int
    median_ms: float
    p95_ms: float
    repeats: int
    device: str
    threads: int

    @property
    def images_per_second(self) -> float:
        """Throughput, from the median."""
        return 1000 * self.batch_size / self.median_ms


@dataclass(frozen=True)
class CostRow:
    """What a subnet costs and, where it was judged, how good it is.

    Attributes:
        subnet: its depths, "3-4-6-3".
        params: parameters as a network of its own.
        gmacs: billions of multiply-adds for one image.
        timings: measured, one for each batch size; empty where nothing was.
        top1: accuracy in percent, or None.
        top5: share of images whose class is among the five highest logits, in percent, or None.
        loss: mean cross-entropy, in nats, or None.

    >>> CostRow("2-2-2-2", params=11_689_512, gmacs=1.814, top1=69.8).latency is None
    True
    """

    subnet: str
    params: int
    gmacs: float
    timings: tuple[Timing, ...] = ()
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None

    @property
    def latency(self) -> float | None:
        """Median milliseconds of a pass at the smallest batch size that was measured."""
        return min(self.timings, key=lambda timing: timing.batch_size).median_ms if self.timings else None


def gmacs(model: nn.Module, image: Any) -> float:
    """Billions of multiply-adds of a forward pass, by torch's flop counter: convolutions, linear layers, attention.

    >>> from torch import nn
    >>> round(gmacs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 32, 32)) * 1e9)  # 8 * 3 * 9 * 32 * 32
    221184
    """
    with evaluating(model), counting_flops() as counter:
        call_model(model, image)
    return counter.get_total_flops() / 2e9


def count_costs(model: nn.Module, stages: Sequence[Stage], example: Any, subnets: Iterable[Subnet]) -> list[CostRow]:
    """Parameters and GMACs of subnets; nothing is timed.

    Args:
        model: any network with these stages.
        stages: from `find_stages`.
        example: a batch, of which the first example is used.
        subnets: which ones.

    >>> import unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(), torch.zeros(1, 3, 224, 224)
    >>> stages = unloaf.find_stages(model, x)
    >>> [row] = count_costs(model, stages, x, [unloaf.Subnet.full(stages)])
    >>> row.params, round(row.gmacs, 2)
    (11689512, 1.81)
    """
    inner, one = inner_module(model), batch_of(example, 1)
    rows = []
    for subnet in subnets:
        check_subnet(stages, subnet)
        with active_subnet(inner, stages, subnet):
            rows.append(CostRow(str(subnet), count_params(inner, stages, subnet), gmacs(inner, one)))
    return rows


def measure_subnets(
    model: nn.Module,
    stages: Sequence[Stage],
    example: Any,
    subnets: Sequence[Subnet],
    *,
    batch_sizes: Sequence[int] = (1, 32),
    repeats: int = 30,
    on_pass: Callable[[], None] | None = None,
) -> list[CostRow]:
    """Parameters, GMACs and measured time of subnets.

    The subnets take turns, in another order in each round, so that whatever else the machine does hits all alike. A
    pass that is timed comes right after one of the same subnet that is not, so that none pays for the caches of
    another. On CUDA the time is that between two events on the stream; elsewhere that of the wall clock.

    Args:
        model: on the device to measure; it is left as it was.
        stages: from `find_stages`.
        example: a batch, of which the first example is repeated; a mapping is passed as keywords.
        subnets: which ones.
        batch_sizes: images in a pass.
        repeats: passes of each subnet and batch size that are timed.
        on_pass: is called after each round.

    Returns:
        One row per subnet, in the order given, with a `Timing` per batch size.

    Raises:
        ValueError: no subnet, a subnet of another model, a batch size or number of repeats below 1.

    >>> import unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(), torch.zeros(1, 3, 32, 32)
    >>> stages = unloaf.find_stages(model, x)
    >>> subnets = unloaf.enumerate_subnets(stages)[:2]
    >>> rows = measure_subnets(model, stages, x, subnets, batch_sizes=(1, 2), repeats=2)
    >>> [(row.subnet, len(row.timings), row.latency > 0) for row in rows]
    [('2-2-2-2', 2, True), ('2-2-2-1', 2, True)]
    """
    sizes = list(dict.fromkeys(batch_sizes))
    if not subnets:
        raise ValueError("there is no subnet to measure; give at least one")
    if not sizes or min(sizes) < 1:
        raise ValueError(f"batch_sizes is {tuple(batch_sizes)}; give one or more numbers of at least 1")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; give at least 1")
    inner = inner_module(model)
    counted = count_costs(inner, stages, example, subnets)
    device = next(inner.parameters(), torch.empty(0)).device
    taken: dict[tuple[int, int], list[float]] = {(i, size): [] for size in sizes for i in range(len(subnets))}
    batches = {size: batch_of(example, size) for size in sizes}
    generator = torch.Generator().manual_seed(0)
    with evaluating(inner):
        for turn in range(-_WARM_UP, repeats):
            for index in torch.randperm(len(subnets), generator=generator).tolist():
                with active_subnet(inner, stages, subnets[index]):
                    for size, batch in batches.items():
                        call_model(inner, batch)
                        milliseconds = _timed(inner, batch, device)
                        if turn >= 0:
                            taken[index, size].append(milliseconds)
            if on_pass is not None:
                on_pass()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [
        CostRow(row.subnet, row.params, row.gmacs, tuple(_timing(size, taken[i, size], name) for size in sizes))
        for i, row in enumerate(counted)
    ]


def measured_rounds(repeats: int) -> int:
    """How often `measure_subnets` calls ``on_pass``: the rounds that warm up are among them.

    >>> measured_rounds(10)
    13
    """
    return repeats + _WARM_UP


def batch_of(example: Any, size: int) -> Any:
    """A batch that repeats the first example.

    >>> batch_of(torch.zeros(2, 3, 8, 8), 4).shape
    torch.Size([4, 3, 8, 8])
    """
    if isinstance(example, Mapping):
        return {name: batch_of(value, size) for name, value in example.items()}
    if not isinstance(example, Tensor):
        return example
    return example[:1].repeat(size, *(1 for _ in example.shape[1:]))


def _timed(model: nn.Module, batch: Any, device: torch.device) -> float:
    """Milliseconds of a pass."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            call_model(model, batch)
            end.record()
            end.synchronize()
            return start.elapsed_time(end)
    _wait_for(device)
    before = time.perf_counter()
    call_model(model, batch)
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


def cost_records(rows: Sequence[CostRow]) -> list[dict[str, Any]]:
    """A flat record of each row, for a CSV or JSON file; columns that no row has are left out.

    >>> cost_records([CostRow("2-1", 10, 0.5, (Timing(1, 2.0, 2.5, 30, "cpu", 1),))])[0]["b1_median_ms"]
    2.0
    """
    return [_record(row, judged=any(r.top1 is not None for r in rows)) for row in rows]


def _record(row: CostRow, *, judged: bool) -> dict[str, Any]:
    figures = asdict(row)
    names = ["subnet", *(["top1", "top5", "loss"] if judged else []), "params", "gmacs"]
    record = {name: figures[name] for name in names}
    for timing in row.timings:
        for name in ("median_ms", "p95_ms", "images_per_second"):
            record[f"b{timing.batch_size}_{name}"] = getattr(timing, name)
    for timing in row.timings[:1]:
        record |= {"repeats": timing.repeats, "device": timing.device, "threads": timing.threads}
    return record


def cost_table(rows: Sequence[CostRow], front: Set[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the rows, for a table of text.

    Args:
        rows: not empty.
        front: names of those that get a star; with it the rows have an accuracy, which is shown.

    >>> cost_table([CostRow("2-1", 1_234, 0.5, top1=91.5)], {"2-1"})
    (['depths', '', 'top-1 %', 'parameters', 'GMACs'], [['2-1', '*', '91.50', '1,234', '0.5']])
    """
    judged, best = front is not None, front or set()
    times = [f"{name}, batch of {t.batch_size}" for t in rows[0].timings for name in ("ms (p95)", "images/s")]
    heads = ["depths", *(["", "top-1 %"] if judged else []), "parameters", "GMACs", *times]
    return heads, [
        [
            row.subnet,
            *(["*" if row.subnet in best else "", f"{row.top1:.2f}"] if judged else []),
            f"{row.params:,}",
            f"{row.gmacs:.4g}",
            *(
                text
                for t in row.timings
                for text in (f"{t.median_ms:.4g} ({t.p95_ms:.4g})", f"{t.images_per_second:,.0f}")
            ),
        ]
        for row in rows
    ]


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
