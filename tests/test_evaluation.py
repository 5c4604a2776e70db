"""Loss and accuracy of a network, by hand, and which subnets are judged."""

import math
from collections import UserDict

import pytest
import torch
from torch import nn

import unloaf
from toy_networks import ToyNetwork
from unloaf import Stage
from unloaf.evaluation import _to_device, accuracy, choose_subnets

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


class Keyed(nn.Module):
    """Takes its inputs by name, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, scores, scale):
        return self.norm(scores) * scale


KEYED = {"dict": dict, "UserDict": UserDict}


@pytest.mark.parametrize("kind", KEYED.values(), ids=KEYED)
def test_mappings_are_judged_as_keyword_arguments(kind):
    model = Keyed()
    plain = nn.Sequential(model.norm)
    assert accuracy(model, [(kind(scores=SCORES, scale=1.0), LABELS)]) == accuracy(plain, [(SCORES, LABELS)])


@pytest.mark.parametrize("kind", KEYED.values(), ids=KEYED)
def test_tensors_of_a_mapping_are_moved_to_the_models_device(kind):
    moved = _to_device(kind(scores=SCORES, scale=1.0), torch.device("meta"))
    assert (moved["scores"].device.type, moved["scale"]) == ("meta", 1.0)


class Named(ToyNetwork):
    def forward(self, pixels):
        return super().forward(pixels)


@pytest.mark.parametrize("kind", KEYED.values(), ids=KEYED)
def test_rows_of_subnets_are_the_same_for_mappings(kind):
    torch.manual_seed(0)
    plain, named = ToyNetwork(norm=True), Named(norm=True)
    named.load_state_dict(plain.state_dict())
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    stages = unloaf.find_stages(plain, x)
    expected = unloaf.evaluate_subnets(plain, stages, [(x, y)], calibration=[x])
    data = [(kind(pixels=x), y)]
    assert unloaf.evaluate_subnets(named, stages, data, calibration=[kind(pixels=x)]) == expected
    assert unloaf.evaluate_subnets(named, stages, data, calibration=data) == expected


def test_subnets_given_as_text_are_refused():
    model = ToyNetwork()
    stages = unloaf.find_stages(model, torch.randn(2, 4))
    with pytest.raises(
        ValueError, match=r"'3' is of type str; give a Subnet, e\.g\. Subnet\.from_depths\(stages, \(3, 3\)\)"
    ):
        unloaf.evaluate_subnets(model, stages, [(torch.randn(2, 4), torch.tensor([0, 1]))], subnets=["3"])


def stages_of(*depths):
    """Stages of so many blocks, of which all but the first can be skipped."""
    return tuple(
        Stage(f"layer{i}", tuple(f"layer{i}.{j}" for j in range(n)), (False,) + (True,) * (n - 1))
        for i, n in enumerate(depths)
    )


# The eight subnets of docs/results/cifar100-cpu-trials.json, and what was drawn of 4,096 when the records were made.
@pytest.mark.parametrize(
    ("depths", "seed", "drawn"),
    [
        ((3, 3, 3), 0, ["3-2-2", "3-1-3", "2-1-3", "1-3-2", "1-2-3", "1-2-1", "1-1-3", "1-1-2"]),
        ((16, 16, 16), 3, ["13-3-16", "12-15-13", "7-3-3", "4-6-16"]),
    ],
)
def test_drawn_subnets_are_those_of_the_published_records(depths, seed, drawn):
    chosen = choose_subnets(stages_of(*depths), 1 + len(drawn), seed=seed)
    assert [str(subnet) for subnet in chosen] == ["-".join(map(str, depths)), *drawn]


def test_few_of_very_many_subnets_are_drawn_without_listing_all(monkeypatch):
    monkeypatch.setattr("unloaf.evaluation.enumerate_subnets", lambda stages: pytest.fail("all were listed"))
    stages = stages_of(*[10] * 6)
    one, again, other = (choose_subnets(stages, 5, seed=seed) for seed in (3, 3, 4))
    assert one == again
    assert one[0].depths == other[0].depths == (10,) * 6
    assert len(set(one)) == 5
    assert not set(one[1:]) & set(other[1:])  # of a million


def test_most_of_very_many_subnets_are_drawn_too():
    chosen = choose_subnets(stages_of(17, 17, 17), 4913 - 1)
    assert (str(chosen[0]), len(set(chosen))) == ("17-17-17", 4912)
