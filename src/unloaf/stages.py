"""Where a model's residual blocks are: found by what the blocks compute, not by their class names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

_PROBE_SEED = 0x5EED


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

    @property
    def depth(self) -> int:
        """Number of blocks, the shape-changing first one included."""
        return len(self.blocks)

    @property
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


def call_model(model: nn.Module, inputs: Any) -> Any:
    """``model(inputs)``; a mapping (a tokenizer's output, say) is passed as keyword arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor among a block's arguments: the residual stream."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise ValueError("a residual block was called without a tensor argument")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients or autocast; every module gets its own training flag back, whatever happens."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for module, training in flags:
            module.training = training


def find_stages(model: nn.Module, example: Any, *, blocks: Sequence[Sequence[str]] | None = None) -> tuple[Stage, ...]:
    """Find the stages of a residual network: runs of blocks of which some can be skipped.

    A module is a residual block when, with all its parameters set to zero, it returns its input (or the relu of it).
    Blocks are grouped by runs of constant output shape; a block of the same class that changes the shape right before
    a run is that stage's first, unskippable, block. Stages with a single block have nothing to skip and are not listed.
    The model is not changed: the probe runs in eval mode with substituted parameters.

    Args:
        model: any network; a DistributedDataParallel or torch.compile wrapper is looked through.
        example: an input the model accepts, batch first, e.g. ``(1, 3, 224, 224)``; a mapping is passed as keywords.
        blocks: paths of the blocks of each stage, in order of execution, instead of the search. A block is then
            skippable when its output has the shape and dtype of its input.

    Raises:
        NoResidualBlocksError: nothing can be skipped (VGG, DenseNet, ...).
        ValueError: the model cannot run on the example, or ``blocks`` names modules that do not exist, are not called
            exactly once, or are out of order.

    Source: the zero-parameter test is ours; the stages are those of Ye et al. 2023 (ST++), section 3.3.3.

    >>> import torch, unloaf
    >>> from torch import nn
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.f = nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return x + self.f(x)
    >>> model = nn.Sequential(Block(), Block(), nn.Linear(4, 3))
    >>> [(stage.blocks, stage.skippable) for stage in unloaf.find_stages(model, torch.zeros(2, 4))]
    [(('0', '1'), (True, True))]
    """
    model = inner_module(model)
    with evaluating(model):
        calls = _trace(model, example)
        kinds = _probe(model, calls) if blocks is None else _given(model, calls, blocks)
        runs = _runs(model, calls, kinds) if blocks is None else [tuple(stage) for stage in blocks]
        runs = [run for run in runs if len(run) > 1 and any(path in kinds for path in run)]
        if not runs:
            raise NoResidualBlocksError(
                f"{type(model).__name__} has no residual blocks that could be skipped: of its {len(calls)} modules "
                "called once none returns its input when its parameters are zero, two or more in a run. "
                "If it has residual blocks of another form, name them: "
                'find_stages(model, example, blocks=[["layer1.0", "layer1.1"], ...])'
            )
        _check_runs_when_skipped(model, example, runs, kinds)
    return tuple(
        Stage(
            name, run, tuple(path in kinds for path in run), tuple(kinds.get(path) == "additive" for path in run), shape
        )
        for name, run, shape in zip(_names(runs), runs, [_example_shape(example)] * len(runs), strict=True)
    )


_Kind = Literal["additive", "activated"]


@dataclass(frozen=True)
class _Call:
    """What the trace saw of a module that was called exactly once."""

    order: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def stream(self) -> Tensor | None:
        return next((v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)), None)

    @property
    def keeps_shape(self) -> bool:
        x, y = self.stream, self.output
        return (
            x is not None
            and isinstance(y, Tensor)
            and (x.shape, x.dtype) == (y.shape, y.dtype)
            and x.is_floating_point()
        )


def _example_shape(example: Any) -> tuple[int, ...] | None:
    return tuple(example.shape[1:]) if isinstance(example, Tensor) else None


def _trace(model: nn.Module, example: Any) -> dict[str, _Call]:
    """Run the model once; the modules that were called exactly once, in the order in which they returned."""
    seen: dict[str, list[_Call]] = {}
    handles = []
    for path, module in model.named_modules():

        def record(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            seen.setdefault(path, []).append(_Call(len(seen), args, kwargs, output))

        if path:
            handles.append(module.register_forward_hook(record, with_kwargs=True))
    try:
        call_model(model, example)
    except Exception as error:
        given = (
            f"of shape {tuple(example.shape)}" if isinstance(example, Tensor) else f"of type {type(example).__name__}"
        )
        raise ValueError(
            f"{type(model).__name__} cannot run on the example {given}: {error}; "
            "give an input with a batch dimension, of the size the model was built for, on the model's device"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return {path: calls[0] for path, calls in seen.items() if len(calls) == 1}


def _probe(model: nn.Module, calls: Mapping[str, _Call]) -> dict[str, _Kind]:
    """The blocks, innermost of nested containers, and how each adds its input."""
    residual: dict[str, _Kind] = {}
    for path, call in calls.items():
        module = model.get_submodule(path)
        # A lone layer of torch.nn (Linear, BatchNorm2d, ...) maps zero parameters to zero: testing it is wasted work.
        is_layer = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
        if call.keeps_shape and not is_layer and any(True for _ in module.parameters()):
            kind = _residual_kind(module, call)
            if kind is not None:
                residual[path] = kind
    return {path: residual[path] for path in _innermost(model, "", residual)}


def _residual_kind(module: nn.Module, call: _Call) -> _Kind | None:
    """Whether the module returns its input ("additive") or relu of it ("activated") once its parameters are zero."""
    stream = call.stream
    assert stream is not None
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    # Fresh noise instead of the traced activation: an example of zeros, or a norm initialised to zero, would make
    # any module look like a residual block.
    x = torch.randn(stream.shape, generator=generator).to(stream)
    zeros = {name: torch.zeros_like(p) for name, p in module.named_parameters()}

    def swap(value: Any) -> Any:
        return x.clone() if value is stream else value  # cloned: some blocks work in place

    try:
        y = functional_call(module, zeros, tuple(map(swap, call.args)), {k: swap(v) for k, v in call.kwargs.items()})
    except Exception:  # a module that cannot run alone, or not on noise, is no block that could be skipped
        return None
    if torch.equal(y, x):
        return "additive"
    return "activated" if torch.equal(y, x.relu()) else None


def _innermost(model: nn.Module, path: str, residual: Mapping[str, _Kind]) -> list[str]:
    module = model.get_submodule(path)
    inner = [
        block
        for name, _ in module.named_children()
        for block in _innermost(model, f"{path}.{name}" if path else name, residual)
    ]
    if path not in residual or (inner and _is_container(model, path, inner)):
        return inner
    return [path]


def _is_container(model: nn.Module, path: str, inner: Sequence[str]) -> bool:
    """A stage that passes the zero-parameter test as a whole (it does where nothing changes the shape) is no block."""
    module = model.get_submodule(path)
    if type(module).forward is nn.Sequential.forward:
        return True
    if len(inner) > 1 and len({type(model.get_submodule(block)) for block in inner}) == 1:
        return True
    held_in = {block.rpartition(".")[0] for block in inner}
    return any(isinstance(model.get_submodule(p), (nn.Sequential, nn.ModuleList)) for p in held_in if p != path)


def _runs(model: nn.Module, calls: Mapping[str, _Call], kinds: Mapping[str, _Kind]) -> list[tuple[str, ...]]:
    """Group blocks by runs of constant output shape, each with the shape-changing block before it, if there is one."""
    ordered = sorted(kinds, key=lambda path: calls[path].order)
    runs: list[list[str]] = []
    for before, path in zip([None, *ordered], ordered, strict=False):
        head = _head_before(model, calls, kinds, path)
        if before is None or head is not None or calls[before].output.shape != calls[path].output.shape:
            runs.append([] if head is None else [head])
        runs[-1].append(path)
    return [tuple(run) for run in runs]


def _head_before(model: nn.Module, calls: Mapping[str, _Call], kinds: Mapping[str, _Kind], path: str) -> str | None:
    parent, _, name = path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    for previous, child in pairwise(key for key, _ in model.get_submodule(parent).named_children()):
        if child != name:
            continue
        head = f"{prefix}{previous}"
        same_class = type(model.get_submodule(head)) is type(model.get_submodule(path))
        if head in kinds or head not in calls or not same_class:
            return None
        output = calls[head].output
        stream = calls[path].stream
        return head if isinstance(output, Tensor) and stream is not None and output.shape == stream.shape else None
    return None


def _given(model: nn.Module, calls: Mapping[str, _Call], blocks: Sequence[Sequence[str]]) -> dict[str, _Kind]:
    """Check an explicit list of blocks; the skippable ones among them, and how each adds its input."""
    paths = [path for stage in blocks for path in stage]
    known = dict(model.named_modules())
    for path in paths:
        if path not in known or not path:
            raise ValueError(
                f"blocks names {path!r}, which is no module of {type(model).__name__}; see model.named_modules()"
            )
        if path not in calls:
            raise ValueError(
                f"block {path!r} is not called exactly once in a forward pass and cannot be part of a stage"
            )
        if paths.count(path) > 1:
            raise ValueError(f"blocks names {path!r} twice; name each block once")
    for before, path in pairwise(paths):
        if calls[before].order >= calls[path].order:
            raise ValueError(f"block {path!r} runs before {before!r}; list the blocks in the order of execution")
        if path.startswith(f"{before}.") or before.startswith(f"{path}."):
            raise ValueError(f"blocks {before!r} and {path!r} are nested in each other; name one of them")
    for stage in blocks:
        if len(stage) < 2 or not any(calls[path].keeps_shape for path in stage):
            raise ValueError(
                f"nothing of stage {list(stage)} can be skipped: a stage needs two blocks or more, and one that "
                "returns one tensor of its input's shape and dtype; leave this stage out"
            )
    skippable = [path for path in paths if calls[path].keeps_shape]
    # "activated" also stands for forms the probe does not know (post-norm blocks): skippable, their branch alone not.
    return {path: _residual_kind(known[path], calls[path]) or "activated" for path in skippable}


def _check_runs_when_skipped(
    model: nn.Module, example: Any, runs: Sequence[Sequence[str]], kinds: Mapping[str, _Kind]
) -> None:
    """The smallest subnet must run: a block whose output structure matters to its caller is found out here."""

    def return_input(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
        return first_tensor(args, kwargs)

    dropped = [path for run in runs for path in run[1:] if path in kinds]
    handles = [model.get_submodule(path).register_forward_hook(return_input, with_kwargs=True) for path in dropped]
    try:
        call_model(model, example)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} fails when its residual blocks are skipped ({error}); "
            "name the blocks that can be skipped: find_stages(model, example, blocks=[[...], ...])"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _names(runs: Sequence[Sequence[str]]) -> list[str]:
    """The parent's path, with the range of blocks behind it where one parent holds several stages."""
    parents = [run[-1].rpartition(".")[0] for run in runs]
    return [
        parent if parents.count(parent) == 1 and parent else f"{parent}.{_leaf(run[0])}-{_leaf(run[-1])}".lstrip(".")
        for parent, run in zip(parents, runs, strict=True)
    ]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
