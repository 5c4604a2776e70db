"""All passes in one autograd graph, for training loops that own the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from unloaf.passes.guards import check_gradient, refuse_inference_mode
from unloaf.passes.plan import SubnetPass
from unloaf.passes.replay import Session
from unloaf.passes.terms import Losses, StepTerms
from unloaf.stages import Stage


def one_graph(
    model: nn.Module, stages: Sequence[Stage], inputs: Any, passes: Sequence[SubnetPass], losses: Losses
) -> StepTerms:
    """The losses of the main network and of each request, all in one autograd graph; arguments as `lean_backward`.

    Peak memory is the sum over all distinct suffixes.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> from unloaf.passes import Losses, SubnetPass, one_graph
    >>> model, x = resnet18(num_classes=5), torch.randn(2, 3, 64, 64)
    >>> stages = unloaf.find_stages(model, x)
    >>> passes = [SubnetPass(unloaf.Subnet.from_depths(stages, (2, 2, 1, 1)))]
    >>> losses = Losses(main=lambda logits: logits.logsumexp(1).mean(), subnet=lambda i, logits, *_: logits.mean())
    >>> terms = one_graph(model, stages, x, passes, losses)
    >>> terms.main_loss.shape, len(terms.subnet_losses)
    (torch.Size([]), 1)
    """
    refuse_inference_mode()
    session = Session(model, stages, inputs, passes, losses, detach=False)
    first, *moves = [move for move in session.plan.moves() if move.kind == "forward"]
    with session.statistics.unless_raised():
        with session.open():
            session.forward(first)
            with session.statistics.frozen() as session.rewind:
                for move in moves:
                    session.forward(move)
        step = session.terms.result()
        has_one = any(loss.requires_grad for loss in (step.main_loss, *step.subnet_losses))
        check_gradient(has_one or not torch.is_grad_enabled())
    return step
