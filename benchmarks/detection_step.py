"""What a step of ST* costs on Faster R-CNN beside common training and separate passes.

    python benchmarks/detection_step.py [--side 256] [--batch-size 2] [--rounds 5] [--backbone timm/resnet50]

The contestants take turns in one process on one core, on one batch of random images with eight boxes each; medians
over rounds, relative to common training. FLOPs are those that torch's counter sees in the very step, forward and
backward: of the shared step they are the least possible, each block once. Writes docs/results/detection-step.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import unloaf
from unloaf.engine.loop import one_thread
from unloaf.environment import environment
from unloaf.inputs import SmallerInputs
from unloaf.measure.flops import counting_flops
from unloaf.models.detectors import build_detector
from unloaf.passes import separate_backward
from unloaf.tasks.detection import SmallerImages, losses

RECORD = Path(__file__).resolve().parents[1] / "docs" / "results" / "detection-step.json"
Batch = tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]
# One share of the side for each draw, spread over the law from 0.43 to 1.
SHARES = (0.43, 0.57, 0.71, 0.86, 1.0)


def random_batch(size: int, side: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, side, side, generator=generator) for _ in range(size)]
    targets = []
    for _ in images:
        corners = torch.rand(8, 2, generator=generator) * side * 0.7
        sides = (0.05 + 0.25 * torch.rand(8, 2, generator=generator)) * side
        labels = torch.randint(1, 81, (8,), generator=generator)
        targets.append({"boxes": torch.cat([corners, corners + sides], 1), "labels": labels})
    return images, targets


def contestants(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    settings = {"backbone": options.backbone, "num_classes": 80, "img_size": options.side, "longest": options.side}
    normal = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    model, _ = build_detector("faster-rcnn", **settings, **normal)
    stages = unloaf.find_stages(model, [torch.zeros(3, 64, 64)], within="backbone.body")
    batch = random_batch(options.batch_size, options.side)
    model.train()
    common = unloaf.GroundTruthTraining(model, stages, losses, subnet_weight=0.0)
    same = unloaf.GroundTruthTraining(model, stages, losses)
    smaller = [
        unloaf.GroundTruthTraining(
            model, stages, losses, shrink=SmallerImages(SmallerInputs(sides=(int(share * options.side),)), options.side)
        )
        for share in SHARES
    ]
    # One after the other a block less at the end of each stage: what inter-stage sampling skips on average.
    full = [len(stage.blocks) for stage in stages]
    subnets = [
        unloaf.Subnet.from_depths(stages, [d - (i == at) for i, d in enumerate(full)]) for at in range(len(full))
    ]

    def run(
        method: unloaf.GroundTruthTraining, drawn_in_turn: list[list[unloaf.Subnet]], *, separate: bool = False
    ) -> Callable[[], Any]:
        def step() -> None:
            for drawn in drawn_in_turn:
                for parameter in model.parameters():
                    parameter.grad = None
                if separate:
                    method.step_in(separate_backward, *batch, drawn)
                else:
                    method.backward(*batch, subnets=drawn)

        return step

    def all_shares(*, separate: bool = False) -> Callable[[], Any]:
        each = [[subnets[at % len(subnets)]] for at in range(len(smaller))]
        steps = [run(method, [drawn], separate=separate) for method, drawn in zip(smaller, each, strict=True)]
        return lambda: [step() for step in steps]

    return {
        "common": run(common, [[]]),
        "same, shared": run(same, [[subnet] for subnet in subnets]),
        "same, separate": run(same, [[subnet] for subnet in subnets], separate=True),
        "smaller, shared": all_shares(),
        "smaller, separate": all_shares(separate=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbone", default="timm/resnet50")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    with one_thread():
        compared = contestants(options)
        steps = {name: 1 if name == "common" else 5 if "smaller" in name else 4 for name in compared}
        flops = {}
        for name, step in compared.items():
            with counting_flops() as counter:
                step()
            flops[name] = counter.get_total_flops() / steps[name]
        taken: dict[str, list[float]] = {name: [] for name in compared}
        for _ in range(options.rounds):
            for name, step in compared.items():
                start = time.perf_counter()
                step()
                taken[name].append((time.perf_counter() - start) / steps[name])
    median = {name: statistics.median(values) for name, values in taken.items()}
    document = {
        "settings": {"model": "faster-rcnn", **{k: v for k, v in vars(options).items() if k != "record"}},
        "seconds": {name: round(value, 3) for name, value in median.items()},
        "time": {name: round(value / median["common"], 3) for name, value in median.items()},
        "flops": {name: round(value / flops["common"], 3) for name, value in flops.items()},
        "environment": {k: v for k, v in environment().items() if k in ("hardware", "versions", "python")},
    }
    options.record.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
