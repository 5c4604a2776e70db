"""torch.compile where it pays and stays bounded: block by block."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from unloaf.stages import Stage, inner_module
from unloaf.subnet import check_stages, foreign_forward

# Of torch's cache of graphs, which all blocks of a class share: its default of 8 is less than a ResNet-50 has shapes.
_RECOMPILE_LIMIT = 128


def compile_blocks(
    model: nn.Module,
    stages: Sequence[Stage],
    *,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
) -> None:
    """Compile the forward of each residual block; which blocks run is still decided in eager mode, for each pass.

    Compiled as a whole, a model is recompiled for each subnet. Compiled block by block there is at most one graph
    for each distinct shape of a block and each size of the input, however many subnets are drawn. A ``copy.deepcopy``
    of the model is compiled too. Where the compiler fails, blocks of that class run as they are, with a warning.

    Args:
        model: its blocks get a ``forward`` of their own; class, parameters and keys stay.
        stages: from `find_stages`.
        backend: of torch.compile.
        mode: of torch.compile.

    Raises:
        ValueError: stages of another model, blocks that `checkpoint_blocks` was called for before, or a block whose
            ``forward`` something else has replaced.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(), torch.randn(2, 3, 32, 32)
    >>> unloaf.compile_blocks(model, unloaf.find_stages(model, x), backend="eager")
    >>> with torch.no_grad():
    ...     model(x).shape
    torch.Size([2, 1000])
    """
    blocks = check_stages(inner_module(model), stages)
    compiled = functools.cache(lambda kind: _compiled_or_not(kind, backend, mode))
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _RECOMPILE_LIMIT)
    for path, block in blocks.items():
        _check_own_forward(path, block)
    for block in blocks.values():
        # Bound as a method, so that the block of a copy runs on the copy's parameters.
        block.__dict__["forward"] = MethodType(compiled(type(block)), block)


def _check_own_forward(path: str, block: nn.Module) -> None:
    """Raise ValueError if the block's forward is neither its class's nor one that was compiled here before."""
    own = block.__dict__.get("forward")
    function = getattr(own, "__func__", None)
    if hasattr(function, "unloaf_recomputes"):
        raise ValueError("the blocks are checkpointed already; call compile_blocks first, then checkpoint_blocks")
    if own is not None and not hasattr(function, "unloaf_compiles"):
        raise foreign_forward(path, own, "compile_blocks")


def _compiled_or_not(kind: type[nn.Module], backend: str | Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    forward: Callable[..., Any] = kind.forward
    chosen = compiled = torch.compile(forward, backend=backend, mode=mode)

    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal chosen
        try:
            return chosen(block, *args, **kwargs)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException  # a second that only those pay who compile

            # Of the compiler, before anything was computed.
            if chosen is not compiled or not isinstance(error, TorchDynamoException):
                raise
            output = forward(block, *args, **kwargs)  # raises what is an error of the block itself
            reason = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())[:200]
            warnings.warn(f"blocks of class {kind.__name__} run without torch.compile: {reason}", stacklevel=2)
            chosen = forward
            return output

    run.__dict__["unloaf_compiles"] = True
    return run
