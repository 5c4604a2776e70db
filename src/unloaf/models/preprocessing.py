"""How images become inputs where a run starts from weights: as those weights expect it, and recorded in the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unloaf.config import Config
from unloaf.data.sets import FILE_SETS, IMAGENET_MEAN, IMAGENET_STD, Data
from unloaf.models.build import resolve_name
from unloaf.models.weight_files import find_weights, texts_of
from unloaf.own_code import is_own

# In the header of a checkpoint's weights, so that a run that starts from them feeds its images likewise.
HEADER = "unloaf_preprocessing"
_GREY = ("digits", "fashion_mnist")
_PILLOW = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which transformers writes


@dataclass(frozen=True)
class _Expected:
    """What weights expect: mean and std in shares of the pixel range; None where nothing is said."""

    source: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str = "center"


def with_preprocessing(config: Config) -> tuple[Config, str]:
    """The settings of a run that begins, with mean, std, interpolation and crop filled in, and where they are from.

    What is given stays. Otherwise weights that the run starts from decide: what lies beside them, or what timm,
    torchvision or the folder of transformers say of the model. A network that starts from random weights has
    ImageNet's mean and std for files, and for a set in memory none here: those of its training images.

    Raises:
        ValueError: as many values are given as the images have no channels, or what lies beside the weights is no
            description.

    >>> with_preprocessing(Config(dataset="imagefolder", data_dir="images"))[0].mean
    (0.485, 0.456, 0.406)
    """
    expected, files = _expected_by(config), config.dataset in (*FILE_SETS, "csv")
    channels = 1 if config.dataset in _GREY else 3
    if not is_own(config.dataset):  # of which the images alone tell the channels
        given = {name: _of_each(name, getattr(config, name), channels) for name in ("mean", "std")}
        config = dataclasses.replace(config, **given)
    if expected is None and not files:
        return config, ""
    usual = expected or _Expected("", IMAGENET_MEAN, IMAGENET_STD)
    asked = None if config.interpolation == "auto" else config.interpolation
    filled = {
        "mean": config.mean or _for_channels(usual.mean, channels),
        "std": config.std or _for_channels(usual.std, channels),
        "interpolation": asked or usual.interpolation or "bilinear",
        "crop_pct": config.crop_pct or min(1.0, usual.crop_pct or 0.875),
    }
    if expected is None or all(getattr(config, name) == value for name, value in filled.items()):
        return dataclasses.replace(config, **filled), ""
    other = "" if expected.crop_mode == "center" else f" (but the centre is cut out, not {expected.crop_mode})"
    return dataclasses.replace(config, **filled), f"as {expected.source}{other}"


def with_colours_of_backbone(config: Config) -> tuple[Config, str]:
    """The settings of a run that begins, of a task on top of a backbone, with the mean and std that the backbone's
    weights expect, and where they are from. What is given stays; a random start keeps ImageNet's.

    Raises:
        ValueError: what lies beside the weights is no description.

    >>> config = Config(task="semantic", dataset="masks", data_dir="x", model="semantic-fpn", method="common")
    >>> with_colours_of_backbone(dataclasses.replace(config, backbone="timm/mixer_b16_224", pretrained=True))[0].mean
    (0.5, 0.5, 0.5)
    """
    expected = _expected_by_backbone(config)
    if expected is None:
        return config, ""
    filled = {"mean": config.mean or expected.mean, "std": config.std or expected.std}
    source = f"as {expected.source}" if filled == {"mean": expected.mean, "std": expected.std} else ""
    return dataclasses.replace(config, **filled), source


def _expected_by_backbone(config: Config) -> _Expected | None:
    exported = (Path(config.backbone) / "config.json").is_file()
    places = (config.initial_checkpoint, config.backbone if exported else config.backbone_weights)
    files = (None if place is None else find_weights(Path(place)) for place in places)
    found = next((told for file in files if file is not None and (told := _beside(file)) is not None), None)
    if found is None and not exported and (config.pretrained or config.backbone_weights is not None):
        name = config.backbone if "/" in config.backbone else f"timm/{config.backbone}"
        found = _of_model(name) if name.startswith("timm/") else None
    if found is None:
        return None
    return dataclasses.replace(found, mean=_for_channels(found.mean, 3), std=_for_channels(found.std, 3))


def describe(data: Data, source: str) -> str:
    """How images become inputs, as a line of text."""
    mean, std = (", ".join(f"{value / 255:.4g}" for value in values) for values in (data.mean, data.std))
    crop = f", crop_pct {data.crop_pct:.4g}" if data.cuts_out else ""
    return f"inputs: mean {mean}, std {std}, {data.interpolation}{crop}{', ' if source else ''}{source}"


def as_text(data: Data) -> str:
    """The same as JSON, for the header of weights that are trained so."""
    values = {"mean": [value / 255 for value in data.mean], "std": [value / 255 for value in data.std]}
    return json.dumps(values | {"interpolation": data.interpolation, "crop_pct": data.crop_pct})


def _of_each(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (0, 1, channels):
        each = "" if channels == 1 else f", or {channels}, one for each channel"
        raise ValueError(f"{name} {' '.join(map(str, values))}: give one number{each}")
    return tuple(values) * (channels if len(values) == 1 else 1)


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Of other channels: grey has the average of the colours, colours have that of grey."""
    if len(values) in (0, channels):
        return values
    return (sum(values) / len(values),) * channels


def _expected_by(config: Config) -> _Expected | None:
    """What the weights expect that a run starts from; None for a random start, or where nobody says."""
    if not config.pretrained and config.initial_checkpoint is None:
        return None
    found = None
    if config.initial_checkpoint is not None:
        file = find_weights(Path(config.initial_checkpoint))
        found = None if file is None else _beside(file)
    return found or _of_model(config.model)


def _of_model(name: str) -> _Expected | None:
    if is_own(name):
        return None
    family, bare = resolve_name(name)
    if family == "hf":
        return _of_transformers(Path(bare) / "preprocessor_config.json")
    if family == "timm":
        from timm.models import get_pretrained_cfg

        published = get_pretrained_cfg(bare)
        return None if published is None else _read(published.to_dict(), f"timm's {bare} expects")
    if family == "tv":
        import torchvision.models

        weights: Any = torchvision.models.get_model_weights(bare)
        how = weights.DEFAULT.transforms()
        entries = {"mean": how.mean, "std": how.std, "interpolation": how.interpolation.value}
        entries["crop_pct"] = how.crop_size[0] / how.resize_size[0]
        return _read(entries, f"torchvision's {bare} expects")
    return None


def _of_transformers(file: Path) -> _Expected | None:
    if not file.is_file():
        return None
    entries = _json(file)
    side, crop = (_side(entries.get(name)) for name in ("size", "crop_size"))
    share = entries.get("crop_pct") or (crop / side if side and crop and entries.get("do_center_crop") else 1.0)
    if entries.get("do_normalize") is False:
        entries |= {"image_mean": [0.0], "image_std": [1.0]}
    found = {"mean": entries.get("image_mean") or IMAGENET_MEAN, "std": entries.get("image_std") or IMAGENET_STD}
    found |= {"interpolation": _PILLOW.get(entries.get("resample", 2), "bilinear"), "crop_pct": share}
    return _read(found, f"{file.name} of {file.parent.name} says")


def _side(size: Any) -> float:
    """Of transformers: a number, or one by name; 0 where nothing is said."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return float(size) if isinstance(size, (int, float)) else 0.0


def _beside(file: Path) -> _Expected | None:
    """What lies with the weights: in their header, or in a description that unloaf, timm or transformers wrote."""
    header = texts_of(file).get(HEADER)
    if header is not None:
        return _read(_parsed(header, file), f"{file} was trained")
    for name, entry in {
        "subnet.json": "preprocessing", "elastic.json": "preprocessing", "config.json": "pretrained_cfg",
    }.items():  # fmt: skip
        description = file.parent / name
        if description.is_file():
            entries = _json(description).get(entry)
            if isinstance(entries, dict) and entries.get("mean"):
                return _read(entries, f"{description} says")
    return _of_transformers(file.parent / "preprocessor_config.json")


def _json(file: Path) -> dict[str, Any]:
    try:
        return _parsed(file.read_text(encoding="utf-8"), file)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error


def _parsed(text: str, file: Path) -> dict[str, Any]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON: {error}") from error
    return entries if isinstance(entries, dict) else {}


def _read(entries: Mapping[str, Any], source: str) -> _Expected:
    try:
        mean, std = (tuple(float(value) for value in entries[name]) for name in ("mean", "std"))
        crop = entries.get("crop_pct")
        crop = None if crop is None else float(crop)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"mean, std and crop_pct as {source}: {error!r}; give --mean, --std and --crop-pct") from error
    wanted = entries.get("interpolation")
    known = wanted if wanted in ("bilinear", "bicubic", "random") else None
    return _Expected(source, mean, std, known, crop, str(entries.get("crop_mode") or "center"))
