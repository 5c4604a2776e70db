"""Every recipe trains: two optimizer steps on generated images in the layout of the real ones."""

import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets.cifar
from accelerate.state import AcceleratorState
from PIL import Image
from rich.console import Console

import annotated_files
import panoptic_files
import people_files
from unloaf.config import Config
from unloaf.config.figures import FIGURES
from unloaf.engine.run import train
from unloaf.recipes import recipe, recipe_names

# One of each method, a recipe with every augmentation of ST++, and one with mixup, cutmix and repeated augmentation.
QUICK = {
    *(f"cifar10_resnet20_{method}" for method in ("common", "stochastic_depth", "st", "stpp", "gkt")),
    *("cifar100_mobilenetv3_st", "imagenet_resnet50_a2", "imagenet_vit_st", "coco_adamw_fcos_st_star"),
}


def write_cifar(folder: Path, *, name: str, train_images: int, test_images: int) -> None:
    """Pickles as torchvision reads them; classes come in turn."""
    rng = np.random.default_rng(0)
    classes, key, base = (10, "labels", "batches") if name == "cifar10" else (100, "fine_labels", "meta")
    parts = {"train": train_images, "test": test_images}
    if name == "cifar10":
        parts = {f"data_batch_{part}": train_images // 5 for part in range(1, 6)} | {"test_batch": test_images}
    root = folder / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    root.mkdir(parents=True)
    for part, count in parts.items():
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [index % classes for index in range(count)]
        (root / part).write_bytes(pickle.dumps({"data": pixels, key: labels}))
    names = {"label_names" if name == "cifar10" else "fine_label_names": [str(number) for number in range(classes)]}
    (root / ("batches.meta" if base == "batches" else "meta")).write_bytes(pickle.dumps(names))


def write_folders(folder: Path, *, train_images: int, val_images: int) -> None:
    """Three class folders of JPEGs in train and in val, somewhat larger than a crop."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train_images), ("val", val_images)):
        for index in range(count):
            path = folder / split / f"n0000000{index % 3}" / f"{index}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (72, 80, 3), dtype=np.uint8)).save(path)


@pytest.fixture(autouse=True)
def _precision_of_its_own() -> Iterator[None]:
    """A process has one precision for accelerate, recipes have two."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    for name in ("cifar10", "cifar100"):
        write_cifar(root / name, name=name, train_images=10, test_images=4)
    write_folders(root / "imagefolder", train_images=9, val_images=3)
    annotated_files.coco(root / "coco", train=9, val=2)
    people_files.people(root / "people", train=6, val=2)
    panoptic_files.panoptic(root / "panoptic", train=9, val=2)
    return {name: str(root / name) for name in ("cifar10", "cifar100", "imagefolder", "coco", "people", "panoptic")}


def shortened(config: Config, *, output: Path) -> Config:
    """The recipe on smaller images, for one epoch of two optimizer steps of four images."""
    small = {} if config.img_size is None else {"img_size": 64}
    if config.train_img_size is not None:
        small["train_img_size"] = 56
    # Two steps at the full learning rate, without the rest of the schedule, can throw the weights out of range.
    batch = {} if config.dataset == "digits" else {"batch_size": 4, "global_batch_size": 4, "lr": config.lr / 100}
    if config.dataset == "coco":
        # The published weights are not there without the internet.
        batch |= {"pretrained": False, "decay_milestones": (1,)}
    return replace(config, epochs=1, warmup_epochs=0, device="cpu", output=str(output), name="run", **small, **batch)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in recipe_names()]
)
def test_recipe_trains(name, data_dirs, tmp_path, monkeypatch):
    # The generated files have other checksums than the published ones.
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    config = recipe(name)
    place = {"pose": "people", "panoptic": "panoptic"}.get(config.task, config.dataset)
    config = recipe(name, data_dir=data_dirs.get(place))
    result = train(shortened(config, output=tmp_path), console=Console(quiet=True))
    assert math.isfinite(FIGURES[config.task].decide(result.test))
    assert list(result.path.rglob("*.safetensors"))
