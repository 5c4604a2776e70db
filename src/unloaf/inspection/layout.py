"""Stage layouts of models side by side (Ye et al. 2023, ST++, figure 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unloaf.inspection.report import BlockReport, Inspection, shape_text


@dataclass(frozen=True)
class LayoutRow:
    """A stage of a model, or, as the last one of a model, the blocks of the same classes that belong to no stage.

    Attributes:
        model: its name.
        stage: its name; "" of the blocks that belong to none.
        blocks: how many there are.
        skippable: how many of them can be skipped.
        share: of all blocks of the model, in percent.
        shape: of one example behind the stage; "" where blocks have several.
        params: their parameters.
    """

    model: str
    stage: str
    blocks: int
    skippable: int
    share: float
    shape: str
    params: int


def layout_rows(found: Sequence[Inspection]) -> list[LayoutRow]:
    """A row for each stage of each model.

    >>> from unloaf.inspection import inspect_model
    >>> [(row.stage, row.blocks, row.skippable, row.shape) for row in layout_rows([inspect_model("cifar/resnet20")])]
    [('layer1', 3, 3, '16x32x32'), ('layer2', 3, 2, '32x16x16'), ('layer3', 3, 2, '64x8x8')]
    """
    rows = []
    for model in found:
        groups = {stage.name: stage.blocks for stage in model.stages} | ({"": model.others} if model.others else {})
        total = sum(map(len, groups.values()))
        rows += [_row(model.model, name, blocks, total) for name, blocks in groups.items()]
    return rows


def _row(model: str, stage: str, blocks: Sequence[BlockReport], total: int) -> LayoutRow:
    shapes = {block.output_shape for block in blocks}
    return LayoutRow(
        model=model,
        stage=stage,
        blocks=len(blocks),
        skippable=sum(block.skippable for block in blocks),
        share=100 * len(blocks) / total,
        shape=shape_text(shapes.pop()) if len(shapes) == 1 else "",
        params=sum(block.params for block in blocks),
    )


def layout_table(rows: Sequence[LayoutRow]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells."""
    lines = [
        [row.model, row.stage or "(no stage)", str(row.blocks), str(row.skippable), f"{row.share:.0f}", row.shape,
         f"{row.params:,}"]
        for row in rows
    ]  # fmt: skip
    return ["model", "stage", "number", "skippable", "share %", "shape", "parameters"], lines
