"""What a training step costs on many devices: a model with its assumptions, and what two gloo ranks measure.

    python benchmarks/scaling.py model
    python benchmarks/scaling.py measure --output docs/results

The model counts FLOPs with `unloaf.measure.flops.method_flops` on the meta device; everything about the hardware is an
assumption, kept in `HARDWARE`. Nothing of the model was measured on an accelerator.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmarks.throughput import noise

from unloaf.config import Config
from unloaf.engine.loop import prepare, train_epoch
from unloaf.environment import environment
from unloaf.measure.flops import method_flops
from unloaf.models.build import build_model
from unloaf.stages import find_stages
from unloaf.tasks.methods import build_method

DEVICES = (1, 8, 64, 256, 1024)
IMAGENET = 1_281_167


@dataclass(frozen=True)
class Hardware:
    """Assumptions, not measurements."""

    flops: float  # that a device sustains in training, FLOP/s
    inside: float  # bus bandwidth of an all-reduce among the devices of one node, bytes/s
    between: float  # the same across nodes, where the network cards of a node limit the ring, bytes/s
    per_node: int = 8  # devices
    latency: float = 20e-6  # of an all-reduce over n devices, seconds times log2(n)


# 7 and 15 % of an H100's dense bf16 peak of 989e12: what training of small images, not kernels, is assumed to reach.
HARDWARE = {
    "convolutions": Hardware(flops=70e12, inside=300e9, between=80e9),
    "transformer": Hardware(flops=150e12, inside=300e9, between=80e9),
}


@dataclass(frozen=True)
class StepCost:
    """A step on so many devices, each with the same number of images."""

    devices: int
    global_batch: int
    compute: float  # seconds of arithmetic
    reduce: float  # seconds of the all-reduce, were nothing of it hidden behind the backward
    exposed: float  # seconds of it that remain when it runs beside the last backward, which is the main network's
    efficiency: tuple[float, float]  # images/s per device relative to one device, with that overlap, and without any
    epoch: float  # hours for 1,281,167 images, with the overlap


def all_reduce_bytes(parameters: int, devices: int, *, bytes_each: int = 4) -> float:
    """What each device sends in one optimizer step, whatever the number of subnets: 2 (n - 1) / n of the gradients.

    >>> all_reduce_bytes(25_000_000, 2)
    100000000.0
    """
    return 2 * (devices - 1) / devices * parameters * bytes_each


def step_cost(
    flops: float, common: float, parameters: int, *, batch: int, devices: int, hardware: Hardware, bytes_each: int = 4
) -> StepCost:
    """The model of docs/scaling.md; two thirds of the FLOPs of common training are a backward that hides communication.

    FLOPs are those of one image in a step, the batch is of one device; 4 bytes are those of a gradient in float32.
    """
    compute = batch * flops / hardware.flops
    bandwidth = hardware.inside if devices <= hardware.per_node else hardware.between
    reduce = all_reduce_bytes(parameters, devices, bytes_each=bytes_each) / bandwidth
    reduce += hardware.latency * math.log2(devices)
    # The last bucket leaves when the backward is over: a tenth of the exchange is never hidden.
    hidden = min(0.9 * reduce, batch * common * 2 / 3 / hardware.flops)
    exposed = reduce - hidden
    seconds = compute + exposed
    return StepCost(
        devices=devices,
        global_batch=devices * batch,
        compute=compute,
        reduce=reduce,
        exposed=exposed,
        efficiency=(compute / seconds, compute / (compute + reduce)),
        epoch=IMAGENET / (devices * batch) * seconds / 3600,
    )


# Name, model, side of the training images, images per device, kind of arithmetic, settings of the method.
CASES: tuple[tuple[str, str, int, int, str, dict[str, Any]], ...] = (
    ("ResNet-50, common", "timm/resnet50", 200, 64, "convolutions", {"method": "common"}),
    ("ResNet-50, ST++", "timm/resnet50", 200, 64, "convolutions", {"method": "st++"}),
    ("ResNet-50, ST++, one side per step", "timm/resnet50", 200, 64, "convolutions", {"method": "st++", "per": "step"}),
    ("ResNet-50, GKT", "timm/resnet50", 200, 64, "convolutions", {"method": "gkt"}),
    ("ViT-S, common", "timm/vit_small_patch16_224", 224, 128, "transformer", {"method": "common"}),
    ("ViT-S, ST", "timm/vit_small_patch16_224", 224, 128, "transformer", {"method": "st"}),
)


def model_table(*, draws: int = 100) -> list[dict[str, Any]]:
    """FLOPs of each case, and its cost on each number of devices."""
    rows = []
    for name, model_name, side, batch, kind, settings in CASES:
        model = build_model(model_name, num_classes=1000, in_chans=3, img_size=side if side == 224 else None)
        stages = find_stages(model, torch.zeros(1, 3, side, side))
        model.to("meta")
        method = build_method(Config(model=model_name, **settings), model, stages)
        flops = method_flops(method, torch.empty(1, 3, side, side, device="meta"), range(draws))
        parameters = sum(p.numel() for p in model.parameters())
        costs = [
            step_cost(flops.shared, flops.common, parameters, batch=batch, devices=devices, hardware=HARDWARE[kind])
            for devices in DEVICES
        ]
        rows.append({
            "case": name, "side": side, "batch_per_device": batch, "parameters": parameters,
            "gflops_per_image": flops.shared / 1e9, "relative_flops": flops.shared / flops.common,
            "costs": [asdict(cost) for cost in costs],
        })  # fmt: skip
    return rows


METHODS = ("common", "st", "st++", "gkt")
MEASURED = Config(model="cifar/resnet20", epochs=1, batch_size=32, lr=0.01, min_ratio=0.75, device="cpu")


def counting_hook(sent: list[int]) -> Callable[[Any, Any], Any]:
    """A communication hook of DistributedDataParallel that takes the mean and notes the bytes of each exchange."""

    # No annotations: torch compares them with its own classes, and here they would be texts.
    def hook(group, bucket):
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    return hook


def measured_steps(method: str, *, steps: int, warm: int) -> Iterator[tuple[float, int]]:
    """Seconds and all-reduced bytes of each step after the first ones."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    data = replace(noise((steps + warm) * world * MEASURED.batch_size, classes=10), augment="none", pad=0, hflip=0.0)
    training = prepare(replace(MEASURED, method=method), data=data)
    sent: list[int] = []
    if world > 1:
        wrapped: Any = training.model
        wrapped.register_comm_hook(None, counting_hook(sent))
    moments, counts = [time.perf_counter()], []

    def note(row: Any) -> None:
        moments.append(time.perf_counter())
        counts.append(sum(sent))
        sent.clear()

    train_epoch(training, on_step=note)
    seconds = [after - before for before, after in itertools.pairwise(moments)]
    return zip(seconds[warm:], counts[warm:], strict=True)


def _rank(rank: int, world: int, port: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    values = {method: list(measured_steps(method, steps=steps, warm=3)) for method in METHODS}
    if rank == 0:
        Path(folder, "values.json").write_text(json.dumps(values))
    if world > 1:
        dist.destroy_process_group()


def measure(*, steps: int) -> dict[str, Any]:
    """Each method on one process and on two, with the same number of images for each process."""
    rows: dict[str, Any] = {}
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            mp.spawn(_rank, args=(world, port, folder, steps), nprocs=world)
            for method, values in json.loads(Path(folder, "values.json").read_text()).items():
                seconds, sent = zip(*values, strict=True)
                quartiles = statistics.quantiles(seconds, n=4)
                rows.setdefault(method, {})[f"{world} processes"] = {
                    "seconds": quartiles[1], "quartiles": [quartiles[0], quartiles[2]], "fastest": min(seconds),
                    "bytes_reduced": sorted(set(sent)),
                }  # fmt: skip
    model = build_model(MEASURED.model, num_classes=10, in_chans=3)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "settings": {"model": MEASURED.model, "side": 32, "batch_per_process": MEASURED.batch_size, "steps": steps},
        "environment": environment(),
        "parameter_bytes": size,
        "rows": rows,
    }


def main() -> None:
    """Prints the table that is asked for, and writes it as JSON when a folder is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["model", "measure"])
    parser.add_argument("--steps", type=int, default=30, help="measured steps per method")
    parser.add_argument("--output", type=Path, help="folder for scaling-WHAT.json")
    options = parser.parse_args()
    if options.what == "model":
        rows = model_table()
        result: dict[str, Any] = {"assumptions": {k: asdict(v) for k, v in HARDWARE.items()}, "rows": rows}
        for row in rows:
            print(f"{row['case']}: {row['gflops_per_image']:.1f} GFLOPs/image, {row['relative_flops']:.2f} x common")
            for cost in row["costs"]:
                print(
                    f"  {cost['devices']:5d} devices, global batch {cost['global_batch']:7d}: "
                    f"compute {1e3 * cost['compute']:6.1f} ms, all-reduce {1e3 * cost['reduce']:5.2f} ms, "
                    f"exposed {1e3 * cost['exposed']:5.2f} ms, efficiency {cost['efficiency'][0]:.3f} "
                    f"({cost['efficiency'][1]:.3f} without overlap), epoch {60 * cost['epoch']:.2f} min"
                )
    else:
        result = measure(steps=options.steps)
        print(json.dumps(result, indent=2))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"scaling-{options.what}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
