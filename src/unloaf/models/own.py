"""Networks that a function of the user's own returns, to be trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from unloaf.own_code import call_function, fault
from unloaf.stages import evaluating


def build_own(name: str, *, num_classes: int, in_chans: int, img_size: int, given: Mapping[str, Any]) -> nn.Module:
    """The network of a function "module:function"; its weights come from torch's global generator.

    The function gets those of ``num_classes`` (outputs), ``in_chans`` and ``img_size`` that it has as arguments, and
    all of `given`. The network takes images, float32 (B, in_chans, img_size, img_size).

    Raises:
        ValueError: see `call_function`; it returned no module, or the module raises an error at such images.
    """
    offered = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
    model = call_function(name, setting="model", offered=offered, given=given)
    if isinstance(model, tuple) and len(model) == 2:  # with an example of its input, as `unloaf inspect` takes it
        model = model[0]
    module_name, _, function_name = name.partition(":")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r}: {function_name}() returned {type(model).__name__}; return a torch.nn.Module")
    try:
        with evaluating(model):
            model(torch.zeros(2, in_chans, img_size, img_size))
    except Exception as error:  # whatever the module raises
        shape = (2, in_chans, img_size, img_size)
        raise ValueError(f"model {name!r} at images {shape} raised {fault(error, module_name)}") from error
    return model
