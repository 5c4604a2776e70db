"""Slow, obvious twins of the training methods: every subnet is a separate, complete forward and backward pass.

Nothing here is shared with the library but the values it draws. Blocks are skipped by a forward hook that returns the
block's input; a residual branch alone is the output minus the input, or has a zero shortcut where an activation follows
the sum; batch-norm statistics are held by momentum 0.
"""

import copy
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def logits_of_subnet(model, stages, subnet, x):
    with running_as(model, stages, subnet):
        return model(x)


@contextmanager
def running_as(model, stages, subnet):
    handles, cut = [], []
    for stage, keep, shortcut in zip(stages, subnet.keep, subnet.shortcut or subnet.keep, strict=True):
        for path, kept, with_shortcut, additive in zip(stage.blocks, keep, shortcut, stage.additive, strict=True):
            block = model.get_submodule(path)
            if not kept:
                handles.append(block.register_forward_hook(lambda m, args, out: args[0]))
            elif not with_shortcut and additive:
                handles.append(block.register_forward_hook(lambda m, args, out: out - args[0]))
            elif not with_shortcut:
                cut.append((block, block.downsample))
                block.downsample = Zero()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block, downsample in cut:
            block.downsample = downsample


def gradients(model, loss):
    return dict(zip(names(model), torch.autograd.grad(loss, list(model.parameters()), allow_unused=True), strict=True))


def names(model):
    return [name for name, _ in model.named_parameters()]


def total(grads_of_terms):
    """Sum of gradients over the loss terms, zeros where a parameter took no part."""
    return {
        name: sum((g[name] for g in grads_of_terms if g[name] is not None), torch.zeros(()))
        for name in grads_of_terms[0]
    }


def hold_statistics(model):
    held = copy.deepcopy(model)
    for module in held.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return held


def kl(student, teacher):
    """Written out: sum over classes of p (log p - log q), mean over the batch."""
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def normalised(logits, amplitude):
    """The layer-norm direction written out: zero mean, unit variance over the classes."""
    centred = logits - logits.mean(-1, keepdim=True)
    return amplitude * centred / (centred.square().mean(-1, keepdim=True) + 1e-7).sqrt()


def stimulative(model, stages, subnets, x, y, *, weight=1.0, sides=None, examples=None, view=lambda logits: logits):
    """Gradients of CE + weight * sum of KLs, one backward per term; ``view`` is what both losses see of the logits.

    Subnets run on the first ``examples`` of the batch, None for all.
    """
    model = hold_statistics(model)
    main = model(x)
    teacher = main.detach()
    terms = [gradients(model, F.cross_entropy(view(main), y))]
    for index, subnet in enumerate(subnets):
        side = x.shape[-1] if sides is None or sides[index] is None else sides[index]
        small = x if side == x.shape[-1] else F.interpolate(x, size=(side, side), mode="bilinear")
        student = logits_of_subnet(model, stages, subnet, small[:examples])
        terms.append(gradients(model, weight * kl(view(student), view(teacher[:examples]))))
    return total(terms)


def group_knowledge(model, stages, subnets, x, y, *, groups, loops, ema, weight=1.0, teacher="group", examples=None):
    """The pseudo-code of our reading of GKT, line by line; ``teacher`` is group or main."""
    model = hold_statistics(model)
    main = model(x)
    knowledge = {0: main.detach()[:examples]}
    terms = [gradients(model, F.cross_entropy(main, y))]
    drawn = iter(subnets)
    for loop in range(1, loops + 1):
        for group in range(1, groups + 1):
            student = logits_of_subnet(model, stages, next(drawn), x[:examples])
            terms.append(gradients(model, weight * kl(student, knowledge[group - 1 if teacher == "group" else 0])))
            z = student.detach()
            knowledge[group] = z if loop == 1 else ema * knowledge[group] + (1 - ema) * z
    return total(terms)


def ground_truth(model, stages, subnets, loss, batches, *, weight=1.0):
    """Gradients of any loss of the main network and each subnet, on a batch each, all begun in one random state."""
    model, state = hold_statistics(model), torch.get_rng_state()
    terms = []
    for subnet, batch in zip([None, *subnets], batches, strict=True):
        torch.set_rng_state(state)
        with running_as(model, stages, subnet) if subnet is not None else nullcontext():
            found = loss(model, batch)
        term = sum(found.values()) if isinstance(found, dict) else found
        terms.append(gradients(model, term if subnet is None else weight * term))
    return total(terms)


def distance(model, expected):
    """Norm of the difference between ``.grad`` and the expected gradients, relative to the expected global norm.

    Relative to the global norm because parameters whose true gradient is zero hold rounding noise alone.
    """
    difference = torch.stack(
        [((p.grad if p.grad is not None else 0) - expected[name]).norm() for name, p in model.named_parameters()]
    ).norm()
    return float(difference / torch.stack([g.norm() for g in expected.values()]).norm())
