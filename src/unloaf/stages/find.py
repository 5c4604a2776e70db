"""Which modules are residual blocks, and which of them form a stage."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.buffers import Buffers
from unloaf.stages.modes import evaluating
from unloaf.stages.probe import Call, NotFiniteError, Residual, drawing_alike, form_of, residual, trace
from unloaf.stages.replayable import is_replayable
from unloaf.stages.stage import NoResidualBlocksError, Stage, call_model, inner_module, stand_in


def find_stages(
    model: nn.Module, example: Any, *, blocks: Sequence[Sequence[str]] | None = None, within: str | None = None
) -> tuple[Stage, ...]:
    """Find the stages of a residual network: runs of blocks of which some can be skipped.

    A module is a residual block when, with all its parameters set to zero, it returns its input (or the relu of it),
    and what it adds otherwise comes from other elements of the input too (an activation with parameters is no block).
    Blocks are grouped by runs of constant output shape; a block of the same class that changes the shape right before
    a run is that stage's first, unskippable, block. A block may return a tuple; skipped, it returns its inputs in
    their places (MViT's feature size, the second stream of TNT), so an item that is none of its inputs holds it.
    Single blocks are skippable, those of Swin's pairs of plain and shifted windows as well: ST++'s space needs it.
    Stages with a single block have nothing to skip and are not listed. The model is not changed: the probe runs in eval
    mode with substituted parameters.

    Args:
        model: any network; a DistributedDataParallel or torch.compile wrapper is looked through.
        example: an input the model accepts, batch first, e.g. ``(1, 3, 224, 224)``; a mapping is passed as keywords.
        blocks: paths of the blocks of each stage, in order of execution, instead of the search. A block is then
            skippable when its output has the shape and dtype of its input.
        within: path of the module below which alone is searched (a detector's ``"backbone.body"``); the example is
            still what the whole model takes, and the blocks' paths are those of the whole model.

    Raises:
        NoResidualBlocksError: nothing can be skipped (VGG, DenseNet, ...).
        ValueError: the model cannot run on the example, ``blocks`` names modules that do not exist, are not called
            exactly once, or are out of order, or ``within`` names no module.

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
    scripted = [path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise ValueError(
            f"{f'module {scripted[0]!r}' if scripted[0] else 'the model'} was compiled by torch.jit, and what it "
            "computes cannot be inspected or changed; give the model as it was before"
        )
    _check_within(model, within, blocks)
    with evaluating(model), drawing_alike(model):
        start = Buffers(model.modules())
        calls, output = trace(model, example)
        below = {path: call for path, call in calls.items() if not within or path.startswith(f"{within}.")}
        unknown: list[str] = []  # modules that give NaN when their parameters are zero
        kinds = _probe(model, below, unknown) if blocks is None else _given(model, calls, blocks)
        runs = _runs(model, below, kinds) if blocks is None else [tuple(stage) for stage in blocks]
        runs = [run for run in runs if len(run) > 1 and any(path in kinds for path in run)]
        if not runs:
            raise NoResidualBlocksError(
                f"{f'{within} of ' if within else ''}{type(model).__name__} has no residual blocks that could be "
                f"skipped: of its {len(below)} modules called once none returns its input when its parameters are "
                "zero, two or more in a run"
                f"{_untold(model, unknown)}. "
                "If it has residual blocks of another form (BERT's, with the norm behind the sum), name them: "
                'find_stages(model, example, blocks=[["layer1.0", "layer1.1"], ...])'
            )
        _check_runs_when_skipped(model, example, runs, kinds)
        named = {path: model.get_submodule(path) for run in runs for path in run}
        replayable = is_replayable(model, example, named, calls, output, start)
    _warn(model, unknown, replayable)
    shape = tuple(example.shape[1:]) if isinstance(example, Tensor) else None
    stages = [_stage(name, run, kinds, shape) for name, run in zip(_names(runs), runs, strict=True)]
    return tuple(stages if replayable else [replace(stage, replayable=False) for stage in stages])


def _check_within(model: nn.Module, within: str | None, blocks: object) -> None:
    paths = [path for path, _ in model.named_modules()]
    if within is not None and within not in paths:
        # The nearest names also tell a level that was left out: "body" of "backbone.body".
        ends = [path for path in paths if path.endswith(f".{within}")]
        near = [*dict.fromkeys(ends + difflib.get_close_matches(str(within), paths, n=3))]
        near = near or [path for path, _ in model.named_children()]
        raise ValueError(
            f"within is {within!r}, which is not a module of {type(model).__name__}; give the path of one as in "
            f"model.named_modules(), such as {', '.join(map(repr, near[:3]))}"
        )
    if within and blocks is not None:
        raise ValueError(f"within is {within!r} and blocks are given, so that nothing is searched; give one of them")


def _warn(model: nn.Module, unknown: Sequence[str], replayable: bool) -> None:
    if not replayable:
        warnings.warn(
            f"{type(model).__name__} hands on more than its modules return (a list they are given, an attribute read "
            "later, a counter): passes of a training step share nothing, so that each subnet costs a whole pass; let "
            "modules return what others need",
            stacklevel=3,
        )
    if unknown:
        warnings.warn(
            f"blocks of {type(model).__name__} may be missing from its stages{_untold(model, unknown)}; if they are "
            'residual blocks, name all: find_stages(model, example, blocks=[["layer1.0", "layer1.1"], ...])',
            stacklevel=3,
        )


def _untold(model: nn.Module, unknown: Sequence[str]) -> str:
    """What to say of modules that cannot be probed, the innermost of them."""
    innermost = [path for path in unknown if not any(other.startswith(f"{path}.") for other in unknown)]
    named = ", ".join(f"{path} ({type(model.get_submodule(path)).__name__})" for path in innermost[:3])
    more = ", ..." if len(innermost) > 3 else ""
    return f"; {named}{more} cannot be probed: with its parameters zero it gives NaN" if innermost else ""


def _stage(name: str, run: tuple[str, ...], kinds: Mapping[str, Residual], shape: tuple[int, ...] | None) -> Stage:
    found = [kinds.get(path) for path in run]
    forms = tuple(block and block.form for block in found)
    return Stage(
        name,
        run,
        tuple(block is not None for block in found),
        tuple(block is not None and block.kind == "additive" for block in found),
        shape,
        forms if any(forms) else (),
    )


def _probe(model: nn.Module, calls: Mapping[str, Call], unknown: list[str]) -> dict[str, Residual]:
    """The blocks and how each adds its input: neither what holds blocks nor what is a part of one.

    Modules of which it is not known are added to `unknown`.
    """
    found: dict[str, Residual] = {}
    for path, call in calls.items():
        module = model.get_submodule(path)
        # A lone layer of torch.nn (Linear, BatchNorm2d, ...) maps zero parameters to zero: testing it is wasted work.
        # What is made of layers (TransformerEncoderLayer) may be a block.
        is_layer = type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())
        if call.keeps_shape and not is_layer and any(True for _ in module.parameters()):
            try:
                block = residual(module, call)
            except NotFiniteError:
                unknown.append(path)
                continue
            if block is not None:
                found[path] = block
    paths = _blocks_within(model, "", found, calls)
    classes = {type(model.get_submodule(path)) for path in paths} - {nn.Sequential, nn.ModuleList}
    # Residual parts of a block that is none itself, because it changes the shape (MaxViT) or starts something (T5).
    parts = [path for path in paths if any(type(model.get_submodule(p)) in classes for p in _ancestors(path))]
    blocks = {path: found[path] for path in paths if path not in parts}
    unknown[:] = [
        path for path in unknown if not any(f"{path}.".startswith(f"{b}.") or b.startswith(f"{path}.") for b in blocks)
    ]
    return blocks


def _ancestors(path: str) -> list[str]:
    """All modules that hold this one, the nearest first, the model itself left out."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def _blocks_within(model: nn.Module, path: str, found: Mapping[str, Residual], calls: Mapping[str, Call]) -> list[str]:
    module = model.get_submodule(path)
    inner = [
        block
        for name, _ in module.named_children()
        for block in _blocks_within(model, f"{path}.{name}" if path else name, found, calls)
    ]
    if path not in found or (inner and _is_container(model, path, inner, found, calls)):
        return inner
    return [path]


def _is_container(
    model: nn.Module, path: str, inner: Sequence[str], found: Mapping[str, Residual], calls: Mapping[str, Call]
) -> bool:
    """A stage that passes the zero-parameter test as a whole (it does where nothing changes the shape) is no block."""
    module = model.get_submodule(path)
    if type(module).forward is nn.Sequential.forward:
        return True
    covered = {id(p) for block in inner for p in model.get_submodule(block).parameters()}
    if any(id(p) not in covered for child in module.children() for p in child.parameters()):
        return False  # attention, say, beside residual position encodings (DaViT)
    if len(inner) > 1 and len({type(model.get_submodule(b)) for b in inner}) == 1 and len(set(map(_stem, inner))) == 1:
        return True
    in_sequence = any(isinstance(model.get_submodule(p), nn.Sequential) for b in inner for p in _parents(b, path))
    return in_sequence and not _has_twin(model, path, found, calls)


def _parents(block: str, above: str) -> list[str]:
    return [path for path in _ancestors(block) if len(path) > len(above)]


def _stem(path: str) -> str:
    """The leaf's name without its number: blocks of a list differ in the number only, parts of a block do not."""
    return re.sub(r"\d+$", "", _leaf(path))


def _has_twin(model: nn.Module, path: str, found: Mapping[str, Residual], calls: Mapping[str, Call]) -> bool:
    """Whether a module of the same class works beside this one at its resolution: these are the units that repeat."""
    parent, kind, own = path.rpartition(".")[0], type(model.get_submodule(path)), calls[path]
    for other, call in calls.items():
        if other == path or other.rpartition(".")[0] != parent or type(model.get_submodule(other)) is not kind:
            continue
        before = call.order < own.order and call.result is not None and call.result.shape == _stream_shape(own)
        if other in found or before:
            return True
    return False


def _stream_shape(call: Call) -> torch.Size | None:
    return None if call.stream is None else call.stream.shape


def _holder(model: nn.Module, path: str) -> str:
    """The outermost list around the block: nested lists (EfficientNet's) count as one."""
    lists = (nn.Sequential, nn.ModuleList)
    holder, *above = [*_ancestors(path), ""]
    while above and isinstance(model.get_submodule(holder), lists) and isinstance(model.get_submodule(above[0]), lists):
        holder = above.pop(0)
    return holder


def _runs(model: nn.Module, calls: Mapping[str, Call], kinds: Mapping[str, Residual]) -> list[tuple[str, ...]]:
    """Group blocks by runs of constant output shape, each with the shape-changing block before it, if there is one."""
    ordered = sorted(kinds, key=lambda path: calls[path].order)
    runs: list[list[str]] = []
    for before, path in zip([None, *ordered], ordered, strict=False):
        head = _head_before(model, calls, kinds, path)
        if before is None or head is not None or _shape(calls[before]) != _shape(calls[path]):
            runs.append([] if head is None else [head])
        runs[-1].append(path)
    return [_without_lone(model, run) for run in runs]


def _shape(call: Call) -> tuple[int, ...]:
    assert call.result is not None
    return tuple(call.result.shape)


def _without_lone(model: nn.Module, run: Sequence[str]) -> tuple[str, ...]:
    """Leave out what stands alone in its list: a position encoding (Twins), an attention in a block that is none."""
    holders = [_holder(model, path) for path in run]
    return tuple(path for path, holder in zip(run, holders, strict=True) if holders.count(holder) > 1)


def _head_before(model: nn.Module, calls: Mapping[str, Call], kinds: Mapping[str, Residual], path: str) -> str | None:
    """The block of the same class and list that ran right before, if it is no residual block itself."""
    kind, holder, stream = type(model.get_submodule(path)), _holder(model, path), calls[path].stream
    before = [
        other
        for other, call in calls.items()
        if call.order < calls[path].order
        and type(model.get_submodule(other)) is kind
        and _holder(model, other) == holder
    ]
    head = max(before, key=lambda other: calls[other].order, default=None)
    if head is None or head in kinds or stream is None or calls[head].result is None:
        return None
    return head if _shape(calls[head]) == tuple(stream.shape) else None


def _given(model: nn.Module, calls: Mapping[str, Call], blocks: Sequence[Sequence[str]]) -> dict[str, Residual]:
    """Check an explicit list of blocks; the skippable ones among them, and how each adds its input."""
    paths = [path for stage in blocks for path in stage]
    known = dict(model.named_modules())
    for path in paths:
        if path not in known or not path:
            raise ValueError(
                f"blocks names {path!r}, which is not a module of {type(model).__name__}; see model.named_modules()"
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
        if len(stage) < 2 or not any(_may_be_skipped(calls[path]) for path in stage):
            raise ValueError(
                f"nothing of stage {list(stage)} can be skipped: a stage needs two blocks or more, and one that "
                "returns one tensor of its input's shape and dtype; leave this stage out"
            )
    # "activated" also stands for forms the probe does not know (post-norm blocks): skippable, their branch alone not.
    return {
        path: _told(known[path], calls[path]) or Residual("activated", form_of(calls[path]))
        for path in paths
        if _may_be_skipped(calls[path])
    }


def _told(module: nn.Module, call: Call) -> Residual | None:
    try:
        return residual(module, call)
    except NotFiniteError:
        return None


def _may_be_skipped(call: Call) -> bool:
    return call.keeps_shape and (isinstance(call.output, Tensor) or form_of(call) is not None)


def _check_runs_when_skipped(
    model: nn.Module, example: Any, runs: Sequence[Sequence[str]], kinds: Mapping[str, Residual]
) -> None:
    """The smallest subnet must run: a block whose output structure matters to its caller is found out here."""
    handles = []
    for path in (path for run in runs for path in run[1:] if path in kinds):

        def return_input(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> Any:
            return stand_in(kinds[path].form, args, kwargs)

        handles.append(model.get_submodule(path).register_forward_hook(return_input, with_kwargs=True))
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
    """The path of what holds the blocks, with their range behind it where that holds other stages as well."""
    names = []
    for run in runs:
        common = _common(run)
        others = [path for other in runs if other is not run for path in other]
        if common and not any(path.startswith(f"{common}.") for path in others):
            names.append(common)
        else:
            cut = len(common) + 1 if common else 0
            first, last = (path[cut:] for path in (run[0], run[-1]))
            names.append(f"{common}.{first}-{last}".lstrip("."))
    return names


def _common(run: Sequence[str]) -> str:
    """The innermost module that holds all blocks of a run."""
    return next((path for path in _ancestors(run[0]) if all(b.startswith(f"{path}.") for b in run)), "")


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
