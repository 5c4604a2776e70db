"""Losses in parts: the numbers and gradients of those over all logits, whatever counts, in bounded memory."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unloaf
from unloaf.language import losses
from unloaf.language.losses import NextTokenDistance, NextTokenLoss, defer_head

CLASSES, WIDTH = 11, 5


@pytest.fixture(autouse=True)
def three_positions_at_a_time(monkeypatch):
    monkeypatch.setattr(losses, "_HELD", 3 * CLASSES + 1)


def drawn(*, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, CLASSES, bias=bias, dtype=dtype)
    for weight in head.parameters():
        nn.init.normal_(weight, generator=generator)
    student, teacher = torch.randn(2, 2, 7, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(CLASSES, (2, 7), generator=generator)
    y[0, 4:] = -100
    return head, student.requires_grad_(), teacher, y


def gradients(loss, head, student):
    return torch.autograd.grad(3.0 * loss, [student, *head.parameters()])


def agree(ours, expected, **tolerance):
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy_is_that_of_all_logits(bias):
    head, student, _, y = drawn(bias=bias)
    expected = F.cross_entropy(head(student).flatten(0, 1), y.flatten())
    loss = NextTokenLoss(head)(student, y)
    torch.testing.assert_close(loss, expected)
    agree(gradients(loss, head, student), gradients(expected, head, student))


@pytest.mark.parametrize("distance", [unloaf.kl_loss, partial(unloaf.direction_kl_loss, amplitude=2.0)])
@pytest.mark.parametrize("padded", [True, False])
def test_a_distance_is_that_of_all_logits(distance, padded):
    head, student, teacher, y = drawn()
    counted = y != -100 if padded else torch.ones_like(y, dtype=torch.bool)
    expected = distance(head(student)[counted], head(teacher)[counted].detach())
    loss = NextTokenDistance(head, distance)(student, teacher, counted=counted if padded else None)
    torch.testing.assert_close(loss, expected)
    agree(gradients(loss, head, student), gradients(expected, head, student))


def test_where_nothing_counts_the_loss_is_zero():
    head, student, teacher, y = drawn()
    nothing = torch.full_like(y, -100)
    assert NextTokenLoss(head)(student, nothing) == 0
    loss = NextTokenDistance(head)(student, teacher, counted=nothing != -100)
    assert loss == 0
    assert not torch.cat([gradient.flatten() for gradient in gradients(loss, head, student)]).any()


def test_a_frozen_head_gets_no_gradient():
    head, student, _, y = drawn()
    head.requires_grad_(False)
    (ours,) = torch.autograd.grad(NextTokenLoss(head)(student, y), student)
    (expected,) = torch.autograd.grad(F.cross_entropy(head(student).flatten(0, 1), y.flatten()), student)
    torch.testing.assert_close(ours, expected)


def test_without_gradients_the_sum_is_that_over_positions_that_count():
    head, student, _, y = drawn()
    with torch.no_grad():
        total, count = NextTokenLoss(head).summed(student, y)
        expected = F.cross_entropy(head(student).flatten(0, 1), y.flatten(), reduction="sum")
    torch.testing.assert_close(total, expected)
    assert count == 14 - 3


def test_in_bfloat16_logits_are_rounded_as_the_heads_own():
    head, student, teacher, y = drawn(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.cross_entropy(head(student).float().flatten(0, 1), y.flatten())
        loss = NextTokenLoss(head)(student, y)
        distance = NextTokenDistance(head)(student, teacher)
        of_all = unloaf.kl_loss(head(student).flatten(0, 1), head(teacher).flatten(0, 1))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(distance, of_all)
    # bfloat16 has 8 bits: both compute in it, in another order
    agree(gradients(loss, head, student), gradients(expected, head, student), rtol=0.03, atol=0.01)


def test_the_gradients_are_handed_over_once():
    head, student, _, y = drawn()
    loss = NextTokenLoss(head)(student, y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_labels_of_another_shape_are_refused():
    head, student, _, y = drawn()
    with pytest.raises(ValueError, match=r"\(2, 7, 5\), y \(2, 6\).*a label for each position"):
        NextTokenLoss(head)(student, y[:, 1:])
    with pytest.raises(ValueError, match="same tokens"):
        NextTokenDistance(head)(student, student[:, 1:])


def test_only_a_linear_layer_is_deferred():
    with pytest.raises(ValueError, match="Identity"):
        defer_head(nn.Identity())
