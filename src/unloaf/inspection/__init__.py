"""A model before anything is trained: its stages, its subnets and their costs, what a step would cost."""

from unloaf.inspection.costs import cost_of_model
from unloaf.inspection.layout import LayoutRow, layout_rows, layout_table
from unloaf.inspection.model import inspect_model
from unloaf.inspection.report import BlockReport, Inspection, StageReport, StepCost, sections

__all__ = [
    "BlockReport",
    "Inspection",
    "LayoutRow",
    "StageReport",
    "StepCost",
    "cost_of_model",
    "inspect_model",
    "layout_rows",
    "layout_table",
    "sections",
]
