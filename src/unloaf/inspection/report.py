"""What was found out about a model: as values, as text, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlockReport:
    """A block: what it is, and why it cannot be skipped if it cannot (shapes are of one example)."""

    path: str
    kind: str
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    params: int
    skippable: bool
    reason: str | None


@dataclass(frozen=True)
class StageReport:
    """A stage, its blocks, and the depths that an ordered subnet may keep of it."""

    name: str
    depths: tuple[int, ...]
    blocks: tuple[BlockReport, ...]


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a method's step relative to common training, mean over some draws."""

    method: str
    shared: float
    separate: float
    draws: int
    note: str = ""


@dataclass(frozen=True)
class Inspection:
    """What `unloaf inspect` found.

    >>> from unloaf.inspection import inspect_model
    >>> inspect_model("cifar/resnet20").subnets
    {'ordered': 27, 'inter-stage': 8, 'stochastic': 112}
    """

    model: str  # its name
    input: tuple[int, ...]  # shape of one example; of tokens, their number
    params: int
    gmacs: float  # billions of multiply-adds for one example
    stages: tuple[StageReport, ...]  # what can be skipped, and what cannot
    others: tuple[BlockReport, ...]  # blocks of the same classes that belong to no stage
    subnets: dict[str, int]  # how many there are, by rule
    smallest: dict[str, Any]  # the smallest ordered subnet: depths, parameters, GMACs
    methods: tuple[StepCost, ...]
    sides: str  # that subnets may see, from 0.43 of the full one up: any, fixed, legal ones, none (no image)
    legal_sides: tuple[int, ...]  # in pixels, if they are not any
    block_shapes: int  # distinct blocks by class, parameters and feature shapes
    timm_keyword: str | None  # argument of timm's that builds the subnet itself (layers, depths, depth)
    advice: dict[str, str]  # on compilation, data parallel training and export


@dataclass(frozen=True)
class Section:
    """A part of the text: lines before a table, which may be missing."""

    lines: tuple[str, ...]
    heads: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def sections(found: Inspection) -> list[Section]:
    """The inspection as text.

    >>> from unloaf.inspection import inspect_model
    >>> sections(inspect_model("cifar/resnet20"))[0].lines[0]
    'cifar/resnet20: 269,722 parameters, 0.04055 GMACs for an input of 3x32x32'
    """
    counts = ", ".join(f"{count:,} {rule}" for rule, count in found.subnets.items())
    small = found.smallest
    size = f"{found.params:,} parameters, {found.gmacs:.4g} GMACs"
    head = (f"{found.model}: {size} for an input of {shape_text(found.input)}",)
    after = (
        f"subnets: {counts}",
        f"smallest ordered subnet: {small['depths']}, {small['params']:,} parameters, {small['gmacs']:.4g} GMACs "
        f"({100 * small['gmacs'] / found.gmacs:.0f} %)",
        f"smaller inputs for subnets: {_sides(found)}",
    )
    return [
        Section(head, ("stage", "depths", "blocks", "cannot be skipped"), _stage_rows(found)),
        *_others(found),
        Section(
            (*after, "", "FLOPs of a step, relative to common training:"),
            ("method", "shared prefixes", "separate passes", "draws", "note"),
            tuple(
                (row.method, f"{row.shared:.2f}x", f"{row.separate:.2f}x", str(row.draws or ""), row.note)
                for row in found.methods
            ),
        ),
        Section(tuple(f"{topic}: {text}" for topic, text in found.advice.items())),
    ]


def _stage_rows(found: Inspection) -> tuple[tuple[str, ...], ...]:
    rows = []
    for stage in found.stages:
        names = [block.path.removeprefix(f"{stage.name}.") for block in stage.blocks]
        why = [f"{name} {block.reason}" for name, block in zip(names, stage.blocks, strict=True) if block.reason]
        kinds = dict.fromkeys(block.kind for block in stage.blocks)
        rows.append((stage.name, _range(stage.depths), f"{len(names)} {' + '.join(kinds)}", "; ".join(why)))
    return tuple(rows)


def _others(found: Inspection) -> list[Section]:
    if not found.others:
        return []
    rows = tuple((block.path, block.kind, block.reason or "") for block in found.others)
    return [Section(("blocks of no stage:",), ("block", "class", "cannot be skipped"), rows)]


def _range(numbers: Sequence[int]) -> str:
    """Numbers in order, "96-224" where none is left out."""
    whole = len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if whole else ", ".join(map(str, numbers))


def _sides(found: Inspection) -> str:
    return {
        "any": "any side",
        "fixed": "none, the model has a fixed size",
        "legal": f"sides {_range(found.legal_sides)}",
        "none": "none, the input is no image",
    }[found.sides]


def shape_text(shape: Sequence[int] | None) -> str:
    """The dimensions of a tensor.

    >>> shape_text((3, 224, 224))
    '3x224x224'
    """
    return "?" if shape is None else "x".join(map(str, shape))
