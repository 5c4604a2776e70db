"""Linear probe of an encoder and its subnets after masked training: common, ST* and ST, digits, several seeds.

    python benchmarks/masked_probe.py --seeds 3 --output docs/results/masked-digits.json

A linear classifier reads the frozen features of main network and ordered subnets. Epochs are equal; ST and ST* take
more time an epoch, which the record has. A row of random weights says what the probe reads without any training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from unloaf.config import Config
from unloaf.engine.loop import fit, prepare
from unloaf.environment import environment
from unloaf.evaluation import choose_subnets
from unloaf.files.writing import write_whole
from unloaf.runs.probe import probe

NETWORK = (
    "hidden_size=48", "num_hidden_layers=6", "num_attention_heads=4", "intermediate_size=96", "patch_size=2",
    "decoder_hidden_size=32", "decoder_num_hidden_layers=1", "decoder_num_attention_heads=4",
    "decoder_intermediate_size=64",
)  # fmt: skip
METHODS = ("random weights", "common", "st-star", "st")


def trained(method: str, seed: int, epochs: int) -> dict[str, Any]:
    """Top-1 of the probe by depths, test images, and seconds of training."""
    config = Config(
        task="masked", dataset="digits", model="hf/ViTMAEForPreTraining", model_kwargs=NETWORK, seed=seed,
        method="common" if method == "random weights" else method, epochs=epochs, batch_size=64, opt="adamw", lr=2e-3,
        weight_decay=0.05, warmup_epochs=min(5, epochs - 1), eval_interval=epochs, device="cpu",
    )  # fmt: skip
    start = time.perf_counter()
    training = prepare(config) if method == "random weights" else fit(config)
    seconds = time.perf_counter() - start
    figures = training.evaluate("test").main
    rows = probe(training, choose_subnets(training.stages))
    found = {str(row.subnet): round(row.top1["test"], 2) for row in rows}
    return {
        "method": method,
        "seed": seed,
        "explained": round(figures.explained, 2),
        "seconds": round(seconds, 1),
        "top1": found,
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, by method and depths."""
    table: dict[str, Any] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        table[method] = {
            depths: [round(statistics.mean(values), 2), round(statistics.stdev(values), 2) if len(values) > 1 else 0.0]
            for depths in mine[0]["top1"]
            if (values := [run["top1"][depths] for run in mine])
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    runs = []
    for seed in range(options.seeds):
        for method in METHODS:
            runs.append(trained(method, seed, options.epochs))
            print(json.dumps(runs[-1]), flush=True)
    where = environment()
    kept = {name: where[name] for name in ("command", "hardware", "threads", "python", "versions")}
    record = {"epochs": options.epochs, "network": NETWORK, "environment": kept, "summary": summary(runs), "runs": runs}
    print(json.dumps(record["summary"], indent=1))
    if options.output is not None:
        write_whole(options.output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
