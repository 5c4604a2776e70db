"""Pose: the joints of people in given boxes, by SimpleBaseline2D; evaluated by COCO's OKS-AP and by PCK."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unloaf.config import Config
from unloaf.config.figures import FIGURES
from unloaf.config.task_checks import POSE_SIDES
from unloaf.data import Batch, Data
from unloaf.data.annotated_sets import DEFAULT_HEIGHT, load_people
from unloaf.data.people.batches import PeopleEvalBatches, PeopleTrainBatches
from unloaf.data.people.crops import mapped, width_of
from unloaf.evaluation import Reduction
from unloaf.inputs import SmallerInputs, resize
from unloaf.methods.ground_truth import GroundTruthTraining
from unloaf.methods.step import TrainingMethod
from unloaf.methods.table import METHODS
from unloaf.models.backbones import start_of
from unloaf.models.pose import build_pose
from unloaf.models.preprocessing import describe, with_colours_of_backbone
from unloaf.stages import Stage, evaluating, inner_module
from unloaf.tasks.heatmaps import errors_of, heatmap_distance, heatmap_loss, joint_loss, points_of
from unloaf.tasks.methods import drawn_weight, method_options, sampler_of, stages_for
from unloaf.tasks.on_backbone import OnBackbone
from unloaf.tasks.pose_scores import OTHER_SIGMA, Answer, correct_shares, similarity, unknown_to_coco
from unloaf.tasks.task import Where

_UNKNOWN = float("nan")


@dataclass(frozen=True)
class PoseScores:
    """How well joints are found, in percent but for the loss; NaN throughout where a network gives NaN.

    Attributes:
        loss: mean squared error of the heatmaps, those of joints without a mark taken for right.
        ap: COCO's average precision over OKS 0.50 to 0.95, one prediction for each annotated person.
        ap50: at 0.50.
        ap75: at 0.75.
        ar: average recall.
        pck20: marked joints found within 0.2 of the torso, of all whose torso is known.
        pck50: within 0.5.
    """

    loss: float
    ap: float
    ap50: float
    ap75: float
    ar: float
    pck20: float
    pck50: float


class Pose(OnBackbone):
    """The joints of people in given boxes: SimpleBaseline2D on COCO's keypoint layout."""

    figures = FIGURES["pose"]
    builder = "pose"

    def load(self, config: Config, *, resumed: bool) -> tuple[Config, Data, str]:
        """See `Task.load`."""
        if find_spec("faster_coco_eval") is None:
            raise ValueError("task pose needs faster_coco_eval: pip install 'unloaf[detection]'")
        config, source = (config, "") if resumed else with_colours_of_backbone(config)
        data = load_people(config)
        others = unknown_to_coco(data.class_names)
        if others:
            note = f"OKS: COCO has no sigma of {', '.join(others)}; it is {OTHER_SIGMA} there, as of a shoulder"
            data = replace(data, notes=(*data.notes, note))
        return config, data, describe(data, source)

    def check(self, config: Config, data: Data) -> None:
        """See `Task.check`; the configuration is looked at when it is made."""

    def network(self, config: Config, data: Data, *, resumed: bool) -> tuple[nn.Module, tuple[str, ...]]:
        """A network of the data's joints."""
        return build_pose(**self._settings(config, data), **start_of(config, resumed=resumed))

    def usage(self, data: Data) -> tuple[str, ...]:
        """What goes in and out, for the model card."""
        mean, std = (", ".join(f"{value / 255:.4g}" for value in values) for values in (data.mean, data.std))
        return (
            f"The model takes crops of one person each, RGB, (batch, 3, {data.img_size}, {width_of(data.img_size)}): "
            "the person's box, made wider or higher to that aspect and 1.25 times as large; pixels in [0, 1], less the "
            f"mean ({mean}), divided by the standard deviation ({std}). It returns heatmaps, (batch, "
            f"{data.num_classes}, height / 4, width / 4); a joint is where its heatmap is highest. The classes below "
            "are the joints.",
        )

    def example(self, data: Data, count: int) -> Tensor:
        """Crops of zeros, (count, 3, H, 3/4 H)."""
        return torch.zeros(count, data.in_chans, data.train_img_size, width_of(data.train_img_size))

    def noise(self, data: Data, count: int, seed: int) -> Tensor:
        """Normally distributed, (count, 3, H, 3/4 H)."""
        return torch.randn(self.example(data, count).shape, generator=torch.Generator().manual_seed(seed))

    def find_stages(self, config: Config, model: nn.Module, data: Data) -> tuple[Stage, ...]:
        """Those of the backbone."""
        return stages_for(config, model, self.example(data, 1), within="body")

    def train_batches(self, data: Data, config: Config, where: Where) -> PeopleTrainBatches:
        """See `Task.train_batches`."""
        return PeopleTrainBatches(data, config, **where._asdict())

    def eval_batches(self, images: Any, data: Data, config: Config, where: Where) -> PeopleEvalBatches:
        """See `Task.eval_batches`."""
        return PeopleEvalBatches(images, data, config, **where._asdict())

    def method(
        self,
        config: Config,
        model: nn.Module,
        stages: tuple[Stage, ...],
        *,
        steps_per_epoch: int | None = None,
        batches_per_step: int = 1,
    ) -> TrainingMethod:
        """ST*: subnets of the backbone learn from the joints, on smaller crops. Where a network teaches, the subnet's
        heatmaps are drawn to its heatmaps by their mean squared error: they are no logits of classes.
        """
        smaller, steps = (
            smaller_crops(config),
            {"steps_per_epoch": steps_per_epoch, "batches_per_step": batches_per_step},
        )
        if config.method == "st-star":
            return GroundTruthTraining(
                model,
                stages,
                joint_loss,
                sampler=sampler_of(config, stages),
                num_subnets=config.num_subnets_or_default,
                subnet_weight=drawn_weight(config, steps_per_epoch, batches_per_step),
                shrink=None if smaller is None else SmallerPeople(smaller),
                seed=config.seed,
                check_finite=False,  # the engine has a rule for it, which all processes must come to
            )
        options = method_options(config, model, stages, heatmap_loss, **steps)
        if "subnet_loss" in options:
            options["subnet_loss"] = heatmap_distance
        if config.method == "st++":
            options = {name: value for name, value in options.items() if name not in ("amplitude", "eps")}
            options["main_logits"] = "raw"
        if "subnet_inputs" in options:
            options["subnet_inputs"] = smaller
        return METHODS[config.method].factory(model, stages, **options)

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], data: Data, *, reduce: Reduction | None
    ) -> PoseScores:
        """See `pose_scores`."""
        return pose_scores(model, batches, data.class_names, reduce=reduce)


def smaller_crops(config: Config) -> SmallerInputs | None:
    """The sides of the crops that subnets see; None for those of the main network.

    Only those at which heatmaps have the aspect of crops, so that one of a smaller crop is one of a larger, resized:
    widths that are multiples of 12, heights of 16.

    >>> settings = dict(task="pose", dataset="coco", data_dir="x", model="simple-baseline", img_size=128)
    >>> smaller_crops(Config(**settings, method="st-star")).sides
    (48, 60, 72, 84, 96)
    """
    rule, height = config.subnet_inputs, config.train_img_size or config.img_size or DEFAULT_HEIGHT
    if rule == "same" or (rule == "auto" and config.method not in ("st++", "st-star")):
        return None
    every = SmallerInputs(config.min_ratio).candidates(width_of(height))
    sides = config.sides or tuple(side for side in every if side % POSE_SIDES == 0)
    return SmallerInputs(config.min_ratio, per=config.per, sides=sides)


@dataclass(frozen=True)
class SmallerPeople:
    """Crops at a randomly drawn smaller side, and the joints that go with them: what subnets see in ST*.

    Attributes:
        inputs: the widths.

    Source: Ye et al. 2023 (ST++), random smaller inputs in fine-tuning.

    >>> smaller = SmallerPeople(SmallerInputs(sides=(12,)))
    >>> crops, joints = smaller((torch.zeros(1, 3, 32, 24), torch.tensor([[[6.0, 20.0, 1.0]]])), torch.Generator())
    >>> crops.shape, joints.tolist()
    (torch.Size([1, 3, 16, 12]), [[[3.0, 10.0, 1.0]]])
    """

    inputs: SmallerInputs

    @property
    def per(self) -> str:
        """Whether each subnet or each step has a side of its own."""
        return self.inputs.per

    def __call__(self, batch: Any, generator: torch.Generator) -> Any:
        """The batch at one smaller side."""
        crops, joints = batch
        smaller = resize(crops, self.inputs.draw(min(crops.shape[-2:]), generator))
        across, down = (smaller.shape[axis] / crops.shape[axis] for axis in (-1, -2))
        return smaller, joints * joints.new_tensor([across, down, 1.0])


def pose_scores(
    model: nn.Module, batches: Iterable[Batch], names: Sequence[str], *, reduce: Reduction | None = None
) -> PoseScores:
    """The figures of a network, over the batches of all processes; the modes of the modules are put back.

    Args:
        model: from crops, (B, 3, H, W), to heatmaps, (B, K, H / 4, W / 4).
        batches: of `PeopleEvalBatches`.
        names: of the joints.
        reduce: adds a tensor over processes.

    Raises:
        ValueError: there is nobody.
    """
    network = inner_module(model)
    device = next(network.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    answers: list[Answer] = []
    with evaluating(network):
        for crops, people in batches:
            counted = [at for at, judged in enumerate(people) if judged is not None]
            if not counted:
                network(crops)  # all processes run alike
                continue
            heatmaps, judged = network(crops)[counted], [people[at] for at in counted]
            errors = errors_of(heatmaps, torch.stack([one.joints for one in judged]).to(heatmaps.device))
            sums += torch.stack([errors.double().sum(), torch.tensor(errors.numel()).to(errors)]).to(sums)
            answers += _answers(heatmaps, judged)
    error, count = (reduce(sums) if reduce else sums).tolist()
    answers = _of_all(answers)
    if not count:
        raise ValueError("there is nobody to evaluate on; give people with marked joints")
    if error != error:
        return PoseScores(*(_UNKNOWN,) * 7)
    found, shares = similarity(answers, names), correct_shares(answers, names)
    return PoseScores(error / count, found.ap, found.ap50, found.ap75, found.ar, *shares)


def _answers(heatmaps: Tensor, people: Sequence[Any]) -> list[Answer]:
    points, highest = (values.double().cpu() for values in points_of(heatmaps))
    return [
        Answer(one.person, one.others, mapped(where, one.to_image), float(values.mean()))
        for one, where, values in zip(people, points, highest, strict=True)
    ]


def _of_all(answers: list[Answer]) -> list[Answer]:
    """Those of all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return answers
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, answers)
    return [answer for part in parts for answer in part]
