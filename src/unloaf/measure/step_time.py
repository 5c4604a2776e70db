"""What a training step costs, measured: time and memory beside the least FLOPs of the very same draws."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from unloaf.batchnorm import Statistics
from unloaf.inputs import batch_size, side_of
from unloaf.measure.flops import StepFlops
from unloaf.measure.quick_flops import QuickCounter
from unloaf.measure.step_memory import peak_bytes
from unloaf.methods import CommonTraining, TrainingMethod
from unloaf.methods.step import SubnetTraining
from unloaf.passes import call_for_logits
from unloaf.stages import inner_module
from unloaf.subnet import active_subnet


@dataclass(frozen=True)
class Setup:
    """On what, and in which mode, steps are measured.

    Attributes:
        network: its name.
        input_size: side of the images, in pixels.
        batch_size: images per step.
        device: "cpu" or "cuda".
        dtype: "float32", or "bfloat16" through autocast.
        compiled: whether the blocks are compiled; then every step that is timed was run once before.
        memory_format: "contiguous" or "channels_last".

    >>> Setup(network="cifar/resnet56", input_size=32, batch_size=256).title
    'cifar/resnet56, 32 px, batch 256, cpu, float32, eager'
    """

    network: str = ""
    input_size: int = 0
    batch_size: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    compiled: bool = False
    memory_format: str = "contiguous"

    @property
    def title(self) -> str:
        """All of it in a line."""
        words = [self.network, f"{self.input_size} px", f"batch {self.batch_size}", self.device, self.dtype]
        words += ["channels-last"] * (self.memory_format == "channels_last")
        return ", ".join([*words, "compiled" if self.compiled else "eager"])


@dataclass(frozen=True)
class StepTimeRow:
    """Cost of a method's step; "relative" is always to a step of common training right before, in the same mode.

    Attributes:
        method: its label.
        seconds: median time of a step.
        relative: median over the rounds of the relative time.
        spread: lowest and highest relative time.
        limit: mean relative FLOPs with exact prefix sharing, the least possible.
        over_limit: median over the rounds of relative time / relative FLOPs.
        separate: median relative time with a complete pass for each subnet; None for methods of one pass.
        separate_limit: mean relative FLOPs of separate passes.
        peak_bytes: peak memory of a step: tensors saved for the backward pass, parameters apart (CPU), or the peak of
            the allocator (CUDA).
        relative_memory: of the peak.
        rounds: how many were timed.
        graphs: of the compiled network, for all methods, by the first timed round.
        late_graphs: compiled in the timed rounds of this method; above 0 its figures are of no use.
        setup: on what, in which mode.
    """

    method: str
    seconds: float
    relative: float
    spread: tuple[float, float]
    limit: float
    over_limit: float
    separate: float | None
    separate_limit: float
    peak_bytes: int
    relative_memory: float
    rounds: int = 1
    graphs: int = 0
    late_graphs: int = 0
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
    flops: QuickCounter | None = None,
) -> list[StepTimeRow]:
    """Measure a step of each method, interleaved in one process, and of the same step with separate passes.

    On CUDA the time is that between two events on the stream; elsewhere that of the wall clock.

    Args:
        methods: label to method; "common" must be among them.
        x: a batch, on the device to measure.
        y: its targets.
        repeats: rounds over all methods; each draws anew.
        warmup: rounds before that are not counted; of compiled blocks all rounds are run once before.
        setup: goes into the rows; its ``dtype`` and ``compiled`` say how to measure.
        seconds: begin no round after so long, but for the first; default: no limit.
        flops: counts the network's FLOPs; default: one made of the first method's model.

    Raises:
        ValueError: no common training among the methods, or fewer than one repeat.
    """
    if not isinstance(methods.get(_COMMON), CommonTraining):
        raise ValueError(f"methods are {sorted(methods)}; 'common' must be among them, all else is relative to it")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; give at least 1")
    if flops is None:
        flops = flop_counter(methods, x)
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


def flop_counter(methods: Mapping[str, TrainingMethod], x: Any) -> QuickCounter:
    """A counter for the network of these methods: exact at every side, since none is interpolated.

    Args:
        methods: of one network, not compiled yet.
        x: a batch.

    >>> import unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(), torch.randn(1, 3, 32, 32)
    >>> methods = {"st": unloaf.StimulativeTraining(model, unloaf.find_stages(model, x))}
    >>> flop_counter(methods, x).mean(methods["st"], x, [0]).common > 0
    True
    """
    method = next((method for method in methods.values() if method.stages), next(iter(methods.values())))
    try:
        # Counting needs no arithmetic: without data it takes a fraction of the time.
        empty = copy.deepcopy(inner_module(method.model)).to("meta")
        return QuickCounter(empty, method.stages, _on_meta(x), readout=method.readout)
    except Exception:  # whatever a model raises that looks at values, or makes tensors of its own
        return QuickCounter(method.model, method.stages, x, readout=method.readout)


def _on_meta(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {name: _on_meta(value) for name, value in x.items()}
    return x.to("meta") if isinstance(x, Tensor) else x


@dataclass
class _Bench:
    methods: Mapping[str, TrainingMethod]
    x: Any
    y: Any
    setup: Setup
    flops: QuickCounter

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
        method, device = self.methods[label], _device_of(self.x)
        method.model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            with torch.cuda.device(device):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
                run_step(method, self.x, self.y, step, dtype=self.setup.dtype, separate=separate)
                end.record()
                end.synchronize()
                return start.elapsed_time(end) / 1000
        before = time.perf_counter()
        run_step(method, self.x, self.y, step, dtype=self.setup.dtype, separate=separate)
        return time.perf_counter() - before

    def rows(self) -> list[StepTimeRow]:
        peaks = {label: self._peak(method) for label, method in self.methods.items()}
        return [self._row(label, peaks) for label in self.methods]

    def _peak(self, method: TrainingMethod) -> int:
        def step(index: int) -> None:
            run_step(method, self.x, self.y, index, dtype=self.setup.dtype)

        return peak_bytes(method.model, step, device=_device_of(self.x))

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

    Args:
        method: any.
        x: a batch.
        y: its targets.
        step: decides what is drawn.
        dtype: "float32", or "bfloat16" through autocast.
        separate: see `separate_backward`.

    >>> import unloaf
    >>> model = torch.nn.Linear(4, 2)
    >>> run_step(unloaf.CommonTraining(model), torch.ones(3, 4), torch.tensor([0, 1, 1]), 0)
    >>> model.weight.grad.shape
    torch.Size([2, 4])
    """
    method.model.zero_grad(set_to_none=True)
    method.step = step
    # Once around all passes, as in the training loop: weights are cast once in a step.
    with torch.autocast(_device_of(x).type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        if separate:
            assert isinstance(method, SubnetTraining)
            separate_backward(method, x, y)
        else:
            method.backward(x, y)


def separate_backward(method: SubnetTraining, x: Any, y: Any) -> None:
    """The same step with a complete forward and backward pass for each subnet: what sharing is measured against."""
    passes, losses = method.draw(batch_size(x), side_of(x)), method.losses(y)
    model = inner_module(method.model)
    logits = call_for_logits(method.model, x, readout=method.readout)
    _backward(losses.main(logits))
    teacher = logits.detach()
    known: list[Tensor | None] = [None] * len(passes)
    for index, request in enumerate(passes):
        with active_subnet(model, method.stages, request.subnet), Statistics(model).frozen():
            student = call_for_logits(model, request.view.of(x), readout=method.readout)
        known[index] = student.detach()
        _backward(method.weighted_term(losses, index, student, teacher, known))
    method.step += 1


def _backward(loss: Tensor) -> None:
    # A backward takes the types of its forward; torch advises against autocast around it.
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()


def _device_of(x: Any) -> torch.device:
    if isinstance(x, Mapping):
        return _device_of(next(iter(x.values())))
    return x.device


def compiled_graphs() -> int:
    """Graphs that torch.compile made in this process since it was last reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def by_setup(rows: Sequence[StepTimeRow]) -> dict[Setup, list[StepTimeRow]]:
    """The rows of each setup, in the order in which they were measured."""
    groups: dict[Setup, list[StepTimeRow]] = {}
    for row in rows:
        groups.setdefault(row.setup, []).append(row)
    return groups
