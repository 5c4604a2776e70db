"""Networks of transformers, built from a configuration: a local config.json or a class. Nothing is downloaded."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.errors import in_one_line
from unloaf.models.offline import is_of_hub, offline

# A default configuration can be one of many billions of parameters.
_MOST_PARAMETERS = 2_000_000_000


def build_transformer(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    img_size: int | None = None,
    pretrained: bool = False,
    entries: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The network of a configuration, with fresh weights or, from a folder, its own.

    The name is a folder with config.json, or a class of transformers: a configuration ("ViTConfig") or a model
    ("T5EncoderModel"), with its default values.

    Raises:
        ValueError: no such class, a folder without a readable config.json, a network that no class is known for, or one
            that is too large to be built here.

    >>> sum(p.numel() for p in build_transformer("ResNetConfig", num_classes=10).parameters()) > 20_000_000
    True
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError("transformers is not installed; pip install transformers") from error
    folder = Path(name)
    with offline():
        if (folder / "config.json").is_file():
            config, kind = _read(transformers, folder), None
        elif os.sep in name or folder.is_dir():
            raise ValueError(f"{name} has no config.json; give a folder that save_pretrained wrote")
        else:
            config, kind = _of_class(transformers, name)
        _adapt(config, num_classes=num_classes, in_chans=in_chans, img_size=img_size)
        set_entries(config, entries or {}, own=("num_labels", "num_channels", "image_size"))
        build = kind or _kind_of(transformers, config, folder)
        try:
            return _with_own_weights(build, config, folder) if pretrained else _fresh(build, config)
        except (ValueError, MemoryError):
            raise
        except Exception as error:  # whatever a class raises at settings that it was not made for
            if is_of_hub(error):
                raise
            raise ValueError(f"{build.__name__} cannot be built so ({in_one_line(error)}); see config.json") from error


def _with_own_weights(build: Any, config: Any, folder: Path) -> nn.Module:
    if not folder.is_dir():
        raise ValueError("a class has no published weights; give a folder with weights, or leave out --pretrained")
    return build.from_pretrained(folder, config=config, local_files_only=True, ignore_mismatched_sizes=True)


def _fresh(build: Any, config: Any) -> nn.Module:
    check_size(build, config)
    return build(config)


def check_size(build: Any, config: Any) -> None:
    """Raises ValueError if a configuration is of so many parameters that a default value must be meant."""
    with torch.device("meta"):
        count = sum(p.numel() for p in build(config).parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"has {count:,} parameters with its default values; give a folder with a smaller config.json")


def config_class(transformers: Any, name: str) -> Any:
    """The class of a configuration, by its name or by that of a model.

    Raises:
        ValueError: there is no such class.
    """
    return type(_of_class(transformers, name)[0])


def set_entries(config: Any, entries: Mapping[str, Any], *, own: Collection[str]) -> None:
    """Changes entries of a configuration, ``hidden_size`` and the like.

    Raises:
        ValueError: it has no such entry, or the entry is one of those that have flags of their own.
    """
    for key, value in entries.items():
        if key in own or not hasattr(config, key):
            flag = "has a flag of its own" if key in own else "is no entry of its config.json"
            raise ValueError(f"model_kwargs {key}: {flag}; entries are hidden_size, patch_size and others")
        setattr(config, key, value)


def read_configuration(name: str) -> Any:
    """The configuration of a folder with config.json, or of a class of transformers with its default values.

    Raises:
        ValueError: there is none, or transformers is not installed.

    >>> read_configuration("ViTMAEForPreTraining").mask_ratio
    0.75
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError("transformers is not installed; pip install transformers") from error
    with offline():
        return (
            _read(transformers, Path(name))
            if (Path(name) / "config.json").is_file()
            else _of_class(transformers, name)[0]
        )


def example_of(model: nn.Module, *, img_size: int | None = None) -> Tensor | dict[str, Tensor]:
    """An input of one example for a network of transformers: an image of zeros, or sixteen tokens.

    >>> example_of(build_transformer("ResNetConfig")).shape
    torch.Size([1, 3, 224, 224])
    """
    config: Any = model.config
    if getattr(model, "main_input_name", "") == "pixel_values":
        side = img_size or getattr(config, "image_size", None) or 224
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        return torch.zeros(1, getattr(config, "num_channels", 3), height, width)
    return {"input_ids": torch.arange(16)[None] % config.vocab_size}


def _read(transformers: Any, folder: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises at a file that it does not understand
        if is_of_hub(error):
            raise
        raise ValueError(f"{folder / 'config.json'} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _of_class(transformers: Any, name: str) -> tuple[Any, Any]:
    """A configuration with default values, and the class of the model if that was named."""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedConfig):
        return found(), None
    kind = getattr(found, "config_class", None)
    if isinstance(found, type) and issubclass(found, nn.Module) and kind is not None:
        return kind(), found
    known = [key for key in dir(transformers) if key.endswith(("Config", "Model", "Classification", "LM"))]
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(f'hf/{key}' for key in close)}?" if close else "give hf/FOLDER or hf/ViTConfig"
    raise ValueError(f"no folder with config.json and no class of transformers; {hint}")


def _adapt(config: Any, *, num_classes: int | None, in_chans: int, img_size: int | None) -> None:
    if num_classes is not None:
        config.num_labels = num_classes
    if hasattr(config, "num_channels"):
        config.num_channels = in_chans
    if img_size is not None and isinstance(getattr(config, "image_size", None), int):
        config.image_size = img_size


def _kind_of(transformers: Any, config: Any, folder: Path) -> Any:
    """The class that a configuration names, or the first head that there is for it."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for head in ("ImageClassification", "CausalLM", "SequenceClassification"):
        auto = getattr(transformers, f"AutoModelFor{head}")
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ValueError(
        f"transformers has no classifier or language model for {type(config).__name__}; name the class of the model, "
        'such as hf/T5EncoderModel, or give "architectures" in config.json'
    )


def transformers_config(network: Any) -> dict[str, Any]:
    """The entries of a config.json from which transformers builds a network of this class and these sizes."""
    entries: dict[str, Any] = json.loads(network.config.to_json_string(use_diff=False))
    entries.pop("_name_or_path", None)  # where it was read from
    return entries | {"architectures": [type(network).__name__]}
