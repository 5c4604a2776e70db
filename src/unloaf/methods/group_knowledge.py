"""Group knowledge based training (GKT): nested subnets, each group taught by the group above it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from unloaf.losses import at_least_float32, kl_loss
from unloaf.methods.step import SubnetTraining, Weight, check_count
from unloaf.methods.terms import Criterion, Distance
from unloaf.passes import Readout, SubnetPass
from unloaf.sampling import ExponentialDecaySampler, Sampler, sample_chains
from unloaf.stages import Stage
from unloaf.subnet import Subnet


class GroupKnowledgeTraining(SubnetTraining):
    """Chains of nested subnets; the subnet of group g learns from the knowledge of group g - 1.

    Each of ``loops`` chains samples ``groups`` subnets, each inside the one before. Group 0 is the main network. The
    knowledge of a group is the logits of its subnet in the first loop and a running average over the loops after that:
    ``K[g] = ema * K[g] + (1 - ema) * z``, without gradient.

    Args:
        model: the network, possibly wrapped by DistributedDataParallel.
        stages: from `find_stages`.
        groups: subnets per chain.
        loops: chains per step.
        ema: weight of a group's earlier knowledge, in [0, 1); without effect if the main network teaches.
        teacher: who teaches a subnet: "group", the group above it, or "main", the main network, for comparison.
        sampler: the rule that draws a subnet inside its parent; default `ExponentialDecaySampler(base=0.5)`.
        subnet_loss: from (student logits, teacher logits) to a loss of shape ().
        subnet_weight: weight of each subnet's loss, 0 or above, or a function from the step, counted from 0, to such a
            number; in a step of weight 0 no subnet is run.
        subnet_batch_fraction: share of the batch in (0, 1], its first examples and at least two, that subnets are
            trained on. Below 1 they share no block with the main network.
        criterion: from (logits, targets) to a loss of shape (); default cross-entropy.
        seed: of the draws.
        readout: from the model's output to the tensor that criterion and subnet_loss get, (batch, ..., classes);
            default the output itself, its ``logits`` or ``["logits"]``.

    Raises:
        ValueError: an argument out of range, stages of another model.

    Source: our reading of Tang et al. 2023 (GKT), abstract and figure 3; no code was published.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(num_classes=10), torch.randn(2, 3, 64, 64)
    >>> method = unloaf.GroupKnowledgeTraining(model, unloaf.find_stages(model, x), groups=2, loops=1)
    >>> out = method.backward(x, torch.tensor([1, 7]))
    >>> list(out.terms), out.subnets[1] <= out.subnets[0]
    (['main', 'loop0_group1', 'loop0_group2'], True)
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        *,
        groups: int = 3,
        loops: int = 2,
        ema: float = 0.5,
        teacher: Literal["group", "main"] = "group",
        sampler: Sampler | None = None,
        subnet_loss: Distance = kl_loss,
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
        self.groups, self.loops = check_count("groups", groups), check_count("loops", loops)
        if not 0 <= ema < 1:
            raise ValueError(f"ema is {ema}; give a number from 0 (the latest subnet alone) to below 1")
        if teacher not in ("group", "main"):
            raise ValueError(f"teacher is {teacher!r}; give 'group' (the group above) or 'main' (the main network)")
        self.ema, self.teacher = ema, teacher
        self.sampler = sampler if sampler is not None else ExponentialDecaySampler()
        sample_chains(self.sampler, self.stages, groups=1, chains=1, seed=seed, step=0)  # a space that does not fit

    def _draw_subnets(self, step: int) -> list[Subnet]:
        chains = {"groups": self.groups, "chains": self.loops, "seed": self.seed, "step": step}
        return sample_chains(self.sampler, self.stages, **chains)

    def _passes(self, subnets: Sequence[Subnet], examples: int, side: int | None, step: int) -> list[SubnetPass]:
        count = self.groups * self.loops
        if len(subnets) != count:
            raise ValueError(
                f"{len(subnets)} subnets are given for {self.loops} loops of {self.groups} groups; give {count}"
            )
        return super()._passes(subnets, examples, side, step)

    def _request(self, index: int, subnet: Subnet, side: int | None, step: int) -> SubnetPass:
        return SubnetPass(subnet, needs=self._teachers(index))

    def _teachers(self, index: int) -> tuple[int, ...]:
        """The passes whose logits make up the teacher of this one; none, where that is the main network."""
        group = index % self.groups
        # the group above, in all loops so far
        return tuple(range(group - 1, index, self.groups)) if group and self.teacher == "group" else ()

    def teacher_of(self, index: int, main: Tensor, known: Sequence[Tensor | None]) -> Tensor:
        """The knowledge of the group above, or the main network."""
        teacher = main
        for loop, position in enumerate(self._teachers(index)):
            logits = known[position]
            assert logits is not None  # asked for in SubnetPass.needs
            logits = at_least_float32(logits)
            teacher = logits if loop == 0 else self.ema * teacher + (1 - self.ema) * logits
        return teacher

    def _term_name(self, index: int) -> str:
        loop, group = divmod(index, self.groups)
        return f"loop{loop}_group{group + 1}"
