"""A run on CIFAR-100 that is killed and resumed three times, against the same run left alone.

    python benchmarks/resume.py --data-dir DIR [--output DIR] [--epochs N]

DIR holds the files of CIFAR-100 as torchvision stores them. The runs are `unloaf train` in processes of their own,
killed by SIGKILL at random steps; what is compared is summary.csv but for its times, and the final weights to the bit.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.numpy import load_file


def command(options: argparse.Namespace, name: str) -> list[str]:
    """The training that both runs are."""
    settings = {
        "dataset": "cifar100", "data-dir": options.data_dir, "model": "cifar/resnet14", "width": 8, "method": "st",
        "epochs": options.epochs, "batch-size": 128, "device": "cpu", "workers": 1, "checkpoint-interval": 25,
        "log-interval": 5, "eval-subnets": 3, "output": options.output, "name": name, "resume": "auto",
    }  # fmt: skip
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "unloaf", "train", *flags, "--model-ema"]


def last_step(run: Path) -> int:
    """The last step that a run has told of; 0 before the first."""
    try:
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (FileNotFoundError, json.JSONDecodeError):
        return 0
    return max((event["step"] for event in events if event["event"] == "step"), default=0)


def kill_at(step: int, words: list[str], run: Path) -> None:
    """Starts or resumes a run and kills it once it has passed this step."""
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while last_step(run) < step:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before step {step}")
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(f"killed after step {last_step(run)}", flush=True)


def digest(run: Path) -> str:
    """SHA-256 of the final weights and their moving average, names included."""
    total = hashlib.sha256()
    for file in ("model.safetensors", "model_ema.safetensors"):
        for name, tensor in sorted(load_file(run / "last" / file).items()):
            total.update(name.encode() + tensor.tobytes())
    return total.hexdigest()


def rows(run: Path) -> list[dict[str, str]]:
    """summary.csv without its times."""
    with (run / "summary.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "time"} for row in csv.DictReader(file)]


def main() -> None:
    """Runs both and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--output", default="output/resume")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which the run is killed")
    options = parser.parse_args()
    alone, killed = Path(options.output) / "alone", Path(options.output) / "killed"
    subprocess.run(command(options, "alone"), check=True)
    steps = random.Random(options.seed).sample(range(10, last_step(alone) - 5), 3)
    for step in sorted(steps):
        kill_at(step, command(options, "killed"), killed)
    subprocess.run(command(options, "killed"), check=True)
    for row in rows(killed):
        print(row)
    same_rows, same_weights = rows(alone) == rows(killed), digest(alone) == digest(killed)
    print(f"summary.csv identical but for times: {same_rows}; final weights identical: {same_weights}")
    sys.exit(not (same_rows and same_weights))


if __name__ == "__main__":
    main()
