"""Which tasks there are: by the flag of `unloaf train --task`."""

from __future__ import annotations

from collections.abc import Callable

from unloaf.config import Config
from unloaf.tasks.task import Task


def _classification() -> Task:
    from unloaf.tasks.classification import Classification

    return Classification()


def _multilabel() -> Task:
    from unloaf.tasks.columns import Multilabel

    return Multilabel()


def _regression() -> Task:
    from unloaf.tasks.columns import Regression

    return Regression()


def _masked() -> Task:
    from unloaf.tasks.masked import Masked

    return Masked()


def _detection() -> Task:
    from unloaf.tasks.detection import Detection

    return Detection()


def _instance() -> Task:
    from unloaf.tasks.detection import InstanceSegmentation

    return InstanceSegmentation()


def _semantic() -> Task:
    from unloaf.tasks.semantic import Semantic

    return Semantic()


def _pose() -> Task:
    from unloaf.tasks.pose import Pose

    return Pose()


def _language() -> Task:
    from unloaf.tasks.language import Language

    return Language()


def _panoptic() -> Task:
    from unloaf.tasks.panoptic import Panoptic

    return Panoptic()


# Each imported when it is asked for: torchvision's detectors take their time.
TASKS: dict[str, Callable[[], Task]] = {
    "classification": _classification,
    "multilabel": _multilabel,
    "regression": _regression,
    "masked": _masked,
    "detection": _detection,
    "instance": _instance,
    "semantic": _semantic,
    "pose": _pose,
    "language": _language,
    "panoptic": _panoptic,
}


def task_of(config: Config) -> Task:
    """The task of a configuration."""
    return TASKS[config.task]()
