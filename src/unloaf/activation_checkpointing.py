"""Activation checkpointing: memory for time, block by block, in step with prefix sharing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from unloaf.batchnorm import Statistics
from unloaf.stages import Stage, inner_module
from unloaf.subnet import check_stages, foreign_forward


def checkpoint_blocks(model: nn.Module, stages: Sequence[Stage]) -> None:
    """Keep only the input of each residual block for the backward pass, which computes the rest once more.

    Each application of a block costs one more forward pass of it. What passes share stays shared: a block's output is
    recorded as before, and no block is recomputed because a subnet branches off behind it. The second computation
    leaves running statistics alone and repeats the dropout of the first. A ``copy.deepcopy`` does the same. Blocks that
    run as their residual branch alone (`RawSampler`) keep all.

    Args:
        model: its blocks get a ``forward`` of their own; class, parameters and keys stay. Compile first
            (`compile_blocks`), then call this.
        stages: from `find_stages`.

    Raises:
        ValueError: stages of another model, or a block whose ``forward`` something else has replaced.

    Source: Chen et al. 2016; torch.utils.checkpoint.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(num_classes=5), torch.randn(2, 3, 64, 64)
    >>> stages = unloaf.find_stages(model, x)
    >>> unloaf.checkpoint_blocks(model, stages)
    >>> out = unloaf.StimulativeTraining(model, stages).backward(x, torch.tensor([1, 4]))
    """
    blocks = check_stages(inner_module(model), stages)
    forwards: dict[str, Any] = {path: block.forward for path, block in blocks.items()}
    for path, forward in forwards.items():
        if not isinstance(forward, MethodType):
            raise foreign_forward(path, forward, "checkpoint_blocks")
    for path, block in blocks.items():
        function = forwards[path].__func__
        if not hasattr(function, "unloaf_recomputes"):
            # Bound as a method, so that the block of a copy runs on the copy's parameters.
            block.__dict__["forward"] = MethodType(_recomputing(function), block)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(block, *args, **kwargs)
        # Named arguments are bound: those of `checkpoint` might have the same names.
        return checkpoint(
            functools.partial(forward, block, **kwargs),
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), Statistics(block).frozen()),
        )

    run.__dict__["unloaf_recomputes"] = True
    return run
