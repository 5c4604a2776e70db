"""Loss and accuracy of a network, by hand."""

import math

import pytest
import torch
from torch import nn

from unloaf.evaluation import accuracy

# Six classes. Targets: the highest logit, the lowest of six, the second highest.
SCORES = torch.tensor([[3.0, 2, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
LABELS = torch.tensor([0, 0, 1])


def cross_entropy(scores: list[float], label: int) -> float:
    return math.log(sum(math.exp(score) for score in scores)) - scores[label]


MEAN_LOSS = sum(map(cross_entropy, SCORES.tolist(), LABELS.tolist())) / 3


def test_top1_top5_and_loss_by_hand():
    result = accuracy(nn.Identity(), [(SCORES[:2], LABELS[:2]), (SCORES[2:], LABELS[2:])])
    assert (result.top1, result.top5) == pytest.approx((100 / 3, 200 / 3))
    assert result.loss == pytest.approx(MEAN_LOSS, rel=1e-6)  # float32


def test_every_example_counts_the_same_in_batches_of_different_sizes():
    whole = accuracy(nn.Identity(), [(SCORES, LABELS)])
    split = accuracy(nn.Identity(), [(SCORES[:2], LABELS[:2]), (SCORES[2:], LABELS[2:])])
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (split.top1, split.top5) == (whole.top1, whole.top5)


def test_targets_of_minus_100_are_not_counted():
    scores = torch.cat([SCORES, torch.tensor([[9.0, 0, 0, 0, 0, 0]])])
    result = accuracy(nn.Identity(), [(scores, torch.cat([LABELS, torch.tensor([-100])]))])
    assert result == accuracy(nn.Identity(), [(SCORES, LABELS)])


def test_up_to_five_classes_are_all_among_the_first_five():
    assert accuracy(nn.Identity(), [(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1]))]).top5 == 100


def test_each_position_of_a_sequence_is_an_example():
    scores = SCORES.view(1, 3, 6)
    assert accuracy(nn.Identity(), [(scores, LABELS.view(1, 3))]) == accuracy(nn.Identity(), [(SCORES, LABELS)])


@pytest.mark.parametrize("mode", [True, False])
def test_modes_are_put_back(mode):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6)).train(mode)
    model[0].train(not mode)
    accuracy(model, [(SCORES, LABELS)])
    assert [module.training for module in model.modules()] == [mode, not mode, mode]


def test_the_network_is_judged_in_evaluation_mode():
    assert accuracy(nn.Dropout(0.99), [(SCORES, LABELS)]) == accuracy(nn.Identity(), [(SCORES, LABELS)])


def test_batch_norm_statistics_stay():
    model = nn.BatchNorm1d(6)
    accuracy(model, [(SCORES, LABELS)])
    assert model.running_mean is not None
    assert model.running_mean.eq(0).all()


def test_sums_are_added_over_processes_before_they_are_divided():
    # Another process has one example with loss 2, right at once.
    other = torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    result = accuracy(nn.Identity(), [(SCORES, LABELS)], reduce=lambda sums: sums + other)
    assert (result.top1, result.top5) == pytest.approx((50, 75))
    assert result.loss == pytest.approx((3 * MEAN_LOSS + 2) / 4, rel=1e-6)


def test_autocast_around_it_does_not_matter():
    torch.manual_seed(0)
    model = nn.Linear(6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = accuracy(model, [(SCORES, LABELS)])
    assert inside == accuracy(model, [(SCORES, LABELS)])


@pytest.mark.parametrize("loader", [[], [(SCORES, torch.full((3,), -100))]])
def test_no_example_is_an_error(loader):
    with pytest.raises(ValueError, match="no example to judge on; give at least one batch"):
        accuracy(nn.Identity(), loader)
