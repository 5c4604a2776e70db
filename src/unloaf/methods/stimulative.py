"""Stimulative training (ST) and its extended form ST++: one class, options on or off."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from unloaf.inputs import SmallerInputs, check_sides, fitting_inputs
from unloaf.losses import Norm, direction_kl_loss, kl_loss, resolve_amplitude
from unloaf.methods.changed_inputs import ChangedInputs, InputRule
from unloaf.methods.step import SubnetTraining, Weight, check_count
from unloaf.methods.terms import Criterion, DirectionCriterion, Distance
from unloaf.passes import Readout, SubnetPass
from unloaf.sampling import InterStageSampler, OrderedSampler, Sampler, draw_generator
from unloaf.stages import Stage
from unloaf.subnet import Subnet


class StimulativeTraining(SubnetTraining):
    """Each step trains the main network on the labels and sampled subnets on the main network's prediction.

    ``L = criterion(z_main, y) + subnet_weight * sum_i subnet_loss(z_i, z_main)``, no gradient through the teacher.

    Args:
        model: the network, possibly wrapped by DistributedDataParallel.
        stages: from `find_stages`.
        sampler: the rule that draws subnets; default `OrderedSampler`.
        num_subnets: subnets per step; their losses are summed.
        subnet_loss: from (student logits, teacher logits) to a loss of shape ().
        subnet_inputs: `SmallerInputs`, None for the main network's input, or "auto": `SmallerInputs` with the sides
            that the model takes, and the main network's input, with a warning, where it takes no smaller ones. Or any
            function (batch, generator) that returns another batch of as many examples: it is called for each subnet
            with a generator of its own or, if it has an attribute ``per = "step"``, once for all subnets of a step.
        subnet_weight: weight of each subnet's loss, 0 or above, or a function from the step, counted from 0, to such a
            number; in a step of weight 0 no subnet is run.
        subnet_batch_fraction: share of the batch in (0, 1], its first examples and at least two, that subnets are
            trained on. Below 1 they share no block with the main network.
        criterion: from (logits, targets) to a loss of shape (); default cross-entropy, which also takes soft labels.
        seed: of the draws.
        readout: from the model's output to the tensor that criterion and subnet_loss get, (batch, ..., classes);
            default the output itself, its ``logits`` or ``["logits"]``.

    Raises:
        ValueError: an argument out of range, stages of another model, sides the model cannot take.

    Source: Ye et al. 2022 (ST), equation 2; Ye et al. 2023 (ST++) for the options.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(num_classes=10), torch.randn(2, 3, 64, 64)
    >>> method = unloaf.StimulativeTraining(model, unloaf.find_stages(model, x))
    >>> out = method.backward(x, torch.tensor([1, 7]))
    >>> list(out.terms), out.logits.shape
    (['main', 'subnet0'], torch.Size([2, 10]))
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        *,
        sampler: Sampler | None = None,
        num_subnets: int = 1,
        subnet_loss: Distance = kl_loss,
        subnet_inputs: SmallerInputs | InputRule | Literal["auto"] | None = None,
        subnet_weight: Weight = 1.0,
        subnet_batch_fraction: float = 1.0,
        criterion: Criterion | None = None,
        seed: int = 0,
        readout: Readout | None = None,
    ) -> None:
        super().__init__(
            model,
            stages,
            criterion=criterion,
            subnet_loss=subnet_loss,
            readout=readout,
            subnet_weight=subnet_weight,
            subnet_batch_fraction=subnet_batch_fraction,
            seed=seed,
        )
        self.sampler = sampler if sampler is not None else OrderedSampler()
        self.sampler.sample(self.stages, draw_generator(seed, 0, 0))  # a space that does not fit is reported here
        self.num_subnets = check_count("num_subnets", num_subnets)
        shape = self.stages[0].input_shape if self.stages else None
        self._fitting: dict[int, SmallerInputs | None] = {}  # by the side of the images
        if isinstance(subnet_inputs, str) and subnet_inputs == "auto":
            self.subnet_inputs = fitting_inputs(model, SmallerInputs(), shape)
            if shape is not None and len(shape) == 3:
                self._fitting[min(shape[1:])] = self.subnet_inputs
            return
        if isinstance(subnet_inputs, (str, type)) or not (
            subnet_inputs is None or isinstance(subnet_inputs, SmallerInputs) or callable(subnet_inputs)
        ):
            raise ValueError(
                f"subnet_inputs is {subnet_inputs!r}; give SmallerInputs(...), 'auto' or None, or a function of "
                "(batch, generator)"
            )
        self.subnet_inputs = subnet_inputs
        if isinstance(subnet_inputs, SmallerInputs) and shape is not None:
            check_sides(model, subnet_inputs, shape)

    def _draw_subnets(self, step: int) -> list[Subnet]:
        generators = [draw_generator(self.seed, step, index) for index in range(self.num_subnets)]
        return [self.sampler.sample(self.stages, generator) for generator in generators]

    def _request(self, index: int, subnet: Subnet, side: int | None, step: int) -> SubnetPass:
        rule = self._rule(side)
        if rule is None:
            return SubnetPass(subnet)
        if not isinstance(rule, SmallerInputs):
            change = ChangedInputs.of(rule, "subnet_inputs", seed=self.seed, step=step, index=index)
            return SubnetPass(subnet, change=change)
        if side is None:
            raise ValueError("smaller inputs need x as images (batch, channels, height, width); set subnet_inputs=None")
        drawn = rule.draw(side, draw_generator(self.seed, step, 0 if rule.per == "step" else index, purpose="side"))
        return SubnetPass(subnet, None if drawn == side else drawn)  # the full one shares the main network's prefix

    def _rule(self, side: int | None) -> SmallerInputs | InputRule | None:
        """What subnets see; of sides that were found to fit images of one size, those that fit this one."""
        shape = self.stages[0].input_shape if self._fitting else None
        if (
            shape is None
            or self.subnet_inputs is not self._fitting[min(shape[1:])]
            or self.subnet_inputs == SmallerInputs()
        ):
            return self.subnet_inputs
        if side is not None and side not in self._fitting:
            sides = (round(length * side / min(shape[1:])) for length in shape[1:])
            self._fitting[side] = fitting_inputs(self.model, SmallerInputs(), (shape[0], *sides))
        return self._fitting[min(shape[1:]) if side is None else side]

    def teacher_of(self, index: int, main: Tensor, known: Sequence[Tensor | None]) -> Tensor:
        """The main network."""
        return main


def stimulative_plus(
    model: nn.Module,
    stages: Sequence[Stage],
    *,
    sampler: Sampler | None = None,
    num_subnets: int = 6,
    subnet_loss: Distance | None = None,
    subnet_inputs: SmallerInputs | InputRule | Literal["auto"] | None = "auto",
    amplitude: float | Literal["auto"] = "auto",
    norm: Norm = "layer_norm",
    eps: float = 1e-7,
    main_logits: Literal["direction", "raw"] = "direction",
    subnet_weight: Weight | None = None,
    subnet_batch_fraction: float = 1.0,
    criterion: Criterion | None = None,
    seed: int = 0,
    readout: Readout | None = None,
) -> StimulativeTraining:
    """ST++: `StimulativeTraining` with KL-, several subnets, random smaller inputs and inter-stage sampling.

    Args:
        model: the network.
        stages: from `find_stages`.
        sampler: the rule that draws subnets; default `InterStageSampler`.
        num_subnets: subnets per step, 6 in the paper.
        subnet_loss: default KL-, `direction_kl_loss` with this amplitude, norm and eps.
        subnet_inputs: "auto" for `SmallerInputs` with the sides that the model takes, or the main network's input, with
            a warning, where it takes no smaller ones; else as `StimulativeTraining`.
        amplitude: scale of the directions, see `direction_kl_loss`; the published runs used 1 on 1,000 classes.
        norm: form of the direction, "layer_norm" (published runs) or "l2" (text of the paper).
        eps: added to the variance (layer_norm), where two classes need 0.1 at least, or bounds the length from below
            (l2).
        main_logits: what the criterion sees, the direction of the logits (published runs) or the raw logits.
        subnet_weight: weight of each subnet's loss, 0 or above, or a function from the step, counted from 0, to such a
            number; in a step of weight 0 no subnet is run. Default: ``1 / num_subnets``, one for all together; the
            published runs, on 1,000 classes, gave each subnet 1.
        subnet_batch_fraction: share of the batch in (0, 1], its first examples and at least two, that subnets are
            trained on. Below 1 they share no block with the main network.
        criterion: from (logits, targets) to a loss of shape (); default cross-entropy.
        seed: of the draws.
        readout: from the model's output to the tensor that criterion and subnet_loss get, (batch, ..., classes);
            default the output itself, its ``logits`` or ``["logits"]``.

    Raises:
        ValueError: as `StimulativeTraining`.

    Source: Ye et al. 2023 (ST++), section 3.3.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(num_classes=10), torch.randn(2, 3, 64, 64)
    >>> method = unloaf.stimulative_plus(model, unloaf.find_stages(model, x), num_subnets=2)
    >>> list(method.backward(x, torch.tensor([1, 7])).terms)
    ['main', 'subnet0', 'subnet1']
    """
    if main_logits not in ("direction", "raw"):
        raise ValueError(f"main_logits is {main_logits!r}; give 'direction' or 'raw'")
    resolve_amplitude(amplitude, 2, norm)  # an amplitude or norm that does not exist is reported here
    criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
    return StimulativeTraining(
        model,
        stages,
        sampler=sampler if sampler is not None else InterStageSampler(),
        num_subnets=num_subnets,
        subnet_loss=subnet_loss or partial(direction_kl_loss, amplitude=amplitude, norm=norm, eps=eps),
        subnet_inputs=subnet_inputs,
        subnet_weight=1 / check_count("num_subnets", num_subnets) if subnet_weight is None else subnet_weight,
        subnet_batch_fraction=subnet_batch_fraction,
        criterion=DirectionCriterion(criterion, amplitude, norm, eps) if main_logits == "direction" else criterion,
        seed=seed,
        readout=readout,
    )
