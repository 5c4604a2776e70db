"""Where a run computes: device, precision, how the processes of a run share a model and what they tell each other.

Batch-norm policy with several processes: each keeps the running statistics of its own images, because statistics never
influence training; whenever the network is evaluated or saved, the mean over processes (or the first one's) is used.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, KwargsHandler, broadcast_object_list, gather_object
from timm.layers import convert_sync_batchnorm
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from unloaf.batchnorm import tracking_norms
from unloaf.config import Config
from unloaf.config.checks import check_device
from unloaf.stages import inner_module


def usable_device(name: str) -> torch.device:
    """The device of this name, "auto" or one of torch's; one with a number becomes torch's current one.

    Raises:
        ValueError: there is no such device here.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    check_device(name)
    there = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return there or torch.device("cpu")
    asked = torch.device(name)
    if asked.type == "cpu":
        return asked
    if there is None or there.type != asked.type:
        kind = f"the accelerator is {there.type}" if there else "there is no accelerator"
        raise ValueError(
            f"device {name}: {kind} as torch {torch.__version__} sees this machine; give --device "
            f"{there.type if there else 'cpu'}, or leave it out"
        )
    count = torch.accelerator.device_count()
    if asked.index is not None:
        if asked.index >= count:
            raise ValueError(f"device {name}: there are {count} here, {there.type}:0 to {there.type}:{count - 1}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"device {name}: of several processes each takes its own; give --device {asked.type}")
        torch.accelerator.set_device_index(asked.index)
    return asked


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library
_TWO_GIB = 2**31 - 1

# Where things lie may differ between machines; only the first process writes.
_OF_ONE_MACHINE = {"data_dir", "initial_checkpoint", "name", "output"}


def find_devices(config: Config, *, folder: Path | None = None) -> Accelerator:
    """The device of this process and its place among the processes of the run, whose trackers write into the folder.

    Raises:
        ValueError: the machine cannot do what is asked for.
    """
    if config.deterministic:
        _choose_repeatable_kernels()
    precision = {"bfloat16": "bf16", "float16": "fp16"}[config.amp_dtype] if config.amp else "no"
    kinds: list[KwargsHandler] = [DistributedDataParallelKwargs(
        # Statistics are this process's own; every parameter of the main network gets a gradient in each step, but for
        # stochastic depth, which drops blocks from the only pass there is.
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=config.method == "stochastic-depth",
    )]  # fmt: skip
    # accelerate leaves a tracker out silently when its package is missing.
    missing = set(config.trackers) - {str(tracker.value) for tracker in get_available_trackers()}
    if missing:
        raise ValueError(f"trackers {', '.join(sorted(missing))}: not installed; pip install it, or leave it out")
    with _accelerate_takes(config.device):
        accelerator = _accelerator(config, precision, kinds, folder)
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu and precision == "fp16":
        raise ValueError("amp_dtype float16: needs an accelerator; on a CPU give --amp-dtype bfloat16")
    if on_cpu and config.sync_bn:
        raise ValueError("sync_bn: torch synchronises batch norm on accelerators only; leave it out")
    if config.fsdp and accelerator.num_processes == 1:
        raise ValueError("fsdp: one process has no other to share the weights with; start several with torchrun")
    if on_cpu:
        keep_freed_memory()
    settings = {name: value for name, value in asdict(config).items() if name not in _OF_ONE_MACHINE}
    check_same_on_all(accelerator, settings)
    return accelerator


def check_same_on_all(accelerator: Accelerator, values: Mapping[str, Any]) -> None:
    """Raises ValueError, on every process, unless all of them have the same values by these names.

    Processes that make other numbers of steps or save at other times would wait for each other forever.
    """
    if accelerator.num_processes == 1:
        return
    first, *others = gather_object([dict(values)])
    for number, other in enumerate(others, start=1):
        different = [f"{name} {first[name]} (there {other[name]})" for name in first if first[name] != other[name]]
        if different:
            raise ValueError(
                f"process 0 was started with other settings or images than process {number}: {', '.join(different)}; "
                "start all with the same command line on the same images"
            )


def _accelerator(config: Config, precision: str, kinds: list[KwargsHandler], folder: Path | None) -> Accelerator:
    try:
        accelerator = Accelerator(
            cpu=config.device == "cpu" or not torch.accelerator.is_available(),  # else several processes fail there
            mixed_precision=precision,
            kwargs_handlers=kinds,
            log_with=list(config.trackers) or None,
            project_dir=folder,
        )
    except (ValueError, ImportError) as error:
        # accelerate keeps one precision for the whole process.
        other = "already been initialized" in str(error)
        advice = "train in a process of its own" if other else "leave out --amp or --trackers, or choose others"
        raise ValueError(f"amp {config.amp}, trackers {config.trackers}: {error}; {advice}") from error
    if ":" in config.device and str(accelerator.device) != config.device:
        raise ValueError(
            f"device {config.device}: this process computes on {accelerator.device} already; train in one of its own"
        )
    return accelerator


@contextmanager
def _accelerate_takes(name: str) -> Iterator[None]:
    """Inside, accelerate, which is set up once in a process, takes the device of this name."""
    numbered = name not in ("auto", "cpu") and usable_device(name).index is not None
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if numbered:
        os.environ["ACCELERATE_TORCH_DEVICE"] = name
    try:
        yield
    finally:
        if numbered:
            del os.environ["ACCELERATE_TORCH_DEVICE"]
            if before is not None:
                os.environ["ACCELERATE_TORCH_DEVICE"] = before


def _choose_repeatable_kernels() -> None:
    """What torch.use_deterministic_algorithms, which follows with the seed, leaves to its caller."""
    # torch refuses matrix products without it; cuBLAS reads it when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False  # would choose kernels by their time


def share_model(accelerator: Accelerator, config: Config, model: nn.Module) -> nn.Module:
    """The model, placed on the device and wrapped for several processes."""
    model = model.to(accelerator.device)
    if config.sync_bn and accelerator.num_processes > 1:
        model = convert_sync_batchnorm(model)  # timm's: torch's drops the activation inside timm's norms
    if config.fsdp:
        if config.eval_subnets and tracking_norms(model):
            raise ValueError(
                f"eval_subnets {config.eval_subnets}: estimates batch-norm statistics on a whole copy of the network, "
                f"which fsdp shards; leave it out, and evaluate with `unloaf eval RUN --subnets {config.eval_subnets}`"
            )
        # As one group: replayed passes would gather the weights of blocks that do not run.
        fully_shard(model)
        return model
    forward = model.__dict__.get("forward")
    with warnings.catch_warnings():
        # torch 2.15 renames the option; accelerate 1.15 does not know the new name yet.
        warnings.filterwarnings("ignore", message=".broadcast_buffers. is deprecated", category=FutureWarning)
        wrapped = accelerator.prepare_model(model)
    # accelerate wraps `forward` for mixed precision; the loop enters autocast itself, once for all passes of a step,
    # so that weights are cast once, and evaluation stays in full precision.
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    model.__dict__.pop("forward", None)
    if forward is not None:
        model.__dict__["forward"] = forward
    return wrapped


def share_optimizer(accelerator: Accelerator, optimizer: Optimizer) -> Any:
    """The optimizer, which with float16 leaves steps out whose gradients overflow."""
    return accelerator.prepare_optimizer(optimizer)


@contextmanager
def adding_gradients(accelerator: Accelerator, config: Config, model: nn.Module, *, last: bool) -> Iterator[None]:
    """Gradients are exchanged between the processes in the last of the batches of a step only."""
    if last:
        yield
    elif config.fsdp:
        sharded: Any = model
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)
    else:
        with accelerator.no_sync(model):
            yield


def total(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum over the processes, for each of them."""
    if accelerator.num_processes == 1:
        return values
    summed: Any = accelerator.reduce(values, reduction="sum")
    return summed


def on_all(accelerator: Accelerator, value: Any) -> Any:
    """What the first process says, on every process."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


@contextmanager
def shared_statistics(accelerator: Accelerator, config: Config, *models: nn.Module) -> Iterator[None]:
    """Inside, batch norms hold the statistics to evaluate and save a network with; afterwards their own again."""
    if accelerator.num_processes == 1:
        yield
        return
    norms = [norm for model in models for norm in tracking_norms(inner_module(model))]
    own = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        for model in models:
            distribute_bn(inner_module(model), accelerator.num_processes, reduce=config.dist_bn == "reduce")
        yield
    finally:
        with torch.no_grad():
            for buffer, before in own:
                buffer.copy_(before)


def gather_statistics(accelerator: Accelerator, model: nn.Module) -> Tensor | None:
    """The batch-norm statistics of every process, (processes, numbers); None with one process, whose model has them."""
    buffers = _statistics(model)
    if accelerator.num_processes == 1 or not buffers:
        return None
    flat = torch.cat([buffer.flatten().double() for buffer in buffers])
    gathered: Any = accelerator.gather(flat[None])
    return gathered.cpu()


def put_statistics(accelerator: Accelerator, model: nn.Module, gathered: Tensor | None) -> None:
    """Gives this process its batch-norm statistics back."""
    buffers = _statistics(model)
    if gathered is None or len(gathered) != accelerator.num_processes:
        return
    mine = gathered[accelerator.process_index]
    with torch.no_grad():
        for buffer, values in zip(buffers, mine.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))


def _statistics(model: nn.Module) -> list[Tensor]:
    return [buffer for norm in tracking_norms(inner_module(model)) for buffer in norm.buffers(recurse=False)]


def keep_freed_memory() -> bool:
    """Let the GNU C library hand freed memory out again instead of returning it to the system; whether that was done.

    Training allocates the same large tensors in every step; by default many are mapped again, and the first touch of a
    page is a fault. A step with six subnets of a ResNet-50 (64 px, batch 16, 2 cores) had 32,000 to 42,000 faults, 0.1
    s of system time in 0.9 s; with this it has 3.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, _TWO_GIB) for name in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))
