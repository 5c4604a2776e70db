"""Masked images (MAE): hidden patches are reconstructed, by an encoder whose subnets are trained too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.config import Config
from unloaf.config.figures import FIGURES
from unloaf.data import Batch, Data, Images
from unloaf.data.patch_batches import PatchEvalBatches, PatchTrainBatches
from unloaf.evaluation import Reduction
from unloaf.methods.ground_truth import GroundTruthTraining
from unloaf.methods.step import TrainingMethod
from unloaf.methods.table import METHODS
from unloaf.models.masked import build_masked, masked_config, patches_of
from unloaf.stages import Stage, evaluating, find_stages, inner_module
from unloaf.tasks.classification import Classification
from unloaf.tasks.methods import drawn_weight, method_options, sampler_of
from unloaf.tasks.task import Where

_IGNORED = -100
_UNKNOWN = float("nan")


@dataclass(frozen=True)
class Reconstruction:
    """How well hidden patches are reconstructed; NaN throughout where a network gives NaN.

    Attributes:
        loss: mean squared error of the hidden pixels, in units of normalised pixels.
        explained: share of the variance of the hidden pixels that is explained, in percent.
    """

    loss: float
    explained: float


class Masked(Classification):
    """Images whose labels are not read, some of their patches hidden: ViT-MAE of transformers."""

    figures = FIGURES["masked"]

    def check(self, config: Config, data: Data) -> None:
        """See `Task.check`."""
        if data.train_img_size != data.img_size:
            raise ValueError(f"train_img_size {data.train_img_size}: a ViT-MAE has one side; leave it out")
        self._settings(config, data)

    def _settings(self, config: Config, data: Data) -> Any:
        return masked_config(
            config.model,
            in_chans=data.in_chans,
            img_size=data.img_size,
            mask_ratio=config.mask_ratio,
            norm_pix_loss=config.norm_pix_loss,
            given=config.model_arguments,
        )

    def network(self, config: Config, data: Data, *, resumed: bool) -> tuple[nn.Module, tuple[str, ...]]:
        """The autoencoder."""
        folder = Path(config.model.removeprefix("hf/")) if config.pretrained and not resumed else None
        return build_masked(self._settings(config, data), folder=folder), ()

    def architecture(self, config: Config, data: Data) -> dict[str, Any]:
        """None: what is used of it is its encoder, in another network."""
        raise ValueError(
            "task masked has no export: start a classifier from the run, --model hf/ViTForImageClassification with the "
            "same --model-kwargs, --initial-checkpoint RUN --partial-weights"
        )

    def example(self, data: Data, count: int) -> Any:
        """Images of zeros; which patches are hidden does not count."""
        return self._inputs(super().example(data, count), 0)

    def noise(self, data: Data, count: int, seed: int) -> Any:
        """Normally distributed."""
        return self._inputs(super().noise(data, count, seed), seed)

    def _inputs(self, images: Tensor, seed: int) -> dict[str, Tensor]:
        # As many numbers as there may be patches, of which the network takes its own.
        noise = torch.rand(len(images), self._patches, generator=torch.Generator().manual_seed(seed))
        return {"pixel_values": images, "noise": noise}

    def find_stages(self, config: Config, model: nn.Module, data: Data) -> tuple[Stage, ...]:
        """Those of the encoder."""
        self._patches = patches_of(inner_module(model).config)
        return find_stages(model, self.example(data, 2), within="vit")

    def train_batches(self, data: Data, config: Config, where: Where) -> Any:
        """See `Task.train_batches`."""
        return PatchTrainBatches(data, config, patches=patches_of(self._settings(config, data)), **where._asdict())

    def eval_batches(self, images: Images, data: Data, config: Config, where: Where) -> Any:
        """See `Task.eval_batches`."""
        return PatchEvalBatches(
            images, data, config, patches=patches_of(self._settings(config, data)), **where._asdict()
        )

    def inputs_of(self, batch: Batch) -> Sequence[Any]:
        """A batch of evaluation as it is."""
        return [batch.x]

    def method(
        self,
        config: Config,
        model: nn.Module,
        stages: tuple[Stage, ...],
        *,
        steps_per_epoch: int | None = None,
        batches_per_step: int = 1,
    ) -> TrainingMethod:
        """ST*: subnets of the encoder reconstruct the same hidden patches. ST: they learn the features that the main
        encoder has of the visible ones.
        """
        if config.method == "st-star":
            return GroundTruthTraining(
                model,
                stages,
                reconstruction_loss,
                sampler=sampler_of(config, stages),
                num_subnets=config.num_subnets_or_default,
                subnet_weight=drawn_weight(config, steps_per_epoch, batches_per_step),
                seed=config.seed,
                check_finite=False,  # the engine has a rule for it, which all processes must come to
            )
        options = method_options(
            config, model, stages, of_joined, steps_per_epoch=steps_per_epoch, batches_per_step=batches_per_step
        )
        if "subnet_loss" in options:
            options |= {"subnet_loss": of_features, "subnet_inputs": None}
        return METHODS[config.method].factory(model, stages, readout=joined, **options)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], data: Data, *, reduce: Reduction | None) -> Any:
        """See `reconstruction`."""
        return reconstruction(model, batches, reduce=reduce)


def reconstruction_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean squared error of the hidden pixels of a batch (x, labels), whose labels are not read."""
    x, _ = batch
    return _error(model(**x)).mean()


def _error(output: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error of the hidden pixels of each image, (B,); all have the same number of them."""
    hidden = output["hidden"]
    return (((output["logits"] - output["target"]) ** 2).mean(-1) * hidden).sum(1) / hidden.sum(1)


def joined(output: Mapping[str, Tensor]) -> Tensor:
    """What losses of ST read: each image's features of visible patches, and its error as the last number.

    >>> ones, two = torch.ones(1, 2, 3), torch.tensor([[1.0, 0.0]])
    >>> joined({"logits": 2 * ones, "target": ones, "hidden": two, "features": torch.zeros(1, 1, 2)})
    tensor([[0., 0., 1.]])
    """
    return torch.cat([output["features"].flatten(1), _error(output)[:, None]], dim=1)


def of_joined(found: Tensor, labels: Any) -> Tensor:
    """The mean error of the images."""
    return found[:, -1].mean()


def of_features(student: Tensor, teacher: Tensor, *, counted: Tensor | None = None) -> Tensor:
    """Mean squared distance of the encoders' features, the teacher's taken as constant.

    >>> of_features(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    tensor(2.)
    """
    return ((student - teacher.detach())[:, :-1] ** 2).mean()


def reconstruction(model: nn.Module, batches: Iterable[Batch], *, reduce: Reduction | None = None) -> Reconstruction:
    """The figures over the images of all processes; the modes of the modules are put back.

    Args:
        model: of `build_masked`.
        batches: of `PatchEvalBatches`.
        reduce: adds a tensor over processes.

    Raises:
        ValueError: no image counts.
    """
    network = inner_module(model)
    device = next(network.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    with evaluating(network):
        for x, y in batches:
            output = network(**x)
            counted = (output["hidden"] * (y != _IGNORED)[:, None]).double()[..., None].to(sums.device)
            target = output["target"].double().to(sums.device)
            error = (output["logits"].double().to(sums.device) - target) ** 2
            pixels = counted.sum() * target.shape[-1]
            sums += torch.stack(
                [pixels, (counted * error).sum(), (counted * target).sum(), (counted * target**2).sum()]
            )
    count, error, total, squares = (reduce(sums) if reduce else sums).tolist()
    if not count:
        raise ValueError("there is no image to evaluate on; give at least one that can be read")
    variance = squares - total**2 / count
    if error != error or not variance:
        return Reconstruction(_UNKNOWN, _UNKNOWN)
    return Reconstruction(error / count, 100 * (1 - error / variance))
