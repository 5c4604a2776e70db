"""Backbones: classifiers without their head, as pyramids of features for detectors and dense heads."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.config import Config
from unloaf.errors import in_one_line
from unloaf.models.build import resolve_name
from unloaf.models.initial_weights import load_initial_weights
from unloaf.models.offline import offline

STRIDES = (4, 8, 16, 32)


class FeaturePyramid(nn.Module):
    """A timm network as a list of features, and a feature pyramid over those of stride 4 to 32.

    Attributes:
        body: timm's network, in whose blocks the subnets are.
        fpn: torchvision's FeaturePyramidNetwork.
        out_channels: channels of each level.

    Source: Lin et al. 2017, feature pyramid networks.
    """

    def __init__(self, body: nn.Module, *, levels: tuple[int, ...], out_channels: int, extra: Any) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        information: Any = body.feature_info
        channels = dict(zip(information.reduction(), information.channels(), strict=True))
        self.body, self._levels, self._channels = body, levels, tuple(channels[level] for level in levels)
        self._places = tuple(information.reduction().index(level) for level in levels)
        self.fpn = FeaturePyramidNetwork(list(self._channels), out_channels, extra_blocks=extra)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Mapping[str, Tensor]:
        """Levels by name, "0" for the finest, each (B, out_channels, H / stride, W / stride)."""
        found = self.body(x)
        features = [found[place] for place in self._places]
        named = {
            str(at): feature if feature.shape[1] == channels else feature.permute(0, 3, 1, 2)  # Swin: channels last
            for at, (feature, channels) in enumerate(zip(features, self._channels, strict=True))
        }
        return self.fpn(OrderedDict(named))


def build_body(
    name: str, *, weights: str | None, pretrained: bool, arguments: Mapping[str, Any] | None = None
) -> tuple[nn.Module, tuple[str, ...]]:
    """A timm network that gives a list of its features, and what is to be said of its weights.

    Args:
        name: "timm/resnet50", or resnet50; or a folder that `unloaf export --format timm` wrote, with its weights: of a
            subnet too.
        weights: a run, an exported folder or a file with the weights of the classifier: all of the backbone's tensors
            must be there.
        pretrained: take the published weights.
        arguments: of the network, as in `described_backbone`.

    Raises:
        ValueError: no such network, it has no features of stride 4 to 32, or the weights do not fit.
    """
    import timm

    exported = (Path(name) / "config.json").is_file()
    if exported and (weights is not None or pretrained):
        raise ValueError(f"backbone {name}: the folder has its weights; give no others beside it")
    bare = f"local-dir:{name}" if exported else _of_timm(name)
    try:
        with offline() if exported else nullcontext():
            loaded = pretrained or exported
            body: Any = timm.create_model(bare, features_only=True, pretrained=loaded, **(arguments or {}))
        missing = sorted(set(STRIDES) - set(body.feature_info.reduction()))
    except (RuntimeError, ValueError, AttributeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"backbone {name}: it gives no features ({in_one_line(error)}); give timm/resnet50 or the like"
        ) from error
    except OSError as error:
        raise ValueError(
            f"backbone {name}: its published weights cannot be fetched ({in_one_line(error)}); check the connection, "
            "give --backbone-weights FILE, or leave --pretrained out"
        ) from error
    if missing:
        raise ValueError(
            f"backbone {name}: it has features of stride {body.feature_info.reduction()}, a pyramid needs "
            f"{list(STRIDES)}; give a network of four stages, such as timm/resnet50 or timm/convnext_tiny"
        )
    if exported:
        return body, (f"backbone {name}: its network and its weights",)
    if weights is None:
        return body, ()
    whole = timm.create_model(bare)
    try:
        lines = load_initial_weights(whole, Path(weights))
    except ValueError as error:
        text = str(error).replace("initial_checkpoint", "backbone_weights", 1)
        raise ValueError(text.replace(", or --partial-weights to leave the rest random", "")) from error
    copy_weights(whole, body)
    return body, tuple(line.replace("initial_checkpoint", "backbone_weights", 1) for line in lines)


def described_backbone(name: str) -> tuple[str, dict[str, Any]]:
    """A backbone as the name of timm's network and arguments for it, also where it is a folder.

    >>> described_backbone("timm/resnet50")
    ('timm/resnet50', {})
    """
    file = Path(name) / "config.json"
    if not file.is_file():
        return name, {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        arguments = {key: value for key, value in found.get("model_args", {}).items() if key not in _NOT_OF_A_BODY}
        return f"timm/{found['architecture']}", arguments
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not what `unloaf export --format timm` wrote: {in_one_line(error)}") from error


_NOT_OF_A_BODY = ("num_classes", "global_pool", "in_chans")


def _of_timm(name: str) -> str:
    family, bare = ("timm", name) if "/" not in name else resolve_name(name)
    if family != "timm":
        raise ValueError(f"backbone {name}: give a network of timm, such as timm/{bare}")
    import timm

    if not timm.is_model(bare):
        resolve_name(f"timm/{bare}")
        raise ValueError(f"backbone {name}: timm has no network of this name")
    return bare


def copy_weights(whole: nn.Module, body: nn.Module) -> None:
    """Gives a body the weights of the whole network that it is a part of; timm writes a list's names with underscores.

    Raises:
        ValueError: a tensor of the body has no counterpart of its shape.
    """
    given, own = whole.state_dict(), body.state_dict()
    taken = {name: given.get(_name_in_whole(name, given)) for name in own}
    wrong = [name for name, value in taken.items() if value is None or value.shape != own[name].shape]
    if wrong:
        raise ValueError(f"backbone: {len(wrong)} tensors are not in the classifier's weights: {', '.join(wrong[:3])}")
    with torch.no_grad():
        for name, value in taken.items():
            own[name].copy_(value)


def _name_in_whole(name: str, given: Mapping[str, Tensor]) -> str:
    if name in given:
        return name
    dotted = re.sub(r"^([A-Za-z]+)_(\d+)\.", r"\1.\2.", name)
    return dotted if dotted in given else name.removeprefix("model.")


def freeze_norms(body: nn.Module) -> int:
    """Replaces each batch norm by one whose statistics and weights stay; how many there were.

    As detectors are fine-tuned: a batch has few images, whose statistics are poor.
    """
    from torchvision.ops import FrozenBatchNorm2d

    count = 0
    for module in list(body.modules()):
        for name, norm in list(module.named_children()):
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
            frozen.load_state_dict(norm.state_dict())
            activation = [
                getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)
            ]  # timm's BatchNormAct2d
            setattr(module, name, nn.Sequential(frozen, *activation) if activation else frozen)
            count += 1
    return count


def start_of(config: Config, *, resumed: bool) -> dict[str, Any]:
    """Where the weights of a backbone come from; of a resumed run from nowhere: they are in its checkpoint."""
    if resumed:
        return {"weights": None, "pretrained": False}
    return {"weights": config.backbone_weights, "pretrained": config.pretrained}


def freezes_norms(config: Config) -> bool:
    """Whether a backbone's batch norms stay as they are: as the configuration says, by default where it was trained.

    >>> freezes_norms(Config(task="semantic", dataset="masks", data_dir="x", model="semantic-fpn",
    ...                      backbone="timm/resnet18", method="common", pretrained=True))
    True
    """
    if config.backbone_norms != "auto":
        return config.backbone_norms == "frozen"
    exported = not config.backbone.startswith("timm/") and Path(config.backbone).is_dir()
    return config.pretrained or config.backbone_weights is not None or exported
