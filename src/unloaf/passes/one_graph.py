"""All passes in one autograd graph, for training loops that own the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from unloaf.batchnorm import frozen_statistics
from unloaf.passes.plan import SubnetPass
from unloaf.passes.replay import Readout, Session
from unloaf.passes.terms import MainLoss, StepTerms, SubnetLoss, Terms
from unloaf.stages import Stage


def one_graph(
    model: nn.Module, stages: Sequence[Stage], inputs: Any, passes: Sequence[SubnetPass]
) -> tuple[Tensor, list[Tensor]]:
    """Logits of the main network and of each request, all in one autograd graph, prefixes shared.

    For training loops that own the backward pass. Peak memory is the sum over all distinct suffixes; see
    `lean_backward`.

    Returns:
        ``(main_logits, [subnet_logits, ...])``, each (batch, ..., classes).

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> from unloaf.passes import SubnetPass, one_graph
    >>> model, x = resnet18(num_classes=5), torch.randn(2, 3, 64, 64)
    >>> stages = unloaf.find_stages(model, x)
    >>> main, [subnet] = one_graph(model, stages, x, [SubnetPass(unloaf.Subnet.from_depths(stages, (2, 2, 1, 1)))])
    >>> main.shape, subnet.shape
    (torch.Size([2, 5]), torch.Size([2, 5]))
    """
    step = one_graph_losses(model, stages, inputs, passes, main_loss=_logits, subnet_loss=_logits_of_request)
    return step.main_loss, step.subnet_losses


def _logits(logits: Tensor) -> Tensor:
    return logits


def _logits_of_request(index: int, logits: Tensor, *others: Any) -> Tensor:
    return logits


def one_graph_losses(
    model: nn.Module,
    stages: Sequence[Stage],
    inputs: Any,
    passes: Sequence[SubnetPass],
    *,
    main_loss: MainLoss,
    subnet_loss: SubnetLoss,
    readout: Readout | None = None,
) -> StepTerms:
    """The losses of the main network and of each request, all in one autograd graph; arguments as `lean_backward`."""
    session = Session(model, stages, inputs, passes, detach=False, readout=readout)
    terms, main = Terms(len(passes), main_loss, subnet_loss), session.plan.main
    with session.open():
        session.forward(main)
        terms.begin(main)
        with frozen_statistics(session.inner):
            for run in session.plan.runs:
                if run is not main:
                    session.forward(run)
                    terms.add(run)
    for run in session.plan.runs:
        session.release(run)
    return terms.result()
