"""`unloaf check-data`: all that is wrong with an image set, in one go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from unloaf.commands.parsing import parse
from unloaf.config import Config
from unloaf.config.choices import Dataset
from unloaf.streams import say

if TYPE_CHECKING:
    from unloaf.data import CheckReport


@dataclass(frozen=True, kw_only=True)
class CheckData:
    """Open every image of an image set, and every mask, count them, and list those that cannot be read."""

    dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """Folder of the image set."""
    dataset: Dataset = "imagefolder"
    """What lies in the folder, as for train."""
    train_split: str = "train"
    """Folder, split or shard prefix of the training images."""
    val_split: str | None = None
    """The same for validation; default: val, validation or test, whichever there is."""
    input_key: str = "image"
    """Column of the images, for hf."""
    target_key: str = "label"
    """Column of the labels, for hf."""
    task: Literal["multilabel", "regression"] | None = None
    """csv: what the columns are, labels of 0 and 1 or numbers."""
    masks: bool = False
    """coco: check the objects' masks too, which task instance needs."""
    keypoints: bool = False
    """coco: check people and their joints instead, which task pose needs."""
    panoptic: bool = False
    """coco: check panoptic_SPLIT.json and its PNGs, which task panoptic needs."""
    num_classes: int | None = None
    """Classes that the labels must have; default: what the image set says."""
    max_pixels: int = Config.max_pixels
    """Files: width x height above which an image is not decoded but bad."""
    workers: Annotated[int, tyro.conf.arg(aliases=["-j"])] = 4
    """Threads that open images."""

    def config(self) -> Config:
        """The part of a run's configuration that decides how images are read; nothing is held out."""
        if self.dataset == "text":
            raise ValueError(
                "dataset text has no images to open; `unloaf train --task language` reads all texts before its first "
                "step"
            )
        given = {
            name: value
            for name, value in vars(self).items()
            if name not in ("dir", "masks", "keypoints", "panoptic", "task")
        }
        if self.keypoints and (self.masks or self.panoptic or self.dataset != "coco"):
            raise ValueError("--keypoints is for --dataset coco, without --masks and --panoptic; leave one of them out")
        if self.keypoints:
            given |= {"task": "pose", "method": "common", "model": "simple-baseline", "hflip": 0.0}
        elif self.panoptic:
            if self.dataset != "coco" or self.masks:
                raise ValueError("--panoptic is for --dataset coco, without --masks; leave one of them out")
            # What does not fit is listed image by image, not refused at the first.
            given |= {"task": "panoptic", "method": "common", "model": "panoptic-fpn", "bad_images": "skip"}
        elif self.dataset in ("coco", "voc"):
            task = "instance" if self.masks else "detection"
            given |= {"task": task, "method": "common", "model": "mask-rcnn" if self.masks else "fcos"}
        elif self.dataset == "masks":
            given |= {"task": "semantic", "method": "common", "model": "semantic-fpn"}
        elif self.dataset == "csv":
            given["task"] = self.task or "multilabel"
        if self.task is not None and self.dataset != "csv":
            raise ValueError(f"--task is for --dataset csv, not {self.dataset}; leave it out")
        if self.masks and self.dataset not in ("coco", "voc"):
            raise ValueError(f"--masks is for --dataset coco, not {self.dataset}; leave it out")
        return Config(**given, data_dir=self.dir, val_fraction=0.0)


def run(words: list[str]) -> int:
    """Prints what is there and what is wrong.

    Raises:
        ValueError: something is wrong.
    """
    config = parse(CheckData, words, prog="unloaf check-data").config()
    from unloaf.data import check_images

    report = check_images(config)
    for split, counts in report.counts.items():
        if sum(counts.values()):
            objects = None if report.objects is None else report.objects[split]
            kinds = _classes(counts) if objects is None else _objects(objects, report.what)
            say(f"{split}: {sum(counts.values())} {report.entries}, {kinds}")
    for note in report.notes:
        say(f"note: {note}")
    if report.modes:
        say("modes: " + ", ".join(f"{mode} {count}" for mode, count in report.modes.items()))
    if len(report.faults) == 1 and not report.bad:
        raise ValueError(report.faults[0])
    for fault in report.faults:
        say(f"wrong: {fault}")
    for name, reason in report.bad:
        say(f"bad: {name}: {reason}")
    if report.faults or report.bad:
        raise ValueError(_verdict(report))
    say("all images can be read")
    return 0


def _verdict(report: CheckReport) -> str:
    total = sum(sum(counts.values()) for counts in report.counts.values())
    unread = f"{len(report.bad)} of {total} images cannot be read"
    if not report.faults:
        skip = ", or train with --bad-images skip" if 100 * len(report.bad) <= total else ""  # which bears 1 %
        return f"{unread}; replace or remove them{skip}"
    count = "1 fault" if len(report.faults) == 1 else f"{len(report.faults)} faults"
    parts = [f"{count} of the image set", *[unread] * bool(report.bad)]
    return f"{' and '.join(parts)}, listed above; fix them and check again"


def _objects(counts: dict[str, int], what: str) -> str:
    if what == "columns":
        return f"{len(counts)} columns: {', '.join(counts)}"
    classes = "joints" if what == "marked joints" else "classes"
    return f"{sum(counts.values())} {what}, {_classes(counts, what, classes)}"


def _classes(counts: dict[str, int], what: str = "images", classes: str = "classes") -> str:
    if len(counts) <= 20:
        return f"{len(counts)} {classes}: " + ", ".join(f"{name} {count}" for name, count in counts.items())
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    return f"{len(counts)} {classes} of {counts[fewest]} ({fewest}) to {counts[most]} ({most}) {what}"
