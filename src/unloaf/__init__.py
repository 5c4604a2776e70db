"""Train residual networks so that their subnets stop loafing: ST, ST++ and GKT with exact prefix sharing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. Names are imported on first use, so that `unloaf --help` needs no torch and
# `import unloaf` neither timm nor torchvision.
_HOMES = {
    "stages": ["NoResidualBlocksError", "Stage", "find_stages"],
    "subnet": ["Subnet", "active_subnet"],
    "sampling": ["ExponentialDecaySampler", "InterStageSampler", "OrderedSampler", "RawSampler", "StochasticSampler",
                 "enumerate_subnets"],
    "losses": ["bce_kl_loss", "direction_kl_loss", "kl_loss"],
    "inputs": ["SmallerInputs"],
    "batchnorm": ["recalibrate_bn"],
    "export": ["export_subnet"],
    "release.subnet_files": ["load_subnet"],
    "release.elastic": ["load_elastic"],
    "release.anytime_files": ["load_anytime"],
    "activation_checkpointing": ["checkpoint_blocks"],
    "compilation": ["compile_blocks"],
    "methods": ["CommonTraining", "GroundTruthTraining", "GroupKnowledgeTraining", "StepOutput", "StimulativeTraining",
                "StochasticDepth", "stimulative_plus"],
    "anytime": ["Anytime"],
    "evaluation": ["SubnetRow", "evaluate_subnets"],
    "measure.pareto": ["pick_subnet"],
    "measure.costs": ["measure_subnets"],
    "measure.exits": ["AnytimePoint", "calibrate_anytime"],
    "errors": ["CheckpointError"],
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # the same names again, for type checkers
    "Anytime", "AnytimePoint", "CheckpointError", "CommonTraining", "ExponentialDecaySampler", "GroundTruthTraining",
    "GroupKnowledgeTraining", "InterStageSampler", "NoResidualBlocksError", "OrderedSampler", "RawSampler",
    "SmallerInputs", "Stage", "StepOutput", "StimulativeTraining", "StochasticDepth", "StochasticSampler", "Subnet",
    "SubnetRow", "active_subnet", "bce_kl_loss", "calibrate_anytime", "checkpoint_blocks", "compile_blocks",
    "direction_kl_loss", "enumerate_subnets", "evaluate_subnets", "export_subnet", "find_stages", "kl_loss",
    "load_anytime", "load_elastic", "load_subnet", "measure_subnets", "pick_subnet", "recalibrate_bn",
    "stimulative_plus",
]  # fmt: skip

if TYPE_CHECKING:
    from unloaf.activation_checkpointing import checkpoint_blocks
    from unloaf.anytime import Anytime
    from unloaf.batchnorm import recalibrate_bn
    from unloaf.compilation import compile_blocks
    from unloaf.errors import CheckpointError
    from unloaf.evaluation import SubnetRow, evaluate_subnets
    from unloaf.export import export_subnet
    from unloaf.inputs import SmallerInputs
    from unloaf.losses import bce_kl_loss, direction_kl_loss, kl_loss
    from unloaf.measure.costs import measure_subnets
    from unloaf.measure.exits import AnytimePoint, calibrate_anytime
    from unloaf.measure.pareto import pick_subnet
    from unloaf.methods import (
        CommonTraining,
        GroundTruthTraining,
        GroupKnowledgeTraining,
        StepOutput,
        StimulativeTraining,
        StochasticDepth,
        stimulative_plus,
    )
    from unloaf.release.anytime_files import load_anytime
    from unloaf.release.elastic import load_elastic
    from unloaf.release.subnet_files import load_subnet
    from unloaf.sampling import (
        ExponentialDecaySampler,
        InterStageSampler,
        OrderedSampler,
        RawSampler,
        StochasticSampler,
        enumerate_subnets,
    )
    from unloaf.stages import NoResidualBlocksError, Stage, find_stages
    from unloaf.subnet import Subnet, active_subnet


def __getattr__(name: str) -> Any:
    if name == "language":  # a room of its own, whose names are said with it
        return import_module("unloaf.language")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'unloaf' has no attribute {name!r}")
    value = getattr(import_module(f"unloaf.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
