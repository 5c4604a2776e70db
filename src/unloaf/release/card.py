"""The model card: what a network is, how good it is, what it costs, how it was trained and how it is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from unloaf.config import Config
from unloaf.config.figures import FIGURES, Figures
from unloaf.data.consistency import some
from unloaf.runs.opened import OpenedRun

_PACKAGES = ("unloaf", "torch", "timm", "torchvision")
# Of the model hub, by task.
_TAGS = {
    "classification": "image-classification",
    "multilabel": "image-classification",
    "regression": "image-feature-extraction",
    "masked": "image-feature-extraction",
    "detection": "object-detection",
    "instance": "image-segmentation",
    "semantic": "image-segmentation",
    "pose": "keypoint-detection",
    "language": "text-generation",
    "panoptic": "image-segmentation",
}
_ALWAYS = ("dataset", "model", "method", "epochs", "batch_size", "lr", "weight_decay", "seed")
# Where a run ran and what it wrote, or the machine's own paths.
_ELSEWHERE = {
    "bad_images", "checkpoint_hist", "checkpoint_interval", "data_dir", "device", "device_data", "eval_interval",
    "backbone_weights", "eval_subnets", "initial_checkpoint", "log_interval", "name", "on_nan", "output", "recalibrate",
    "trackers", "workers",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NetworkFacts:
    """A line of the card's table."""

    subnet: str  # its depths, "3-4-6-3"
    metrics: Mapping[str, Any]  # the task's figures by split, measured on the network that is described
    params: int  # parameters
    gmacs: float  # billions of multiply-adds for one image


def model_card(
    opened: OpenedRun,
    title: str,
    summary: Sequence[str],
    networks: Sequence[NetworkFacts],
    loading: str,
    *,
    notes: Sequence[str] = (),
    library: str | None = None,
) -> str:
    """The text of README.md, with the front matter that model hubs read."""
    config = opened.config
    front = ["---", "tags:", f"- {_TAGS[config.task]}", "- unloaf", *([f"library_name: {library}"] if library else [])]
    lines = [*front, "---", f"# {title}", "", *summary, ""]
    lines += ["## Accuracy and cost", "", *_table(networks, FIGURES[config.task]), ""]
    lines += [*notes, ""] if notes else []
    lines += ["## How to load it", "", "```python", loading, "```", "", *_use(opened), ""]
    lines += ["## How it was trained", "", *_settings(config), ""]
    lines += ["## Versions", "", ", ".join(f"{name} {found}" for name, found in versions().items()) + ".", ""]
    return "\n".join(lines)


def _use(opened: OpenedRun) -> list[str]:
    """What goes in, and what comes out."""
    own, names = opened.training.task.usage(opened.training.data), some(opened.class_names, 50)
    if own and not opened.class_names:
        return [*own]
    if own:
        return [*own, "", f"Classes, in the order of their numbers: {names}."]
    outputs = f"The {len(opened.class_names)} outputs stand for these classes, in this order: {names}."
    return [*_preprocessing(opened.preprocessing), "", outputs]


def versions() -> dict[str, str]:
    """Of the packages that made the files, as far as they are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _table(networks: Sequence[NetworkFacts], figures: Figures) -> list[str]:
    splits, shown = (
        list(networks[0].metrics),
        [f for f in figures.columns if f.name != "loss" or figures.of_rows == "loss"],
    )
    measured = [f"{split} {figure.label}" for split in splits for figure in shown]
    head = ["subnet", *measured, "parameters", "GMACs"]
    rows = [
        [
            row.subnet,
            *(figure.form.format(getattr(row.metrics[split], figure.name)) for split in splits for figure in shown),
            f"{row.params:,}",
            f"{row.gmacs:.4g}",
        ]
        for row in networks
    ]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _preprocessing(values: Mapping[str, Any]) -> list[str]:
    channels, height, width = values["input_size"]

    def numbers(key: str) -> str:
        return ", ".join(f"{value:.4f}" for value in values[key])

    text = (
        f"Images have {channels} channels of {height} x {width} pixels in [0, 1], less the mean ({numbers('mean')}), "
        f"divided by the standard deviation ({numbers('std')})"
    )
    how = f"{values['interpolation']} interpolation"
    if "crop_mode" not in values:
        return [f"{text}; {how}."]
    side = int(height / values["crop_pct"])
    before = (
        f"Before, an image is turned upright as its EXIF says and resized so that its shorter side has {side} pixels "
        f"({how}), and the centre is cut out."
    )
    return [f"{text}.", before]


def _settings(config: Config) -> list[str]:
    default = Config()
    rows = [
        (field.name, getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in _ELSEWHERE
        and (field.name != "width" or config.model.startswith("cifar/"))
        and (field.name in _ALWAYS or getattr(config, field.name) != getattr(default, field.name))
    ]
    start = ", not from random weights but from others (`initial_checkpoint`)" if config.initial_checkpoint else ""
    text = f"Trained by unloaf{start}. Settings that are not listed have their default values."
    return [text, "", "| setting | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
