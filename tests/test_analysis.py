"""Judging subnets and counting what a step needs."""

import pytest
import torch
from tests.reference import separate_passes as twin
from torch import nn

import unloaf
from toy_networks import ToyNetwork
from unloaf.measure.flops import StepCounter, method_flops
from unloaf.measure.step_memory import peak_bytes
from unloaf.measure.step_time import run_step, step_time_rows
from unloaf.passes import SubnetPass, separate_backward


@pytest.fixture
def network():
    model = ToyNetwork(classes=3).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    return model, unloaf.find_stages(model, x), x, torch.randint(3, (64,))


def test_accuracy_and_loss_of_a_subnet_are_those_of_the_smaller_network(network):
    model, stages, x, y = network
    subnet = unloaf.Subnet.from_depths(stages, (2, 1))
    [row] = unloaf.evaluate_subnets(model, stages, [(x[:40], y[:40]), (x[40:], y[40:])], subnets=[subnet])
    small = nn.Sequential(*model.first[:2], model.second[0], model.head)  # built by hand
    logits = small(x)
    assert row.top1 == pytest.approx(100 * (logits.argmax(1) == y).double().mean().item())
    assert row.loss == pytest.approx(nn.functional.cross_entropy(logits.float(), y).item(), rel=1e-5)
    assert row.params == sum(p.numel() for p in small.parameters())
    assert row.top5 == 100


def test_all_ordered_subnets_are_judged_by_default_and_a_number_draws_some(network):
    model, stages, x, y = network
    rows = unloaf.evaluate_subnets(model, stages, [(x, y)])
    assert [row.depths for row in rows] == [(a, b) for a in (3, 2, 1) for b in (3, 2, 1)]
    some = unloaf.evaluate_subnets(model, stages, [(x, y)], subnets=4, seed=1)
    assert some[0].depths == (3, 3)
    assert len({row.depths for row in some}) == 4


def test_judging_leaves_the_model_as_it_was_and_reestimates_on_a_copy():
    model = ToyNetwork(classes=3, norm=True).train()
    x, y = torch.randn(64, 4), torch.randint(3, (64,))
    stages = unloaf.find_stages(model, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    subnet = unloaf.Subnet.from_depths(stages, (1, 1))
    with_main, refitted = (
        unloaf.evaluate_subnets(model, stages, [(x, y)], subnets=[subnet], calibration=batches)[0].loss
        for batches in (None, iter([x, x]))
    )
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert with_main != refitted


@pytest.mark.parametrize("subnets", [0, -3])
def test_a_number_below_one_is_refused(network, subnets):
    model, stages, x, y = network
    with pytest.raises(ValueError, match="at least 1"):
        unloaf.evaluate_subnets(model, stages, [(x, y)], subnets=subnets)


def test_an_empty_loader_is_refused(network):
    model, stages, _, _ = network
    with pytest.raises(ValueError, match="at least one batch"):
        unloaf.evaluate_subnets(model, stages, [], subnets=1)


def test_flops_of_shared_and_separate_passes_counted_by_hand(network):
    model, stages, x, _ = network
    # Multiply-adds of the toy network: a block costs in*out + out*out, the head 5*3; a backward is twice its forward,
    # but for the first layer (4*6), whose input needs no gradient.
    first, second, head = [4 * 6 + 36, 72, 72], [6 * 5 + 25, 50, 50], 15
    main = 3 * (sum(first) + sum(second) + head) - 24
    drawn = [unloaf.Subnet.from_depths(stages, depths) for depths in [(2, 3), (2, 1), (3, 2)]]
    suffixes = 3 * (sum(second) + head) + 3 * head + 3 * head
    separate = [sum(first[:a]) + sum(second[:b]) + head for a, b in [(2, 3), (2, 1), (3, 2)]]
    flops = StepCounter(model, stages, x)([SubnetPass(subnet) for subnet in drawn], main=True)
    assert flops.common == pytest.approx(2 * main)
    assert flops.shared == pytest.approx(2 * (main + suffixes))
    assert flops.separate == pytest.approx(2 * (main + 3 * sum(separate)), rel=0.02)  # first layers: up to 24 each


def test_flops_of_subnets_on_a_part_of_the_batch_counted_by_hand(network):
    model, stages, _, _ = network
    first, second, head = [4 * 6 + 36, 72, 72], [6 * 5 + 25, 50, 50], 15  # as above
    main = 3 * (sum(first) + sum(second) + head) - 24
    drawn = [unloaf.Subnet.from_depths(stages, depths) for depths in [(2, 3), (2, 1)]]
    x = torch.randn(8, 4, dtype=torch.float64)  # subnets see a quarter of it; they share with each other alone
    flops = StepCounter(model, stages, x)([SubnetPass(subnet, examples=2) for subnet in drawn], main=True)
    passes = 3 * (sum(first[:2]) + sum(second) + head) - 24 + 3 * head
    assert flops.shared == pytest.approx(2 * (main + passes / 4), rel=0.002)  # the first layer's share is a mean


def test_flops_beside_measured_times_are_those_of_the_whole_batch(network):
    model, stages, _, _ = network
    x = torch.randn(8, 4, dtype=torch.float64)
    method = unloaf.StimulativeTraining(model, stages, subnet_batch_fraction=0.25)
    [row] = step_time_rows(
        {"common": unloaf.CommonTraining(model), "st": method}, x, torch.zeros(8, dtype=torch.int64), repeats=5
    )[1:]
    flops = method_flops(method, x, range(5))
    assert row.limit == pytest.approx(flops.shared / flops.common)


def test_flops_of_resnet50_agree_with_the_published_count():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet50()
    x = torch.zeros(1, 3, 224, 224)
    stages = unloaf.find_stages(model, x)
    flops = StepCounter(model, stages, x)([], main=True)
    forward_gmacs, stem_gmacs = 4.09, 0.118  # He et al. 2016 and torchvision's table; 7x7x3x64 on 112x112
    assert flops.common / 2e9 == pytest.approx(3 * forward_gmacs - stem_gmacs, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "separate", "shared"), [("ordered", 5.08, 3.26), ("inter-stage", 6.36, 2.08)])
def test_mean_flops_of_six_subnets_of_resnet50_agree_with_the_table(sampler, separate, shared):
    torchvision = pytest.importorskip("torchvision")
    model, x = torchvision.models.resnet50(), torch.zeros(1, 3, 224, 224)
    stages = unloaf.find_stages(model, x)
    rule = unloaf.OrderedSampler() if sampler == "ordered" else unloaf.InterStageSampler()
    method = unloaf.StimulativeTraining(model, stages, sampler=rule, num_subnets=6)
    flops = method_flops(method, x, range(300))
    assert flops.separate / flops.common == pytest.approx(separate, rel=0.02)
    assert flops.shared / flops.common == pytest.approx(shared, rel=0.03)


def test_separate_passes_give_the_gradients_of_the_twin(network):
    model, stages, x, y = network
    method = unloaf.GroupKnowledgeTraining(model, stages, groups=2, loops=2)
    subnets = [request.subnet for request in method.draw(len(x), x.shape[-1])]
    method.step_in(separate_backward, x, y)
    assert twin.distance(model, twin.group_knowledge(model, stages, subnets, x, y, groups=2, loops=2, ema=0.5)) < 1e-12
    assert method.step == 1


def peak_of(method, x, y):
    return peak_bytes(method.model, lambda step: run_step(method, x, y, step), device=x.device)


def test_peak_memory_counts_saved_activations_once_and_no_parameters():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    x, y = torch.randn(16, 8), torch.randint(3, (16,))
    # Saved: x, the output of tanh (by tanh and by the last layer), log-softmax of the logits, targets, total weight,
    # and whether there was a label at all.
    by_hand = 4 * (16 * 8 + 16 * 8 + 16 * 3) + 8 * 16 + 4 + 1
    assert peak_of(unloaf.CommonTraining(model), x, y) == by_hand


def test_lean_memory_of_a_step_stays_below_one_graph():
    model = ToyNetwork(classes=3)
    x, y = torch.randn(256, 4), torch.randint(3, (256,))
    method = unloaf.StimulativeTraining(model, unloaf.find_stages(model, x), num_subnets=8)
    lean = peak_of(method, x, y)
    method.backward = lambda x, y: method(x, y).loss.backward()
    assert lean < 0.8 * peak_of(method, x, y)


def test_rows_are_relative_to_common_training(network):
    model, stages, x, y = network
    methods = {"common": unloaf.CommonTraining(model), "st": unloaf.StimulativeTraining(model, stages)}
    common, st = step_time_rows(methods, x, y, repeats=3)
    assert (common.relative, common.limit, common.relative_memory, common.separate) == (1, 1, 1, None)
    assert st.limit >= 1
    assert st.separate_limit > st.limit
    assert st.spread[0] <= st.relative <= st.spread[1]


def test_without_common_training_there_is_nothing_to_compare_with(network):
    model, stages, x, y = network
    with pytest.raises(ValueError, match="'common' must be among them"):
        step_time_rows({"st": unloaf.StimulativeTraining(model, stages)}, x, y)
