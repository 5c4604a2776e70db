"""A network as two files that need no run folder: its weights, and a JSON that says what they are the weights of."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.errors import CheckpointError
from unloaf.export import export_subnet
from unloaf.files.manifest import sha256
from unloaf.files.tensors import load_strictly, read_weights, untied, write_weights
from unloaf.files.writing import write_whole
from unloaf.models.build import build_model
from unloaf.stages import Form, Stage
from unloaf.subnet import Subnet, check_stages, check_subnet

FORMAT_VERSION = 1
_SUBNET = "subnet.json"
_ARCHITECTURE = ("name", "config", "num_classes", "in_chans", "img_size", "width", "model_kwargs")
_REMEDY = "copy the folder or export it again"


def load_subnet(folder: str | Path) -> nn.Module:
    """The network that ``unloaf export --format state_dict`` wrote: an ordinary module in eval mode, on the CPU.

    It is built by name, its skipped blocks are taken out as by `export_subnet`, and the weights are loaded strictly.
    What its outputs stand for is in ``class_names``, a tuple of texts; it is empty where the files do not say it.

    Args:
        folder: with ``subnet.json`` and ``model.safetensors``.

    Raises:
        ValueError: there is no such file, it is of something else, or the library of the network is not installed.
        CheckpointError: a file is damaged: its SHA-256 is not the one that was written, or the weights do not fit.

    >>> import tempfile, torch, unloaf
    >>> from unloaf.models.build import build_model
    >>> from unloaf.release.subnet_files import save_subnet
    >>> settings = {"name": "cifar/resnet14", "num_classes": 10, "width": 2}
    >>> model, x = build_model(**settings).eval(), torch.randn(2, 3, 32, 32)
    >>> stages = unloaf.find_stages(model, x)
    >>> subnet = unloaf.Subnet.from_depths(stages, (1, 2, 1))
    >>> small = unloaf.export_subnet(model, stages, subnet)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_subnet(folder, small, settings, stages, subnet)
    ...     torch.equal(unloaf.load_subnet(folder)(x), small(x))
    True
    """
    file = Path(folder) / _SUBNET
    fields, tensors = read_described(file, kind="subnet")
    with understanding(file):
        stages = read_stages(fields)
        subnet = Subnet(tuple(tuple(stage) for stage in fields["keep"]))
        model = build_described(fields, stages)
        small = export_subnet(model, stages, subnet, example=_example(fields))
        load_strictly(small, tensors)
        small.class_names = read_class_names(fields)  # type: ignore[assignment]
    return small.eval()


def save_subnet(
    folder: str | Path,
    network: nn.Module,
    architecture: Mapping[str, Any],
    stages: Sequence[Stage],
    subnet: Subnet,
    *,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes ``model.safetensors`` and ``subnet.json``, from which `load_subnet` gives the network again.

    The network is what `export_subnet` returned, the architecture are arguments of `build_model` for the main network
    and, for one of transformers, the entries of its config.json as ``config``; there may be further entries of the
    JSON.
    """
    fields = {
        "architecture": dict(architecture),
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "keep": subnet.keep,
        "subnet": str(subnet),
        **(more or {}),
    }
    write_described(Path(folder) / _SUBNET, "model.safetensors", network.state_dict(), fields, kind="subnet")


def write_described(
    file: Path, weights: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any], *, kind: str
) -> None:
    """Writes tensors to a safetensors file, tied ones once, and what they are to a JSON beside it."""
    kept, aliases = untied(tensors, weights)
    write_weights(kept, file.parent / weights, {})
    described = {
        "kind": f"unloaf {kind}",
        "format_version": FORMAT_VERSION,
        **fields,
        "weights": {"file": weights, "sha256": sha256(file.parent / weights), "tied": aliases},
    }
    write_whole(file, json.dumps(described, indent=2) + "\n")


def read_described(file: Path, *, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_described` wrote, once the weights have their SHA-256.

    Raises:
        ValueError: there is no such file, or it is of something else.
        CheckpointError: something is damaged.
    """
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}; give a folder that `unloaf export` wrote")
    with understanding(file):
        fields = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(fields, dict) or fields.get("kind") != f"unloaf {kind}":
        found = fields.get("kind") if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"{file} describes no {kind} (its kind is {found!r}); give what `unloaf export` wrote")
    with understanding(file):
        if fields["format_version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{file}: format {fields['format_version']}, this unloaf reads up to {FORMAT_VERSION}; update unloaf"
            )
        weights = file.parent / Path(fields["weights"]["file"]).name
        digest, tied = fields["weights"]["sha256"], dict(fields["weights"]["tied"])
    if not weights.is_file():
        raise CheckpointError(f"{weights}: is missing; copy the folder again, whole")
    if sha256(weights) != digest:
        raise CheckpointError(
            f"{weights}: its SHA-256 is not the one in {file.name}: the file is damaged or belongs to another "
            f"description; {_REMEDY}"
        )
    return fields, read_weights(weights, tied, remedy=_REMEDY)


def build_described(fields: Mapping[str, Any], stages: Sequence[Stage]) -> nn.Module:
    """The main network that the JSON names, with fresh weights; torch's random state stays as it was.

    Raises:
        ModuleNotFoundError: the library of the architecture is not installed.
        ValueError: there is no such network.
    """
    # What else build_model takes would make it look for published weights.
    if _builds(fields):
        return _build_by(fields["architecture"], stages)
    settings = {key: value for key, value in fields["architecture"].items() if key in _ARCHITECTURE}
    name, config = settings.pop("name"), settings.pop("config", None)
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        place = name
        if config is not None:  # of transformers, which reads it from a file
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            place = f"hf/{folder}"
        try:
            model = build_model(place, **settings)
        except (ValueError, ImportError) as error:
            package = _missing_package(error)
            if package is not None:
                reason = f"{name} needs {package}, which is not installed; pip install {package}"
                raise ModuleNotFoundError(reason, name=package) from error
            # The folder is gone by the time that anybody reads of it.
            text = str(error).replace(place, name).replace(str(Path(folder) / "config.json"), "its configuration")
            raise ValueError(text) from error
    check_stages(model, stages)
    return model.eval()


# Of each builder the arguments that are given to it, and what its network takes.
_BUILT_BY = ("name", "backbone", "num_classes", "frozen_norms", "backbone_kwargs")
_DETECTOR = (*_BUILT_BY, "img_size", "longest", "mean", "std")
_ARGUMENTS = {
    "detector": _DETECTOR,
    "segmenter": _BUILT_BY,
    "pose": _BUILT_BY,
    "panoptic": (*_DETECTOR, "things", "stuff_area"),
}
_OF_LISTS = ("detector", "panoptic")  # take a list of images


def _build_by(architecture: Mapping[str, Any], stages: Sequence[Stage]) -> nn.Module:
    """A network that is no classifier, with fresh weights."""
    from unloaf.models.detectors import build_detector
    from unloaf.models.panoptic import build_panoptic
    from unloaf.models.pose import build_pose
    from unloaf.models.segmenters import build_segmenter

    builder = architecture["builder"]
    if builder == "language":
        return _build_language(architecture, stages)
    if builder not in _ARGUMENTS:
        known = ", ".join([*_ARGUMENTS, "language"])
        raise ValueError(f"builder {builder!r}: this unloaf knows {known}; update it")
    builders: dict[str, Any] = {"detector": build_detector, "segmenter": build_segmenter, "pose": build_pose}
    builders["panoptic"] = build_panoptic
    with torch.random.fork_rng(devices=[]):
        model, _ = builders[builder](**{key: architecture[key] for key in _ARGUMENTS[builder]})
    check_stages(model, stages)
    return model.eval()


def _build_language(architecture: Mapping[str, Any], stages: Sequence[Stage]) -> nn.Module:
    """A language model of transformers, which reads its configuration from a file."""
    from unloaf.models.hf import build_transformer

    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(architecture["config"]), encoding="utf-8")
        model = build_transformer(folder)
    check_stages(model, stages)
    return model.eval()


def _example(fields: Mapping[str, Any]) -> Any:
    """What a network takes whose stages do not say it; None for others."""
    if fields["architecture"].get("builder") == "language":
        return {"input_ids": torch.tensor([[0, 1]]), "use_cache": False}
    if fields["architecture"].get("builder") not in _OF_LISTS:
        return None
    return [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))]


def _builds(fields: Mapping[str, Any]) -> bool:
    return "builder" in fields["architecture"]


def _missing_package(error: BaseException) -> str | None:
    """The package without which it came to this error, if that is why."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ModuleNotFoundError):
        cause = cause.__cause__
    return None if cause is None or cause.name is None else cause.name.partition(".")[0]


def read_stages(fields: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages of the JSON, and a check that its subnet is one of them."""
    stages = tuple(Stage(**{name: _read_field(value) for name, value in stage.items()}) for stage in fields["stages"])
    if "keep" in fields:
        check_subnet(stages, Subnet(tuple(tuple(stage) for stage in fields["keep"])))
    return stages


def read_class_names(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """What the outputs stand for; empty in files of unloaf 0.1 before it kept them.

    Raises:
        ValueError: they are not one text for each output.
    """
    names = tuple(fields.get("class_names", ()))
    if names and (len(names) != fields["architecture"]["num_classes"] or not all(isinstance(n, str) for n in names)):
        raise ValueError(f"{len(names)} class names for {fields['architecture']['num_classes']} outputs")
    return names


def _read_field(value: Any) -> Any:
    """Of a stage: JSON has lists where it has tuples, and mappings where it has forms."""
    if isinstance(value, list):
        return tuple(map(_read_field, value))
    return Form(**{name: _read_field(entry) for name, entry in value.items()}) if isinstance(value, dict) else value


@contextmanager
def understanding(file: Path) -> Iterator[None]:
    """Turns whatever a damaged or foreign file leads to into a CheckpointError that names it.

    A library that is not installed is no damage: that is a ValueError.
    """
    try:
        yield
    except CheckpointError:
        raise
    except ModuleNotFoundError as error:
        raise ValueError(f"{file}: {error}") from error
    except Exception as error:  # anything: the bytes may say anything
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{file}: is not what `unloaf export` wrote ({type(error).__name__}: {text}); {_REMEDY}"
        ) from error
