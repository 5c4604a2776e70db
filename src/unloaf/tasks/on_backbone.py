"""What tasks share whose network stands on a backbone of timm."""

from __future__ import annotations

from typing import Any

from unloaf.config import Config
from unloaf.data import Data
from unloaf.models.backbones import described_backbone, freezes_norms
from unloaf.tasks.task import Task


class OnBackbone(Task):
    """A task whose network stands on a backbone of timm.

    Attributes:
        builder: how the description of an exported network calls the function that builds it.
    """

    builder: str

    def _settings(self, config: Config, data: Data) -> dict[str, Any]:
        """Arguments of that function."""
        return {
            "name": config.model,
            "backbone": config.backbone,
            "num_classes": data.num_classes,
            "frozen_norms": freezes_norms(config),
        }

    def architecture(self, config: Config, data: Data) -> dict[str, Any]:
        """See `Task.architecture`; a backbone that is a folder is described, since the folder may be gone by then."""
        backbone, arguments = described_backbone(config.backbone)
        settings = self._settings(config, data) | {"backbone": backbone, "backbone_kwargs": arguments}
        return {"builder": self.builder, **settings}
