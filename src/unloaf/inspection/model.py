"""Finds out what a model offers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.inputs import SmallerInputs, batch_of, first_tensor, legal_sides
from unloaf.inspection.report import BlockReport, Inspection, StageReport, StepCost, shape_text
from unloaf.measure.costs import subnet_cost
from unloaf.measure.flops import StepCounter
from unloaf.methods.table import METHODS
from unloaf.models.load import load_model, without_data
from unloaf.sampling import InterStageSampler
from unloaf.stages import Stage, call_model, evaluating, find_stages
from unloaf.subnet import Subnet

_DRAWS = 100
_SIDES = 6  # at which the network runs; a look should take seconds


def inspect_model(name: str, *, img_size: int | None = None, num_classes: int | None = None) -> Inspection:
    """Describes a model, by the name and options of `unloaf inspect`; nothing is trained or downloaded.

    Raises:
        NoResidualBlocksError: nothing can be skipped.
        ValueError: no such model, or it cannot run on an image of this side.

    >>> found = inspect_model("cifar/resnet20")
    >>> [stage.depths for stage in found.stages], found.subnets["ordered"]
    ([(1, 2, 3), (1, 2, 3), (1, 2, 3)], 27)
    """
    model, example = load_model(name, img_size=img_size, num_classes=num_classes)
    stages = find_stages(model, example)
    model, example = without_data(model, example)
    calls = _block_calls(model, example, stages)
    listed = {path: flag for stage in stages for path, flag in zip(stage.blocks, stage.skippable, strict=True)}
    reports = {path: _block(model, path, call, skippable=listed.get(path)) for path, call in calls.items()}
    full, smallest = Subnet.full(stages), Subnet.from_depths(stages, [stage.legal_depths[0] for stage in stages])
    one = batch_of(example, 1)
    whole, least = (subnet_cost(model, stages, one, subnet) for subnet in (full, smallest))
    legal, sides = _sides(model, example)
    shapes = len({_signature(model, path, calls[path]) for path in listed})
    keyword = _timm_keyword(model, stages)
    return Inspection(
        model=name,
        input=tuple(first_tensor(example).shape[1:]),
        params=whole[0],
        gmacs=whole[1],
        stages=tuple(StageReport(s.name, s.legal_depths, tuple(reports[path] for path in s.blocks)) for s in stages),
        others=tuple(report for path, report in reports.items() if path not in listed),
        subnets=_counts(stages),
        smallest={"depths": str(smallest), "params": least[0], "gmacs": least[1]},
        methods=_step_costs(model, stages, example, legal if sides == "legal" else None, sides),
        sides=sides,
        legal_sides=tuple(legal),
        block_shapes=shapes,
        timm_keyword=keyword,
        advice=_advice(model, stages, shapes, keyword),
    )


_Call = tuple[Any, Any]  # first tensor that went in, what came out


def _block_calls(model: nn.Module, example: Any, stages: Sequence[Stage]) -> dict[str, _Call]:
    """The blocks of the stages and what else is of their classes, as they are called once."""
    listed = [path for stage in stages for path in stage.blocks]
    kinds = {type(model.get_submodule(path)) for path in listed}
    wanted = {
        path: module
        for path, module in model.named_modules()
        if path in listed
        or (type(module) in kinds and not any(path.startswith(f"{p}.") or p.startswith(f"{path}.") for p in listed))
    }
    calls: dict[str, _Call] = {}

    def record(path: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        stream = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        calls.setdefault(path, (stream, output))

    with evaluating(model), ExitStack() as hooks:
        for path, module in wanted.items():
            hooks.enter_context(module.register_forward_hook(partial(record, path), with_kwargs=True))
        call_model(model, example)
    return calls


def _block(model: nn.Module, path: str, call: _Call, *, skippable: bool | None) -> BlockReport:
    stream, output = call
    module = model.get_submodule(path)
    before = None if stream is None else tuple(stream.shape[1:])
    result = next((v for v in output if isinstance(v, Tensor)), None) if isinstance(output, (tuple, list)) else output
    after = tuple(result.shape[1:]) if isinstance(result, Tensor) else None
    reason = None
    if not skippable:
        reason = (
            f"changes shape ({shape_text(before)} -> {shape_text(after)})"
            if before != after
            else "does not return its input when its parameters are zero"
            if skippable is False
            else "is the only block of its shape, or does not return its input when its parameters are zero"
        )
    params = sum(p.numel() for p in module.parameters())
    return BlockReport(path, type(module).__name__, before, after, params, bool(skippable), reason)


def _signature(model: nn.Module, path: str, call: _Call) -> tuple[Any, ...]:
    """What makes torch.compile recompile a block."""
    module, (stream, _) = model.get_submodule(path), call
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return type(module), shapes, None if stream is None else tuple(stream.shape[1:])


def _counts(stages: Sequence[Stage]) -> dict[str, int]:
    return {
        "ordered": prod(len(stage.legal_depths) for stage in stages),
        "inter-stage": prod(map(len, InterStageSampler().space(stages))),
        # A stage of which nothing is kept is not drawn.
        "stochastic": prod(2 ** sum(stage.skippable) - all(stage.skippable) for stage in stages),
    }


def _sides(model: nn.Module, example: Any) -> tuple[list[int], str]:
    """The sides from 0.43 of the full one up at which the model runs, and in a word which they are."""
    if not isinstance(example, Tensor) or example.ndim != 4:
        return [], "none"
    side = min(example.shape[-2:])
    candidates = SmallerInputs().candidates(side)
    legal = legal_sides(model, example, candidates)
    if len(legal) == len(candidates):
        return [], "any"
    return legal, "legal" if legal != [side] else "fixed"


def _step_costs(
    model: nn.Module, stages: tuple[Stage, ...], example: Any, legal: Sequence[int] | None, which: str
) -> tuple[StepCost, ...]:
    smaller = SmallerInputs(sides=tuple(legal) if legal else None) if which in ("any", "legal") else None
    note = "" if smaller else "inputs of full size: the model takes no smaller ones"
    try:
        sides = _spread(smaller.candidates(min(example.shape[-2:]))) if smaller else ()
        count = StepCounter(model, stages, example, sides=sides)
    except ValueError as error:  # an output without logits
        return (StepCost("common", 1.0, 1.0, 0, f"no estimate: {error}"),)
    rows = [StepCost("common", 1.0, 1.0, 0)]
    for flag, known in list(METHODS.items())[1:]:
        options = {"subnet_inputs": smaller} if flag == "st++" else {}
        flops = count.mean(known.factory(model, stages, **options), example, range(_DRAWS))
        why = note if options else ""
        rows.append(StepCost(flag, flops.shared / flops.common, flops.separate / flops.common, _DRAWS, why))
    return tuple(rows)


def _spread(sides: Sequence[int]) -> list[int]:
    """The first, the last, and some between."""
    last = len(sides) - 1
    return sorted({sides[round(last * i / (_SIDES - 1))] for i in range(_SIDES)})


def _timm_keyword(model: nn.Module, stages: Sequence[Stage]) -> str | None:
    """The argument with which timm builds an ordered subnet itself: tried, without data."""
    published: Any = getattr(model, "pretrained_cfg", None)
    if published is None or not type(model).__module__.startswith("timm."):
        return None
    import timm

    parameters = inspect.signature(type(model).__init__).parameters
    keyword = next((word for word in ("layers", "depths", "depth") if word in parameters), None)
    stage = next((s for s in reversed(stages) if len(s.legal_depths) > 1), None)
    if keyword is None or stage is None:
        return None
    depths = [s.depth - (s is stage) for s in stages]
    gone = f"{stage.blocks[-1]}."
    try:
        with torch.device("meta"):
            value = depths[0] if keyword == "depth" else tuple(depths)
            side = getattr(getattr(model, "patch_embed", None), "img_size", None)
            sized = {} if side is None else {"img_size": side}
            built = timm.create_model(published["architecture"], **{keyword: value}, **sized)
    except Exception:  # whatever timm raises at a keyword that this model does not take
        return None
    return keyword if set(built.state_dict()) == {k for k in model.state_dict() if not k.startswith(gone)} else None


def _advice(model: nn.Module, stages: Sequence[Stage], shapes: int, keyword: str | None) -> dict[str, str]:
    blocks = sum(stage.depth for stage in stages)
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    statistics = "; batch-norm statistics of the processes differ until they are merged (--dist-bn, --sync-bn)"
    recalibrate = "batch-norm statistics of a subnet are re-estimated first (--recalibrate)"
    by_timm = f"timm builds ordered subnets itself ({keyword}=...)" if keyword else "timm has no keyword for subnets"
    return {
        "compile": (
            f"compile block by block (--torchcompile): {shapes} distinct block shapes for {blocks} blocks, so about "
            f"{shapes} graphs for each size of the input{', twice with batch norm' if norms else ''}"
        ),
        "data parallel": "DistributedDataParallel, or --fsdp for weights too large; all processes draw the same subnets"
        + statistics * norms,
        "export": "; ".join(
            [by_timm if type(model).__module__.startswith("timm.") else "no timm model", *([recalibrate] * norms)]
        ),
    }
