"""A model before anything is trained: its stages, its subnets and their costs, what a step would cost."""

from unloaf.inspection.costs import cost_of_model
from unloaf.inspection.model import inspect_model
from unloaf.inspection.report import BlockReport, Inspection, StageReport, StepCost, sections

__all__ = [
    "BlockReport",
    "Inspection",
    "StageReport",
    "StepCost",
    "cost_of_model",
    "inspect_model",
    "sections",
]
