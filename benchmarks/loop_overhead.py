"""What a training loop costs beside the method's own step, on a network with a step of about 5 ms.

    python benchmarks/loop_overhead.py [--rounds N]

Three things take turns in one process, on one core: the bare step (gradients of the method, optimizer) on one batch
that lies ready; the engine's step on it; an epoch of the engine, images included. Medians over rounds, relative to the
bare step.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch

from unloaf.engine.config import Config
from unloaf.engine.loop import one_thread, train_step
from unloaf.engine.training import Training, prepare

STEPS = 14


def seconds_per_step(run: Callable[[], None]) -> float:
    """Time of a call that makes STEPS steps, for one of them."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / STEPS


def contestants(training: Training) -> dict[str, Callable[[], None]]:
    """What is compared; each call makes STEPS steps."""
    ready = next(training.batches.epoch(1))
    optimizer = training.optimizer.optimizer

    def bare() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            training.method.backward(*ready[0])
            optimizer.step()

    def steps() -> None:
        for _ in range(STEPS):
            train_step(training, ready)

    def epoch() -> None:
        for batches in training.batches.epoch(1):
            train_step(training, batches)

    return {"bare step": bare, "engine's step": steps, "engine's epoch": epoch}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--method", default="common")
    options = parser.parse_args()
    config = Config(
        model="cifar/resnet14",
        width=4,
        batch_size=64,
        epochs=10**6,
        val_fraction=0,
        method=options.method,
        device="cpu",
    )
    with one_thread():
        training = prepare(config)
        training.model.train()
        runs = contestants(training)
        assert training.steps_per_epoch == STEPS
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            # In another order each time: what ran before leaves its mark on caches and clock.
            for name in random.sample(list(runs), len(runs)):
                seconds[name].append(seconds_per_step(runs[name]))
    bare = statistics.median(seconds["bare step"])
    print(f"torch {torch.__version__}, {options.rounds} rounds, bare step {1e3 * bare:.2f} ms")
    for name, times in seconds.items():
        ratios = [mine / common for mine, common in zip(times, seconds["bare step"], strict=True)]
        print(f"{name}: {statistics.median(ratios):.3f} times the bare step")


if __name__ == "__main__":
    main()
