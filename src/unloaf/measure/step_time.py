"""What a training step costs, measured: time and memory beside the least FLOPs of the very same draws."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from unloaf.inputs import batch_size, first_tensor, side_of
from unloaf.measure.costs import milliseconds
from unloaf.measure.flops import StepCounter, StepFlops
from unloaf.measure.step_memory import peak_bytes
from unloaf.methods import CommonTraining, TrainingMethod
from unloaf.methods.step import SubnetTraining
from unloaf.passes import separate_backward


@dataclass(frozen=True)
class Setup:
    """On what, and in which mode, steps are measured.

    >>> Setup(network="cifar/resnet56", input_size=32, batch_size=256).title
    'cifar/resnet56, 32 px, batch 256, cpu, float32, eager'
    """

    network: str = ""
    input_size: int = 0  # side of the images, in pixels
    batch_size: int = 0
    device: str = "cpu"  # or "cuda"
    dtype: str = "float32"  # or "bfloat16", through autocast
    compiled: bool = False  # the blocks; then every step that is timed was run once before
    memory_format: str = "contiguous"  # or "channels_last"

    @property
    def title(self) -> str:
        """All of it in a line."""
        words = [self.network, f"{self.input_size} px", f"batch {self.batch_size}", self.device, self.dtype]
        words += ["channels-last"] * (self.memory_format == "channels_last")
        return ", ".join([*words, "compiled" if self.compiled else "eager"])


@dataclass(frozen=True)
class StepTimeRow:
    """Cost of a method's step; "relative" is always to a step of common training right before, in the same mode."""

    method: str
    seconds: float  # median time of a step
    relative: float  # median over the rounds of the relative time
    spread: tuple[float, float]  # lowest and highest relative time
    limit: float  # mean relative FLOPs with exact prefix sharing, the least possible
    over_limit: float  # median over the rounds of relative time / relative FLOPs
    separate: float | None  # median relative time with a complete pass for each subnet; None for methods of one pass
    separate_limit: float  # mean relative FLOPs of separate passes
    peak_bytes: int  # of a step, see `unloaf.measure.step_memory`
    relative_memory: float  # of the peak
    rounds: int = 1  # that were timed
    graphs: int = 0  # of the compiled network, for all methods, by the first timed round
    late_graphs: int = 0  # compiled in the timed rounds of this method; above 0 its figures are of no use
    setup: Setup = field(default_factory=Setup)

    def record(self) -> dict[str, Any]:
        """A flat record for JSON or CSV: first the setup, then the figures."""
        figures = {name: value for name, value in asdict(self).items() if name != "setup"}
        return asdict(self.setup) | figures


def step_time_rows(
    methods: Mapping[str, TrainingMethod],
    x: Any,
    y: Any,
    *,
    repeats: int = 10,
    warmup: int = 2,
    setup: Setup | None = None,
    seconds: float | None = None,
    flops: StepCounter | None = None,
) -> list[StepTimeRow]:
    """Measure a step of each method, interleaved in one process, and of the same step with separate passes.

    Args:
        methods: label to method; "common" must be among them.
        x: a batch, on the device to measure.
        y: its targets.
        repeats: rounds over all methods; each draws again.
        warmup: rounds before that are not counted; of compiled blocks all rounds are run once before.
        setup: goes into the rows; its ``dtype`` and ``compiled`` say how to measure.
        seconds: begin no round after so long, but for the first; default: no limit.
        flops: of the network before its blocks were compiled; default: one made of a method's model.

    Raises:
        ValueError: no common training among the methods, or fewer than one repeat.
    """
    if not isinstance(methods.get(_COMMON), CommonTraining):
        raise ValueError(f"methods are {sorted(methods)}; 'common' must be among them, all else is relative to it")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; give at least 1")
    if flops is None:
        one = next((method for method in methods.values() if method.stages), methods[_COMMON])
        flops = StepCounter(one.model, one.stages, x, readout=one.readout, data=False)
    bench = _Bench(methods, x, y, setup or Setup(), flops)
    began = time.monotonic()
    # A compiled network meets every shape before the clock runs; half of the time may go into that.
    rounds = repeats if bench.setup.compiled else warmup
    warmed = bench.run(rounds, until=None if seconds is None else began + seconds / 2, timed=False)
    bench.graphs = compiled_graphs()
    bench.run(
        min(repeats, warmed) if bench.setup.compiled else repeats,
        until=None if seconds is None else began + seconds,
        timed=True,
    )
    return bench.rows()


_COMMON = "common"


@dataclass
class _Bench:
    methods: Mapping[str, TrainingMethod]
    x: Any
    y: Any
    setup: Setup
    flops: StepCounter

    def __post_init__(self) -> None:
        self.pairs: dict[tuple[str, bool], list[tuple[float, float]]] = {}
        self.graphs = 0
        self.late = dict.fromkeys(self.methods, 0)

    def run(self, rounds: int, *, until: float | None, timed: bool) -> int:
        """Rounds over all methods; returns how many there were."""
        for step in range(rounds):
            if step and until is not None and time.monotonic() > until:
                return step
            for label, method in self.methods.items():
                before = compiled_graphs()
                for separate in [False, True] if isinstance(method, SubnetTraining) else [False]:
                    # A step of common training right before each: what else the machine does slows both alike.
                    common = self._seconds(_COMMON, step)
                    taken = common if label == _COMMON else self._seconds(label, step, separate=separate)
                    if timed:
                        self.pairs.setdefault((label, separate), []).append((taken, common))
                self.late[label] += (compiled_graphs() - before) * timed
        return rounds

    def _seconds(self, label: str, step: int, *, separate: bool = False) -> float:
        method, device = self.methods[label], first_tensor(self.x).device
        method.model.zero_grad(set_to_none=True)
        x, y, dtype = self.x, self.y, self.setup.dtype
        return milliseconds(lambda: run_step(method, x, y, step, dtype=dtype, separate=separate), device) / 1000

    def rows(self) -> list[StepTimeRow]:
        peaks = {label: self._peak(method) for label, method in self.methods.items()}
        return [self._row(label, peaks) for label in self.methods]

    def _peak(self, method: TrainingMethod) -> int:
        def step(index: int) -> None:
            run_step(method, self.x, self.y, index, dtype=self.setup.dtype)

        return peak_bytes(method.model, step, device=first_tensor(self.x).device)

    def _counted(self, label: str, step: int) -> StepFlops:
        method = self.methods[label]
        return self.flops(method.draw(batch_size(self.x), side_of(self.x), step=step), main=method.trains_main)

    def _row(self, label: str, peaks: Mapping[str, int]) -> StepTimeRow:
        mine = self.pairs[label, False]
        relative = [taken / common for taken, common in mine]
        flops = [self._counted(label, step) for step in range(len(mine))]
        limits = [f.shared / f.common for f in flops]
        separate = [taken / common for taken, common in self.pairs.get((label, True), ())]
        return StepTimeRow(
            method=label,
            seconds=statistics.median(taken for taken, _ in mine),
            relative=statistics.median(relative),
            spread=(min(relative), max(relative)),
            limit=statistics.fmean(limits),
            over_limit=statistics.median(r / limit for r, limit in zip(relative, limits, strict=True)),
            separate=statistics.median(separate) if separate else None,
            separate_limit=statistics.fmean(f.separate / f.common for f in flops),
            peak_bytes=peaks[label],
            relative_memory=peaks[label] / peaks[_COMMON],
            rounds=len(mine),
            graphs=self.graphs,
            late_graphs=self.late[label],
            setup=self.setup,
        )


def run_step(
    method: TrainingMethod, x: Any, y: Any, step: int, *, dtype: str = "float32", separate: bool = False
) -> None:
    """Gradients of a step of this number, shared or with separate passes, as the training loop has them made.

    >>> import unloaf
    >>> model = torch.nn.Linear(4, 2)
    >>> run_step(unloaf.CommonTraining(model), torch.ones(3, 4), torch.tensor([0, 1, 1]), 0)
    >>> model.weight.grad.shape
    torch.Size([2, 4])
    """
    method.model.zero_grad(set_to_none=True)
    method.step = step
    # Once around all passes, as in the training loop: weights are cast once in a step.
    with torch.autocast(first_tensor(x).device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        if separate:
            method.step_in(separate_backward, x, y)
        else:
            method.backward(x, y)


def compiled_graphs() -> int:
    """Graphs that torch.compile made in this process since it was last reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def by_setup(rows: Sequence[StepTimeRow]) -> dict[Setup, list[StepTimeRow]]:
    """The rows of each setup, in the order in which they were measured."""
    groups: dict[Setup, list[StepTimeRow]] = {}
    for row in rows:
        groups.setdefault(row.setup, []).append(row)
    return groups
