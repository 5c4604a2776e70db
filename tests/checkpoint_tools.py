"""What the checkpoint tests share: a small run, and a forger who knows the format."""

import csv
import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unloaf.engine.checkpoint import load_checkpoint, save_checkpoint

STATE = {
    "optimizer": {
        "state": {0: {"momentum_buffer": torch.arange(6.0).reshape(2, 3)}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}],
    },
    "position": {"epoch": 2, "batch": 5},
}
WEIGHTS = {"model": {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.ones(2)}}


def outcome(run: Path) -> dict[str, Any]:
    """All that a finished run leaves, without times."""
    last, best = load_checkpoint(run / "last"), load_checkpoint(run / "model_best")
    state = {key: value for key, value in last.state.items() if key != "files"}  # sizes: the times are in the files
    state["position"] = {key: value for key, value in state["position"].items() if key != "seconds"}
    rows = list(csv.DictReader((run / "summary.csv").read_text().splitlines()))
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for entry in [*rows, *events]:
        entry.pop("time", None)
    return {
        "step": last.step, "weights": last.weights, "state": state, "summary": rows, "metrics": events,
        "best step": best.step, "best weights": best.weights,
    }  # fmt: skip


def save_tiny(run: Path, step: int = 7) -> Path:
    return save_checkpoint(run / "checkpoints", step, weights=WEIGHTS, state=STATE, metadata={"model": "tiny"})


def reseal(folder: Path) -> None:
    """Makes the manifest agree with the files, as one who has tampered with them would."""
    fields = json.loads((folder / "manifest.json").read_bytes())
    for name in fields["files"]:
        data = (folder / name).read_bytes()
        fields["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(folder, fields)


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> None:
    def text(entries: Mapping[str, Any]) -> bytes:
        return (json.dumps(entries, indent=1, sort_keys=True) + "\n").encode()

    rest = {name: value for name, value in fields.items() if name != "manifest_sha256"}
    sealed = {**rest, "manifest_sha256": hashlib.sha256(text(rest)).hexdigest()}
    (folder / "manifest.json").write_bytes(text(sealed))


def as_format_1(folder: Path) -> Path:
    """Rewrites a checkpoint as unloaf 0.1 wrote it: the state as a pickle of torch.save."""
    torch.save(load_checkpoint(folder).state, folder / "state.pt")
    for name in ("state.json", "state.safetensors"):
        (folder / name).unlink()
    fields = json.loads((folder / "manifest.json").read_bytes())
    files = {path.name: {} for path in folder.iterdir() if path.name != "manifest.json"}
    write_manifest(folder, fields | {"format_version": 1, "files": files})
    reseal(folder)
    return folder


def forge_state(folder: Path, pickled: bytes, storages: Mapping[str, bytes] | None = None, **options: int) -> None:
    """Replaces the state.pt of format 1 by a zip with this pickle; `options` are those of ZipFile."""
    with zipfile.ZipFile(folder / "state.pt", "w", **options) as archive:
        archive.writestr("state/data.pkl", pickled)
        archive.writestr("state/byteorder", "little")
        for key, data in (storages or {}).items():
            archive.writestr(f"state/data/{key}", data)
        archive.writestr("state/version", "3\n")
    reseal(folder)


def same(one: Any, other: Any) -> bool:
    """Equal in structure, type and every bit (for tensors without NaN)."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    return one == other
