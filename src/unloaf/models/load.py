"""Models for a look: by name, or by a function of the user's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from unloaf.inputs import batch_of, to_device
from unloaf.models.build import build_model
from unloaf.own_code import call_function, load_function, parameters_of
from unloaf.stages import call_model, evaluating


def load_model(name: str, *, img_size: int | None = None, num_classes: int | None = None) -> tuple[nn.Module, Any]:
    """The model of this name, or of "module:function", and an example of its input.

    Raises:
        ValueError: no such model or function, the function returns something else, or a size or number of classes is
            given that it decides itself.

    >>> model, example = load_model("cifar/resnet20")
    >>> example.shape
    torch.Size([1, 3, 32, 32])
    """
    if ":" in name:
        return _from_function(name, img_size, num_classes)
    family = name.partition("/")[0]
    classes = num_classes or (10 if family == "cifar" else 1000)
    model = build_model(name, num_classes=classes, img_size=img_size).eval()
    if family == "hf":
        from unloaf.models.hf import example_of

        return model, example_of(model, img_size=img_size)
    published = getattr(model, "pretrained_cfg", None) or {}
    small = type(model).__module__.startswith("unloaf.") or family == "cifar"
    side = img_size or (32 if small else published.get("input_size", (3, 224, 224))[-1])
    return model, torch.zeros(1, 3, side, side)


def _from_function(name: str, img_size: int | None, num_classes: int | None) -> tuple[nn.Module, Any]:
    function, function_name = load_function(name, setting="model"), name.partition(":")[2]
    asked = {"num_classes": num_classes, "img_size": img_size}
    usual = {"num_classes": 1000, "in_chans": 3, "img_size": 224}
    offered = {key: usual[key] for key in parameters_of(function, needed=True) & usual.keys()}
    offered |= {key: value for key, value in asked.items() if value is not None}
    made: Any = call_function(name, setting="model", offered=offered)
    taken = parameters_of(function)
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model {name!r}: {function_name}() returned {type(model).__name__}; "
            "return a torch.nn.Module, or one and an example of its input"
        )
    ignored = ["--num-classes"] * (num_classes is not None and "num_classes" not in taken)
    ignored += ["--img-size"] * (img_size is not None and example is not None and "img_size" not in taken)
    if ignored:
        what = "model" if example is None else "model and example"
        raise ValueError(
            f"model {name!r}: the {what} that {function_name}() returns cannot be changed; "
            f"leave {' and '.join(ignored)} out"
        )
    if example is None:
        channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
        example = torch.zeros(1, channels, img_size or 224, img_size or 224)
    return model.eval(), example


def without_data(model: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """Both on the meta device, or as they are where the model cannot run there.

    Shapes and FLOPs need no arithmetic: without data a ResNet-50 is counted in a third of the time.

    >>> without_data(nn.Linear(2, 3), torch.zeros(1, 2))[1].device
    device(type='meta')
    """
    try:
        empty = copy.deepcopy(model).to("meta")
        inputs = to_device(batch_of(example, 1), "meta")
        with evaluating(empty):
            call_model(empty, inputs)
    except Exception:  # whatever a model raises that looks at values, or makes tensors of its own
        return model, example
    return empty, inputs
