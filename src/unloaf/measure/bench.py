"""A network measured in each mode; what cannot be measured here is left out with a line that says why."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.compilation import compile_blocks
from unloaf.errors import in_one_line
from unloaf.measure.flops import StepCounter
from unloaf.measure.networks import Network, build_network, smaller_inputs
from unloaf.measure.step_time import Setup, StepTimeRow, compiled_graphs, run_step, step_time_rows
from unloaf.methods import TrainingMethod
from unloaf.methods.step import SubnetTraining
from unloaf.methods.table import METHODS
from unloaf.sampling import InterStageSampler
from unloaf.stages import Stage, find_stages

# What is measured: the methods, and variants whose names begin with the flag of their method.
VARIANTS = (*METHODS, "st-inter-stage", "st++-one-side")
MODES = ("eager", "compiled")


def _method(name: str, model: nn.Module, stages: Sequence[Stage], num_subnets: int, side: int) -> TrainingMethod:
    flag = name if name in METHODS else name.partition("-")[0]
    options: dict[str, Any] = {"num_subnets": num_subnets} if flag in ("st", "st++") else {}
    if name == "st-inter-stage":
        options["sampler"] = InterStageSampler()
    if flag == "st++":
        options["subnet_inputs"] = smaller_inputs(model, side, per="subnet" if name == flag else "step")
    return METHODS[flag].factory(model, stages, **options)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured of each network: see `unloaf.bench.bench_step`."""

    methods: tuple[str, ...]
    modes: tuple[str, ...]
    batch_size: int
    num_subnets: int
    amp: bool
    channels_last: bool
    device: torch.device
    repeats: int


class Clock:
    """Shares out the time, None for no limit: each of so many parts may take an equal share of what is left.

    >>> round(Clock(1, parts=4).share())
    15
    >>> Clock(None, parts=4).share() is None
    True
    """

    def __init__(self, minutes: float | None, *, parts: int) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.parts = parts

    def share(self) -> float | None:
        """Seconds for the next part; 0 when the time is up, None without a limit."""
        self.parts -= 1
        return None if self.end is None else max(0.0, self.end - time.monotonic()) / (self.parts + 1)


@dataclass
class _Measured:
    """A network with its batch and the methods that can train it."""

    model: nn.Module
    stages: tuple[Stage, ...]
    methods: dict[str, TrainingMethod]
    x: Tensor
    y: Tensor
    setup: Setup
    flops: StepCounter


def measure(network: Network, plan: Plan, *, clock: Clock, say: Callable[[str], None]) -> Iterator[list[StepTimeRow]]:
    """The rows of a network, mode by mode; none for a mode that cannot be measured. `say` is told why.

    >>> plan = Plan(methods=("common", "st"), modes=("eager",), batch_size=2, num_subnets=1, amp=False,
    ...             channels_last=False, device=torch.device("cpu"), repeats=1)
    >>> [rows] = measure(Network("cifar/resnet14", 32, 10), plan, clock=Clock(None, parts=1), say=print)
    >>> [row.method for row in rows]
    ['common', 'st']
    """
    ready: _Measured | None = None
    has_eager = False
    for mode in sorted(plan.modes, key=MODES.index):  # blocks are compiled in place: eager comes first
        began, seconds = time.monotonic(), clock.share()
        if seconds == 0:
            say(f"{network.name}, {mode}: not begun, the time is up")
            yield []
            continue
        try:
            ready = ready or _prepare(network, plan, say)
            failure = _compile(ready) if mode == "compiled" else None
            if failure is not None:
                instead = "its eager figures stand for both" if has_eager else "eager figures instead"
                say(f"{network.name}: this machine cannot compile the blocks ({failure}); {instead}")
                ready = None if has_eager else _prepare(network, plan, lambda line: None)
            rows = [] if ready is None else _rows(ready, plan, seconds, began)
        except Exception as error:  # one network must not cost the table of the others
            say(f"{network.name}, {mode}: left out: {in_one_line(error)}")
            ready, rows = None, []
        late = sum(row.late_graphs for row in rows)
        if late:
            say(f"{rows[0].setup.title}: {late} graphs were compiled while the clock ran; give more --minutes")
        has_eager |= bool(rows)
        yield rows
    ready = None
    _free()


def _rows(ready: _Measured, plan: Plan, seconds: float | None, began: float) -> list[StepTimeRow]:
    return step_time_rows(
        ready.methods,
        ready.x,
        ready.y,
        repeats=plan.repeats,
        setup=ready.setup,
        seconds=None if seconds is None else max(1.0, seconds - (time.monotonic() - began)),
        flops=ready.flops,
    )


def _prepare(network: Network, plan: Plan, say: Callable[[str], None]) -> _Measured:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layout = torch.channels_last if plan.channels_last else torch.contiguous_format
    model = build_network(network, varying=any(name.startswith("st++") for name in plan.methods))
    model = model.to(plan.device).to(memory_format=layout).train()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(plan.batch_size, 3, network.side, network.side, generator=generator)
    x = images.to(plan.device, memory_format=layout)
    y = torch.randint(network.classes, (plan.batch_size,), generator=generator).to(plan.device)
    stages = find_stages(model, x[:1])
    setup = Setup(
        network=network.name,
        input_size=network.side,
        batch_size=plan.batch_size,
        device=plan.device.type,
        dtype="bfloat16" if plan.amp else "float32",
        memory_format="channels_last" if plan.channels_last else "contiguous",
    )
    methods: dict[str, TrainingMethod] = {}
    for label in plan.methods:
        try:
            method = _method(label, model, stages, plan.num_subnets, network.side)
            _try(method, x, y, setup)
        except Exception as error:  # one method must not cost the table of the others
            if label == "common":
                raise
            say(f"{network.name}: {label} left out: {in_one_line(error)}")
            _free()
        else:
            methods[label] = method
    return _Measured(model, stages, methods, x, y, setup, StepCounter(model, stages, x, data=False))


def _try(method: TrainingMethod, x: Tensor, y: Tensor, setup: Setup) -> None:
    for separate in [False, True] if isinstance(method, SubnetTraining) else [False]:
        run_step(method, x, y, 0, dtype=setup.dtype, separate=separate)


def _compile(ready: _Measured) -> str | None:
    """Compiles the blocks; a line if the machine cannot."""
    torch._dynamo.utils.counters.clear()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="blocks of class .* run without torch.compile")
            compile_blocks(ready.model, ready.stages)
            run_step(ready.methods["common"], ready.x, ready.y, 0, dtype=ready.setup.dtype)
    except Exception as error:  # of the compiler: there is no end to their kinds
        return in_one_line(error)
    if not compiled_graphs():
        return "no graph came of it"
    ready.setup = replace(ready.setup, compiled=True)
    return None


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
