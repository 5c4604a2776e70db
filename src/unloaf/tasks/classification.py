"""Classification: one class for each image, of which the network gives logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from unloaf.config import Config
from unloaf.config.figures import FIGURES
from unloaf.data import Batch, Data, EvalBatches, Images, TrainBatches, load_data
from unloaf.data.own_sets import load_own_classes
from unloaf.errors import in_one_line
from unloaf.evaluation import Accuracy, Reduction, accuracy
from unloaf.methods.step import TrainingMethod
from unloaf.models.build import build_model, draw_head, form_comes_with_weights, leaves_heads_out
from unloaf.models.own import build_own
from unloaf.models.preprocessing import describe, with_preprocessing
from unloaf.own_code import is_own
from unloaf.passes import logits_of
from unloaf.stages import Stage, evaluating, inner_module
from unloaf.tasks.methods import build_method, check_classes, stages_for
from unloaf.tasks.task import Task, Where


class Classification(Task):
    """Image sets with a label for each image; evaluated by accuracy."""

    figures = FIGURES["classification"]

    def load(self, config: Config, *, resumed: bool) -> tuple[Config, Data, str]:
        """See `Task.load`; the settings of a resumed run are filled in already."""
        config, source = (config, "") if resumed else with_preprocessing(config)
        data = load_own_classes(config) if is_own(config.dataset) else load_data(config)
        return config, data, describe(data, source)

    def check(self, config: Config, data: Data) -> None:
        """See `Task.check`."""
        check_classes(config, data.num_classes)

    def network(self, config: Config, data: Data, *, resumed: bool) -> tuple[nn.Module, tuple[str, ...]]:
        """A classifier of the data's classes."""
        if is_own(config.model):
            sizes = {"num_classes": data.num_classes, "in_chans": data.in_chans, "img_size": data.img_size}
            model = build_own(config.model, **sizes, given=config.model_arguments)
            if config.head_init is not None:
                draw_head(model, num_classes=data.num_classes, std=config.head_init)
            return model, ()
        if resumed:
            config = replace(config, pretrained=config.pretrained and form_comes_with_weights(config.model))
        model = _build(config, data)
        lines: tuple[str, ...] = ()
        if leaves_heads_out(config.model):
            lines = (f"{config.model} is built without its auxiliary heads, which no loss here would train",)
        return model, lines

    def example(self, data: Data, count: int) -> Tensor:
        """Images of zeros, (count, C, S, S)."""
        return torch.zeros(count, data.in_chans, data.img_size, data.img_size)

    def noise(self, data: Data, count: int, seed: int) -> Tensor:
        """Normally distributed, (count, C, S, S)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, data.in_chans, data.img_size, data.img_size, generator=generator)

    def find_stages(self, config: Config, model: nn.Module, data: Data) -> tuple[Stage, ...]:
        """See `Task.find_stages`."""
        example = self.example(data, 2)
        stages = stages_for(config, model, example)
        _check_logits(model, example, config.model, data.num_classes)
        _check_training_side(model, data, config.model)
        return stages

    def train_batches(self, data: Data, config: Config, where: Where) -> TrainBatches:
        """See `Task.train_batches`."""
        return TrainBatches(data, config, device=where.device, rank=where.rank, world=where.world)

    def eval_batches(self, images: Images, data: Data, config: Config, where: Where) -> EvalBatches:
        """See `Task.eval_batches`."""
        return EvalBatches(images, data, config, device=where.device, rank=where.rank, world=where.world)

    def method(
        self,
        config: Config,
        model: nn.Module,
        stages: tuple[Stage, ...],
        *,
        steps_per_epoch: int | None = None,
        batches_per_step: int = 1,
    ) -> TrainingMethod:
        """See `build_method`."""
        return build_method(config, model, stages, steps_per_epoch=steps_per_epoch, batches_per_step=batches_per_step)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], data: Data, *, reduce: Reduction | None) -> Accuracy:
        """Loss and accuracy."""
        return accuracy(inner_module(model), batches, reduce=reduce)


def _build(config: Config, data: Data) -> nn.Module:
    model = build_model(
        config.model,
        num_classes=data.num_classes,
        in_chans=data.in_chans,
        img_size=data.img_size,
        width=config.width,
        pretrained=config.pretrained,
        drop=config.drop,
        drop_path=config.drop_path,
        model_kwargs=config.model_arguments,
    )
    if config.head_init is not None:
        draw_head(model, num_classes=data.num_classes, std=config.head_init)
    return model


def _check_logits(model: nn.Module, example: Tensor, name: str, classes: int) -> None:
    with evaluating(model):
        shape = tuple(logits_of(model(example)).shape)
    if shape != (len(example), classes):
        raise ValueError(
            f"model {name}: of {len(example)} images its output has the shape {shape}, not {len(example), classes}; "
            "give a classifier of the data's classes"
        )


def _check_training_side(model: nn.Module, data: Data, name: str) -> None:
    """Blocks are looked for at the side of validation; a model for that side alone cannot be trained at another."""
    side = data.train_img_size
    if side == data.img_size:
        return
    try:
        with evaluating(model):
            model(torch.zeros(2, data.in_chans, side, side))
    except Exception as error:  # models refuse a side as they like, timm's with an AssertionError
        raise ValueError(
            f"train_img_size {side}: model {name} takes {data.img_size} pixels, not {side} ({in_one_line(error)}); "
            f"give --train-img-size {data.img_size}, or a model that takes both"
        ) from error
