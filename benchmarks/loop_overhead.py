"""What a training loop costs beside the method's own step, on a network with a step of about 5 ms.

    python benchmarks/loop_overhead.py [--rounds N] [--device cuda --model cifar/resnet20 --batch-size 64]

Three things take turns in one process, on a CPU on one core: the bare step (gradients of the method, optimizer) on one
batch that lies ready; the engine's step on it; an epoch of the engine, images included. Medians over rounds, relative
to the bare step. On CUDA the steps follow each other without waiting, as in training, and the clock stops when the
device is done.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unloaf.config import Config
from unloaf.engine.loop import one_thread, train_step
from unloaf.engine.setup import Training, prepare
from unloaf.environment import environment


def seconds_per_step(run: Callable[[], None], *, steps: int) -> float:
    """Time of a call that makes so many steps, for one of them."""
    wait: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return (time.perf_counter() - start) / steps


def contestants(training: Training) -> dict[str, Callable[[], None]]:
    """What is compared; each call makes as many steps as an epoch has."""
    steps = training.steps_per_epoch
    ready = next(training.batches.epoch(1))
    optimizer = training.optimizer.optimizer

    def bare() -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            training.method.backward(*ready[0])
            optimizer.step()

    def stepped() -> None:
        for _ in range(steps):
            train_step(training, ready)

    def epoch() -> None:
        for batches in training.batches.epoch(1):
            train_step(training, batches)

    return {"bare step": bare, "engine's step": stepped, "engine's epoch": epoch}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--method", default="common")
    parser.add_argument("--model", default="cifar/resnet14")
    parser.add_argument("--width", type=int, default=4, help="of a cifar/ network; others have their own")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--device-data", action="store_true", help="images lie on the device")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none here")
    config = Config(
        model=options.model,
        width=options.width,
        batch_size=options.batch_size,
        epochs=10**6,
        val_fraction=0,
        method=options.method,
        device="cpu" if options.device == "cpu" else "auto",
        device_data=options.device_data,
    )
    with one_thread():
        training = prepare(config)
        training.model.train()
        runs = contestants(training)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            # In another order each time: what ran before leaves its mark on caches and clock.
            for name in random.sample(list(runs), len(runs)):
                seconds[name].append(seconds_per_step(runs[name], steps=training.steps_per_epoch))
    bare = statistics.median(seconds["bare step"])
    print(f"torch {torch.__version__}, {options.rounds} rounds, bare step {1e3 * bare:.2f} ms")
    medians = {}
    for name, times in seconds.items():
        ratios = [mine / common for mine, common in zip(times, seconds["bare step"], strict=True)]
        medians[name] = statistics.median(ratios)
        print(f"{name}: {medians[name]:.3f} times the bare step")
    if options.output is not None:
        asked = ("model", "width", "batch_size", "method", "device_data", "rounds")
        figures: dict[str, Any] = {name: getattr(options, name) for name in asked}
        figures |= {"bare_ms": 1e3 * bare, "ratios": medians, "environment": environment()}
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
