"""How many images a second a training run takes in, the data path included: common training on CIFAR-100.

    python benchmarks/throughput.py --output DIR [--data-dir DIR] [--batch-size N ...] [--epochs N] [--smoke]

This is `unloaf train` with the flags printed. Without --data-dir the images are noise of CIFAR-100's shape and number:
the pixels do not change how long a step takes. The first epoch compiles and is left out; the median of the others
counts, reading, augmentation and the optimizer included.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unloaf.commands.train import parse_train
from unloaf.data import Data
from unloaf.data.images import ImageSet
from unloaf.engine.run import train
from unloaf.environment import environment

MODEL = "cifar/resnet18"


def noise(images: int, *, classes: int = 100) -> Data:
    """A set of CIFAR-100's shape."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    everything = ImageSet(pixels, torch.arange(images) % classes)
    none, few = everything.subset(torch.arange(0)), everything.subset(torch.arange(min(images, 1000)))
    return Data(name="cifar100", num_classes=classes, class_names=tuple(map(str, range(classes))), train=everything,
                val=none, test=few, mean=(127.5,) * 3, std=(73.9,) * 3, augment="pad-crop", pad=4, hflip=0.5,
                img_size=32, train_img_size=32)  # fmt: skip


def measure(options: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """One run."""
    words = shlex.split(
        f"--dataset cifar100 --model {MODEL} --method common --device-data --channels-last --val-fraction 0 "
        f"--epochs {options.epochs} --eval-interval {options.epochs} -b {batch_size} --log-interval 1000"
    )
    words += ["--data-dir", options.data_dir or "noise", "--output", str(options.output)]
    words += ["--name", f"batch-{batch_size}", "--resume", "auto"]
    words += ["--device", "cpu"] if options.smoke else ["--amp", "--torchcompile"]
    print(shlex.join(["unloaf", "train", *words]), flush=True)
    config, asked = parse_train(words)
    data = None if options.data_dir else noise(options.images)
    result = train(config, console=Console(), resume=asked.resume, data=data)
    with (result.path / "summary.csv").open(encoding="utf-8", newline="") as file:
        seconds = [float(row["time"]) for row in csv.DictReader(file)]
    counted = 50_000 if options.data_dir else options.images
    images = counted // batch_size * batch_size  # those left over are not visited
    rate = images / statistics.median(seconds[1:])
    print(f"batch {batch_size}: {rate:,.0f} images/s, epochs of {', '.join(f'{s:.2f}' for s in seconds)} s", flush=True)
    return {"batch_size": batch_size, "images_per_second": rate, "seconds": seconds, "command": words}


def main() -> None:
    """Measures, prints, writes throughput.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=50_000, help="of the generated set")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU")
    options = parser.parse_args()
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("no CUDA device here; --smoke runs it tiny on the CPU")
    if options.smoke:
        options.batch_size, options.epochs, options.images, options.data_dir = [50], 2, 200, None
    options.output.mkdir(parents=True, exist_ok=True)
    runs = []
    for batch_size in options.batch_size:
        runs.append(measure(options, batch_size))
        document = {
            "model": MODEL,
            "images": "CIFAR-100" if options.data_dir else "noise of CIFAR-100's shape",
            "environment": environment(),
            "runs": runs,
        }
        (options.output / "throughput.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
