"""A run opened to be exported: its network with the weights of a checkpoint, and what its files are to say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.batchnorm import recalibrate_bn
from unloaf.config import Config
from unloaf.data.fingerprint import read_listing
from unloaf.engine.changed_images import check_judged
from unloaf.engine.setup import Training
from unloaf.evaluation import Accuracy, accuracy
from unloaf.export import export_subnet
from unloaf.measure.costs import gmacs
from unloaf.models.hf import transformers_config
from unloaf.printable import printable
from unloaf.runs import judge as runs
from unloaf.stages import inner_module
from unloaf.subnet import Subnet


@dataclass(frozen=True)
class OpenedRun:
    """A run at one of its checkpoints.

    Attributes:
        run: its folder.
        config: its settings, as it was trained; of a model's folder the last part alone.
        training: its data, its network with the checkpoint's weights, its stages.
        checkpoint: name of the checkpoint's folder.
        epoch: whole epochs that were trained by then.
        weights: "model", or "model_ema" for the moving average.
        recalibrate: training images for the statistics of a subnet; 0 leaves them as they are.
        notes: what a reader has to know of the checkpoint.
    """

    run: Path
    config: Config
    training: Training
    checkpoint: str
    epoch: int
    weights: str
    recalibrate: int
    notes: tuple[str, ...]

    @property
    def network(self) -> nn.Module:
        """The main network."""
        return inner_module(self.training.model)

    @property
    def architecture(self) -> dict[str, Any]:
        """Arguments of `build_model` for the main network, without what only training needs.

        A network of transformers has its whole configuration among them, as ``config``: the folder that it was built
        from may be gone, and default values change from version to version.
        """
        config, data = self.config, self.training.data
        settings = {"name": config.model, "num_classes": data.num_classes, "in_chans": data.in_chans}
        settings |= {"img_size": data.img_size, "width": config.width}
        if config.model_kwargs:
            settings["model_kwargs"] = config.model_arguments
        if config.model.startswith("hf/"):
            settings["config"] = transformers_config(self.network)
        return settings

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the outputs stand for, in their order; numbers where the classes of the run have no names."""
        return tuple(printable(name) for name in self.training.data.class_names)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes an input: mean and std are in units of the pixel range [0, 1].

        Files are resized to input_size / crop_pct and cut out in the centre; they alone have a ``crop_mode``.
        """
        data = self.training.data
        crop: dict[str, Any] = {"crop_pct": 1.0}
        if self.config.dataset in ("imagefolder", "hf", "webdataset"):
            crop = {"crop_pct": data.crop_pct, "crop_mode": "center"}
        return {
            "input_size": [data.in_chans, data.img_size, data.img_size],
            "mean": [value / 255 for value in data.mean],
            "std": [value / 255 for value in data.std],
            "interpolation": data.resize_mode,
            **crop,
        }

    def noise(self, batch: int, seed: int) -> Tensor:
        """Inputs on which two forms of the network are compared, on the CPU."""
        data = self.training.data
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, data.in_chans, data.img_size, data.img_size, generator=generator)

    def calibration(self) -> Iterator[Tensor]:
        """Training images from which the statistics of a subnet are estimated, on the run's device."""
        device = self.training.device
        return (batch[0].to(device) for batch in self.training.calibration_batches())

    def subnet(self, subnet: Subnet) -> nn.Module:
        """A subnet as a network of its own; all but the whole network have their statistics re-estimated."""
        stages = self.training.stages
        network = export_subnet(self.network.eval(), stages, subnet)
        if self.recalibrate and subnet != Subnet.full(stages):
            recalibrate_bn(network, self.calibration())
        return network

    def measure(self, network: nn.Module) -> dict[str, Accuracy]:
        """Accuracy of a network on the run's validation and test images, as far as there are any."""
        data = self.training.data
        splits = ["val"] if data.test is data.val else ["val", "test"]
        network.to(self.training.device)
        return {
            name: accuracy(network, self.training.eval_batches(name)) for name in splits if len(getattr(data, name))
        }

    def cost(self, network: nn.Module) -> tuple[int, float]:
        """Parameters, and billions of multiply-adds for one image."""
        image = self.noise(1, 0).to(next(network.parameters()).device)
        return sum(p.numel() for p in network.parameters()), gmacs(network, image)


def open_trained(
    run: Path,
    *,
    checkpoint: str = "last",
    ema: bool = False,
    recalibrate: int | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    need_subnets: bool = True,
) -> OpenedRun:
    """Opens a run as `judge_run` does; writes nothing, and the run may still be training.

    Raises:
        ValueError: the folder is no run, has no such checkpoint or images, ``recalibrate`` is out of range, or the
            network has no subnets, though they are needed.
        CheckpointError: no checkpoint is intact.
    """
    if recalibrate is not None and recalibrate != 0 and recalibrate < 2:
        raise ValueError(f"recalibrate {recalibrate}: give at least 2 images, or 0 to leave the statistics as they are")
    config, found, weights, notes = runs.open_checkpoint(run, checkpoint, ema=ema)
    training = runs.prepare_for_one_process(
        config, found, recalibrate=recalibrate or None, data_dir=data_dir, device=device
    )
    listed = read_listing(run / "images.csv.gz")
    notes += check_judged(training.data, found, config, listed, place=data_dir)
    runs.load_weights(inner_module(training.model), found, weights)
    if need_subnets and not training.stages:
        raise ValueError(f"{run}: its network has no residual blocks that could be skipped, so it has no subnets")
    position: Any = found.state["position"]
    return OpenedRun(
        run=run,
        config=dataclasses.replace(config, model=_without_place(config.model)),
        training=training,
        checkpoint=found.path.name,
        epoch=position["epoch"] - 1,
        weights=weights,
        recalibrate=config.recalibrate if recalibrate is None else recalibrate,
        notes=tuple(notes),
    )


def _without_place(model: str) -> str:
    """hf/vit for hf/configurations/vit: files that are handed on do not tell where things lay."""
    return f"hf/{Path(model).name}" if model.startswith("hf/") else model
