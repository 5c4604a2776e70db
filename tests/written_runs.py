"""Run folders written by hand, without a training."""

import json
from pathlib import Path
from typing import Any

from unloaf.config import Config, dump_config

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\nrm \u202eevil $x$ עברית"


def write_run(
    path: Path,
    *,
    tops: Any = (50.0, 60.0),
    seconds: float = 10.0,
    subnets: Any = (),
    finished: bool = True,
    data: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A run whose epochs have these top-1 accuracies on the validation images and took so many seconds each.

    Args:
        path: its folder.
        tops: a value for each epoch; None where none was made.
        seconds: of an epoch.
        subnets: for each epoch a mapping of subnets to accuracies.
        finished: whether it has a result, of the last accuracy.
        data: entries of data.json.
        environment: entries of env.json.
        settings: of the configuration.
    """
    path.mkdir(parents=True)
    config = Config(**{"model": "cifar/resnet20", "epochs": len(tops), **settings})
    (path / "args.yaml").write_text(dump_config(config))
    env = {"command": ["unloaf", "train"], "hardware": "a CPU", "processes": 1, "versions": {"unloaf": "1.0"}}
    (path / "env.json").write_text(json.dumps(env | (environment or {})))
    splits = {name: {"images": 9, "sha256": name} for name in ("train", "val", "test")}
    record = {"dataset": "digits", "num_classes": 10, "class_names": None, "splits": splits}
    (path / "data.json").write_text(json.dumps(record | (data or {})))
    lines, events = ["epoch,time,train_loss,eval_top1,lr"], []
    for epoch, top in enumerate(tops, 1):
        lines.append(f"{epoch},{seconds},{2 / epoch},{'' if top is None else top},0.1")
        terms = {"main": 1.0 / epoch, "subnet": 0.25}
        events.append({"event": "step", "epoch": epoch, "step": epoch, "terms": terms})
    events += [{"event": "subnets", "epoch": epoch, "top1": found} for epoch, found in enumerate(subnets, 1)]
    events += [{"event": "result", "test_top1": tops[-1]}] if finished else []
    (path / "summary.csv").write_text("\n".join(lines) + "\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return path
