"""What a stage is, and how models and blocks are called."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Form:
    """Where the items of a block's tuple come from when the block is skipped.

    Attributes:
        sources: for each item, the position or the keyword of the argument that takes its place, or None for a None.
        as_list: whether the block returns a list instead of a tuple.

    >>> from unloaf.stages import Form
    >>> Form((0, "size", None)).fill(("stream",), {"size": (7, 7)})
    ('stream', (7, 7), None)
    """

    sources: tuple[int | str | None, ...]
    as_list: bool = False

    def fill(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | list[Any]:
        """The output of the skipped block for a call with these arguments."""
        items = [None if s is None else args[s] if isinstance(s, int) else kwargs[s] for s in self.sources]
        return items if self.as_list else tuple(items)


class NoResidualBlocksError(ValueError):
    """The model has no block whose output can be replaced by its input, so it has no subnets.

    >>> import torch, unloaf
    >>> try:
    ...     unloaf.find_stages(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.zeros(1, 4))
    ... except unloaf.NoResidualBlocksError as error:
    ...     print(str(error)[:33])
    Sequential has no residual blocks
    """


@dataclass(frozen=True)
class Stage:
    """A run of residual blocks with one feature shape; made of names, it survives deepcopy, DDP and checkpoints.

    Attributes:
        name: path of the module that holds the blocks, e.g. ``"layer3"``.
        blocks: paths as in ``model.named_modules()``, in the order of execution.
        skippable: for each block, whether its input may stand in for its output.
        additive: for each block, whether it returns exactly ``x + f(x)``; False where an activation follows the sum.
        input_shape: shape of one example (without the batch) on which the stage was found, or None.
        forms: for each block, None where it returns a tensor, else the form of the tuple it returns; empty stands for
            tensors throughout.
        replayable: whether recorded outputs can stand for calls of the model's modules; if not, the passes of a
            training step share nothing.

    >>> from unloaf import Stage
    >>> stage = Stage("layer1", ("layer1.0", "layer1.1"), (False, True))
    >>> stage.depth, stage.legal_depths
    (2, (1, 2))
    """

    name: str
    blocks: tuple[str, ...]
    skippable: tuple[bool, ...]
    additive: tuple[bool, ...] = ()
    input_shape: tuple[int, ...] | None = None
    forms: tuple[Form | None, ...] = ()
    replayable: bool = True

    @property
    def depth(self) -> int:
        """Number of blocks, the shape-changing first one included."""
        return len(self.blocks)

    def form(self, path: str) -> Form | None:
        """The form of the tuple that this block returns; None where it returns a tensor."""
        return self.forms[self.blocks.index(path)] if self.forms else None

    @cached_property
    def legal_depths(self) -> tuple[int, ...]:
        """Depths that an ordered subnet may keep: at least one block, and only skippable blocks dropped."""
        return tuple(k for k in range(1, self.depth + 1) if all(self.skippable[k:]))


def inner_module(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel, DataParallel or torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile's OptimizedModule
            model = compiled
        else:
            return model


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        ValueError: a module keeps a tensor with its graph from an earlier pass, which cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        if "deepcopy protocol" not in str(error):
            raise
        path, name = next(_tensors_with_graph(model), ("", "..."))
        where = f"module {path!r} ({type(model.get_submodule(path)).__name__})" if path else type(model).__name__
        raise ValueError(
            f"{where} keeps a tensor of an earlier pass with its graph, {name!r}, so that the model cannot be copied; "
            "detach it where it is stored, or set it to None before"
        ) from error


def _tensors_with_graph(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Where modules keep results of an earlier pass: the path of the module, and the name of what it keeps."""
    for path, module in model.named_modules():
        for name, value in {**module.__dict__, **module._buffers}.items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            items = list(value.values()) if isinstance(value, dict) else value
            items = items if isinstance(items, (tuple, list)) else [items]
            if any(isinstance(item, Tensor) and item.grad_fn is not None for item in items):
                yield path, name


def call_model(model: nn.Module, inputs: Any) -> Any:
    """``model(inputs)``; a mapping (a tokenizer's output, say) is passed as keyword arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def is_list_of_images(inputs: Any) -> bool:
    """Whether these are images of a batch that have sides of their own, (C, H, W) each, as torchvision's detectors take
    them.
    """
    return isinstance(inputs, list) and bool(inputs) and all(isinstance(x, Tensor) and x.ndim == 3 for x in inputs)


def stream_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The residual stream among a block's arguments: the first tensor."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def result_of(output: Any) -> Tensor | None:
    """The residual stream in a block's output: the output itself, or the first tensor of a tuple or list."""
    if isinstance(output, Tensor):
        return output
    return next((v for v in output if isinstance(v, Tensor)), None) if type(output) in (tuple, list) else None


def stand_in(form: Form | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a skipped block returns: its input, in the form of its output."""
    if form is not None:
        return form.fill(args, kwargs)
    stream = stream_of(args, kwargs)
    if stream is None:
        raise ValueError("a residual block was called without a tensor argument")
    return stream
