"""Stochastic depth: each step trains one random subnet on the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from unloaf.methods.step import SinglePassTraining
from unloaf.methods.terms import Criterion
from unloaf.passes import Losses, Readout, SubnetPass
from unloaf.sampling import StochasticSampler, draw_generator
from unloaf.stages import Stage
from unloaf.subnet import Subnet, check_stages


class StochasticDepth(SinglePassTraining):
    """Skip each block with a probability that grows linearly with depth; the network is evaluated at full depth.

    One draw serves the whole batch, so that skipping saves time. Surviving branches are not rescaled: an activation may
    follow the sum inside the block. For per-example, rescaled drop paths use the model's own option
    (``timm.create_model(..., drop_path_rate=...)``) with `CommonTraining`.

    DistributedDataParallel has to be told to expect blocks without gradients: ``find_unused_parameters=True``.

    Args:
        model: any network.
        stages: from `find_stages`.
        final_survival: survival probability of the last block, in (0, 1].
        criterion: from (logits, targets) to a loss of shape (); default cross-entropy.
        seed: of the draws.
        readout: from the model's output to the tensor that the criterion gets, (batch, ..., classes); default the
            output itself, its ``logits`` or ``["logits"]``.

    Raises:
        ValueError: an argument out of range, stages of another model, a DistributedDataParallel that waits for the
            gradients of all blocks.

    Source: Huang et al. 2016.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(num_classes=10), torch.randn(2, 3, 64, 64)
    >>> method = unloaf.StochasticDepth(model, unloaf.find_stages(model, x), final_survival=0.5)
    >>> out = method.backward(x, torch.tensor([1, 7]))
    >>> list(out.terms), len(out.subnets)
    (['main'], 1)
    """

    trains_main = False

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        *,
        final_survival: float = 0.8,
        criterion: Criterion | None = None,
        seed: int = 0,
        readout: Readout | None = None,
    ) -> None:
        super().__init__(model, criterion=criterion, seed=seed, readout=readout)
        check_stages(model, stages)
        self.stages, self.final_survival = tuple(stages), final_survival
        self.sampler = StochasticSampler(final_survival=final_survival)
        if final_survival < 1:
            _check_waits_for_no_skipped_block(model)

    def draw(self, examples: int, side: int | None = None, *, step: int | None = None) -> list[SubnetPass]:
        """The one pass of a step, by default the next one, whatever the batch."""
        generator = draw_generator(self.seed, self.step if step is None else step, 0)
        return [SubnetPass(self.sampler.sample(self.stages, generator))]

    def _requested(self, x: Any, y: Any, subnets: Sequence[Subnet] | None) -> tuple[Any, list[SubnetPass], Losses]:
        if subnets is not None and len(subnets) != 1:
            raise ValueError(f"stochastic depth trains 1 subnet a step, but {len(subnets)} are given; give one")
        return super()._requested(x, y, subnets)


def _check_waits_for_no_skipped_block(model: nn.Module) -> None:
    """Raise ValueError for a DistributedDataParallel that would fail in its second step, after a block was skipped."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return
    if model.static_graph or not model.find_unused_parameters:
        raise ValueError(
            f"DistributedDataParallel has find_unused_parameters={model.find_unused_parameters} and "
            f"static_graph={model.static_graph}, but blocks that stochastic depth skips get no gradient; "
            "wrap the model with find_unused_parameters=True and static_graph=False"
        )
