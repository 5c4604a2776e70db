"""Which methods there are: their flags, what tables and pictures call them, and what makes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from unloaf.methods.common_training import CommonTraining
from unloaf.methods.ground_truth import ground_truth_of_labels
from unloaf.methods.group_knowledge import GroupKnowledgeTraining
from unloaf.methods.step import TrainingMethod
from unloaf.methods.stimulative import StimulativeTraining, stimulative_plus
from unloaf.methods.stochastic_depth import StochasticDepth


class Method(NamedTuple):
    """A method of training.

    Attributes:
        label: in tables and pictures.
        colour: in pictures, of Okabe and Ito's palette, distinguishable with any colour vision; black for the baseline.
        factory: from (model, stages) and the method's options to the method.
    """

    label: str
    colour: str
    factory: Callable[..., TrainingMethod]


# By the flag of `unloaf train --method`; the baseline comes first.
METHODS: dict[str, Method] = {
    "common": Method("common training", "#222222", lambda model, stages, **options: CommonTraining(model, **options)),
    "stochastic-depth": Method("stochastic depth", "#8a8a8a", StochasticDepth),
    "st": Method("ST", "#0072b2", StimulativeTraining),
    "st++": Method("ST++", "#d55e00", stimulative_plus),
    "gkt": Method("GKT", "#009e73", GroupKnowledgeTraining),
    "st-star": Method("ST*", "#56b4e9", ground_truth_of_labels),
}
