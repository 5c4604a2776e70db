"""Batches other than many examples with a class each: a class for every position, shares of classes, one example."""

import pytest
import torch
import torch.nn.functional as F
from tests.reference import separate_passes as twin
from torch import nn

import unloaf
from test_methods_bad_input import CALLS, METHODS, WITH_SUBNETS, every_call, every_method, refuses, toy
from toy_networks import ToyNetwork
from unloaf.models.build import build_model

TOLERANCE = 1e-12  # of the global norm, in float64


def dense(kind=ToyNetwork):
    """Logits (batch, height, width, 3) of the toy network, whose layers work on the last axis, and a class for each."""
    torch.manual_seed(0)
    model = kind(norm=False).double().train()
    model(torch.randn(2, 5, 7, 4).double()).square().sum().backward()  # gradients to lose
    stages = unloaf.find_stages(ToyNetwork(norm=False), torch.randn(2, 4))
    return model, stages, torch.randn(2, 5, 7, 4).double(), torch.randint(3, (2, 5, 7))


def raw(name):
    """Options with which the criterion sees the logits as they are."""
    return {"main_logits": "raw"} if name == "st++" else {}


def mean_cross_entropy(logits, y):
    """Over all positions, written out."""
    return -torch.log_softmax(logits, -1).gather(-1, y[..., None]).mean()


# --- a class for every position


@every_method
@every_call
def test_the_loss_of_dense_logits_is_the_mean_over_all_positions(name, call):
    model, stages, x, y = dense()
    out = call(METHODS[name](model, stages, **raw(name)), x, y)
    torch.testing.assert_close(out.terms["main"], mean_cross_entropy(out.logits, y), rtol=TOLERANCE, atol=0)


@every_call
def test_st_plus_sees_directions_at_every_position(call):
    model, stages, x, y = dense()
    out = call(METHODS["st++"](model, stages, amplitude=2.0), x, y)
    expected = mean_cross_entropy(twin.normalised(out.logits, 2.0), y)
    torch.testing.assert_close(out.terms["main"], expected, rtol=1e-9, atol=0)  # eps is added in another order


@pytest.mark.parametrize("mode", CALLS)
def test_gradients_of_dense_logits_are_those_of_separate_passes(mode):
    model, stages, x, y = dense()
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in ((3, 2), (1, 1))]
    model.zero_grad()
    out = CALLS[mode](unloaf.StimulativeTraining(model, stages, num_subnets=2), x, y, subnets=subnets)
    if mode == "forward":
        out.loss.backward()
    main = model(x)
    terms = [twin.gradients(model, mean_cross_entropy(main, y))]
    for subnet in subnets:
        student = twin.logits_of_subnet(model, stages, subnet, x)
        terms.append(twin.gradients(model, twin.kl(student, main.detach())))
    assert twin.distance(model, twin.total(terms)) < TOLERANCE


class ClassesSecond(ToyNetwork):
    """Logits (batch, 3, height, width), as networks for segmentation return them."""

    def forward(self, x):
        return super().forward(x).movedim(-1, 1)


@every_method
@every_call
@pytest.mark.parametrize("criterion", [None, nn.CrossEntropyLoss(ignore_index=255)], ids=["default", "given"])
def test_logits_with_the_classes_on_the_second_axis(name, call, criterion):
    model, stages, x, y = dense(ClassesSecond)
    method = METHODS[name](model, stages, criterion=criterion)
    message = r"logits have shape \(2, 3, 5, 7\).*\(2, 5, 7\).*\(\.\.\., classes\).*move the class axis last"
    assert refuses(method, message, lambda: call(method, x, y))


@every_method
def test_torchs_cross_entropy_keeps_its_options(name):
    model, stages, x, y = dense()
    y[:, 0], seen = 255, y != 255
    seen[:, 0] = False
    method = METHODS[name](model, stages, criterion=nn.CrossEntropyLoss(ignore_index=255), **raw(name))
    out = method.backward(x, y)
    torch.testing.assert_close(out.terms["main"], mean_cross_entropy(out.logits[seen], y[seen]))


def test_a_criterion_of_ones_own_gets_the_logits_as_they_are():
    model, _, x, y = dense(ClassesSecond)
    method = unloaf.CommonTraining(model, criterion=lambda z, y: F.cross_entropy(z, y))
    out = method.backward(x, y)
    torch.testing.assert_close(out.loss, mean_cross_entropy(out.logits.movedim(1, -1), y))


@every_method
def test_shares_of_classes_at_every_position(name):
    model, stages, x, y = dense()
    shares = 0.7 * F.one_hot(y, 3).double() + 0.1
    out = METHODS[name](model, stages, **raw(name)).backward(x, shares)
    by_hand = -(shares * torch.log_softmax(out.logits, -1)).sum(-1).mean()
    torch.testing.assert_close(out.terms["main"], by_hand, rtol=TOLERANCE, atol=0)


# --- one example


def one_image(side=16):
    torch.manual_seed(0)
    model = build_model("cifar/resnet20", num_classes=3, in_chans=3, width=4).double().train()
    x, y = torch.randn(1, 3, side, side, dtype=torch.float64), torch.tensor([2])
    stages = unloaf.find_stages(model, x)
    model(x).square().sum().backward()  # gradients and running statistics to lose
    return model, stages, x, y


@pytest.mark.parametrize("mode", CALLS)
def test_one_image_has_the_gradients_of_separate_passes(mode):
    model, stages, x, y = one_image()
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in ((3, 2, 3), (1, 1, 2))]
    model.zero_grad()
    out = CALLS[mode](unloaf.StimulativeTraining(model, stages, num_subnets=2), x, y, subnets=subnets)
    if mode == "forward":
        out.loss.backward()
    assert twin.distance(model, twin.stimulative(model, stages, subnets, x, y)) < TOLERANCE


@every_method
@every_call
def test_every_method_trains_on_one_image(name, call):
    model, stages, x, y = one_image()
    assert call(METHODS[name](model, stages), x, y).loss.isfinite()


@every_call
def test_one_image_that_is_too_small_for_the_subnets_alone(call):
    model, stages, x, y = one_image()  # 4 x 4 pixels in the last stage, 1 x 1 for an input of 4
    method = unloaf.StimulativeTraining(model, stages, subnet_inputs=unloaf.SmallerInputs(sides=(4,)))
    message = r"more than 1 value per channel.*1 example.*drop_last=True.*larger inputs.*eval mode"
    assert refuses(method, message, lambda: call(method, x, y))


@pytest.mark.parametrize("name", WITH_SUBNETS)
def test_one_example_with_the_norms_in_eval_mode(name):
    model, stages = toy()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    assert METHODS[name](model, stages).backward(torch.randn(1, 4), torch.tensor([1])).loss.isfinite()
