"""Which networks are measured, at which side, and how they are built so that subnets may see smaller images."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from unloaf.inputs import SmallerInputs, legal_sides
from unloaf.models.build import build_model
from unloaf.models.load import without_data

STANDARD = (
    "timm/resnet50@224",
    "cifar/resnet50@32",
    "cifar/resnet56@32",
    "cifar/resnet110@32",
    "timm/mobilenetv3_large_100@224",
    "timm/vit_small_patch16_224@224",
    "timm/swin_tiny_patch4_window7_224@224",
    "timm/convnext_tiny@224",
)


@dataclass(frozen=True)
class Network:
    """A network to measure: its name as for `unloaf train`, the side of its images in pixels, and its classes."""

    name: str
    side: int
    classes: int


def chosen_networks(names: tuple[str, ...], *, img_size: int | None, num_classes: int | None) -> list[Network]:
    """The networks that were asked for, each once: NAME, NAME@SIDE, or standard for all of `STANDARD`.

    Defaults: a side of 32 for cifar/, else the model's own if it is built for one size, else 64; 10 classes for cifar/,
    else 1000.

    Raises:
        ValueError: a side that is no positive number.

    >>> chosen_networks(("cifar/resnet56", "timm/resnet50@224"), img_size=None, num_classes=None)[1]
    Network(name='timm/resnet50', side=224, classes=1000)
    """
    listed = [name for given in names for name in (STANDARD if given == "standard" else (given,))]
    found = []
    for given in dict.fromkeys(listed):
        name, at, side = given.partition("@")
        if at and not (re.fullmatch("[0-9]{1,5}", side) and int(side)):
            raise ValueError(f"model {given!r}: give a side in pixels after the @, as in timm/resnet50@224")
        small = name.startswith("cifar/")
        own = int(side) if at else img_size or (32 if small else _fixed_side(name) or 64)
        found.append(Network(name, own, num_classes or (10 if small else 1000)))
    return found


def _fixed_side(name: str) -> int | None:
    published = _published(name)
    return published.input_size[-1] if published is not None and published.fixed_input_size else None


def _published(name: str) -> Any:
    family, _, bare = name.rpartition("/")
    if family not in ("", "timm"):
        return None
    from timm.models import get_pretrained_cfg, is_model

    return get_pretrained_cfg(bare) if is_model(bare) else None


# How timm is asked for a network of varying size: vision transformers, Swin.
_VARYING: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})


def build_network(network: Network, *, varying: bool) -> nn.Module:
    """A network with random weights, in training mode; ``varying``: those of timm made for one size take others too.

    Raises:
        ValueError: no model has this name, or it cannot be built so.

    >>> build_network(Network("cifar/resnet14", 32, 10), varying=True).training
    True
    """
    published = _published(network.name)
    if varying and published is not None and published.fixed_input_size:
        import timm

        bare = network.name.rpartition("/")[2]
        for option in _VARYING:
            try:
                return timm.create_model(bare, num_classes=network.classes, img_size=network.side, **option)
            except TypeError:  # this one does not know the option
                continue
    return build_model(network.name, num_classes=network.classes, img_size=network.side)


def smaller_inputs(model: nn.Module, side: int, *, per: Literal["subnet", "step"]) -> SmallerInputs:
    """The rule of ST++, with those sides alone that the network takes.

    Raises:
        ValueError: the network takes no smaller side; the message names the sides that were tried.

    >>> smaller_inputs(build_network(Network("cifar/resnet14", 32, 10), varying=True), 32, per="step").sides is None
    True
    """
    rule = SmallerInputs(per=per)
    sides = rule.candidates(side)
    legal = legal_sides(*without_data(model, torch.zeros(1, 3, side, side).to(next(model.parameters()))), sides)
    if len(legal) == len(sides):
        return rule
    if len(legal) < 2:
        raise ValueError(
            f"{type(model).__name__} takes none of the smaller sides {sides[0]} to {side - 1} that subnets of "
            "ST++ see; leave these methods out, or give a network of varying size"
        )
    return SmallerInputs(per=per, sides=tuple(legal))
