"""One training step for each method."""

from unloaf.methods.common_training import CommonTraining
from unloaf.methods.ground_truth import GroundTruthTraining
from unloaf.methods.group_knowledge import GroupKnowledgeTraining
from unloaf.methods.step import StepOutput, TrainingMethod
from unloaf.methods.stimulative import StimulativeTraining, stimulative_plus
from unloaf.methods.stochastic_depth import StochasticDepth

__all__ = [
    "CommonTraining",
    "GroundTruthTraining",
    "GroupKnowledgeTraining",
    "StepOutput",
    "StimulativeTraining",
    "StochasticDepth",
    "TrainingMethod",
    "stimulative_plus",
]
