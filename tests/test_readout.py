"""Which tensor of a model's output is trained, and which of its axes holds the classes."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unloaf
from test_method_batches import ClassesSecond, dense
from test_methods_bad_input import CALLS, METHODS, WITH_SUBNETS, every_call, every_method, pinned, refuses
from toy_networks import ToyNetwork
from unloaf.measure.flops import method_flops


def classes_last(output):
    return output.movedim(1, -1)


def gradients(method, mode, x, y, subnets):
    method.model.zero_grad()
    out = CALLS[mode](method, x, y, subnets=subnets)
    if mode == "forward":
        out.loss.backward()
    return torch.cat([p.grad.flatten() for p in method.model.parameters() if p.grad is not None])


class Subclass(nn.CrossEntropyLoss):
    pass


CRITERIA = {
    "default": None,
    "class": nn.CrossEntropyLoss(label_smoothing=0.1),
    "subclass": Subclass(label_smoothing=0.1),
    "function": F.cross_entropy,
    "bound": partial(F.cross_entropy, label_smoothing=0.1),
    "own": lambda z, y: -torch.log_softmax(z, -1).gather(-1, y[..., None]).mean(),
}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("mode", CALLS)
@every_method
def test_classes_on_the_second_axis_train_as_on_the_last(name, mode, criterion):
    # One class more than the image has columns, and as many: shapes then cannot tell the axes apart.
    for width in (7, 3):
        model, stages, x, y = dense(ClassesSecond)
        x, y, subnets = x[:, :3, :width], y[:, :3, :width], pinned(name, stages)
        loss = CRITERIA[criterion]
        second = gradients(METHODS[name](model, stages, criterion=loss, readout=classes_last), mode, x, y, subnets)
        last = ToyNetwork(norm=False).double()
        last.load_state_dict(model.state_dict())
        # Rows: nothing but the classes can be on their last axis.
        rows, labels = x.flatten(0, 2), y.flatten()
        expected = gradients(METHODS[name](last, stages, criterion=loss), mode, rows, labels, subnets)
        assert (second - expected).norm() < 1e-10 * expected.norm()


class Named(ToyNetwork):
    """Returns its logits under another name, beside features."""

    def forward(self, x):
        h = self.second(self.first(x))
        return OrderedDict(features=h, out=self.head(h))


def named():
    plain, stages, x, y = dense()
    model = Named(norm=False).double()
    model.load_state_dict(plain.state_dict())
    model(x)["out"].square().sum().backward()  # gradients to lose
    return model, stages, x, y


@pytest.mark.parametrize("mode", CALLS)
@every_method
def test_logits_under_another_name(name, mode):
    model, stages, x, y = named()
    x, y, subnets = x.flatten(0, 2), y.flatten(), pinned(name, stages)
    plain = ToyNetwork(norm=False).double()
    plain.load_state_dict(model.state_dict())
    expected = gradients(METHODS[name](plain, stages), mode, x, y, subnets)
    found = gradients(METHODS[name](model, stages, readout=lambda output: output["out"]), mode, x, y, subnets)
    assert torch.equal(found, expected)


@every_method
@every_call
def test_an_output_without_logits_names_the_readout(name, call):
    model, stages, x, y = named()
    message = r"OrderedDict with the keys features, out; .* or give readout, .*lambda output: output\[\"out\"\]"
    method = METHODS[name](model, stages)
    assert refuses(method, message, lambda: call(method, x, y))


@every_method
@every_call
def test_a_readout_that_returns_no_tensor(name, call):
    model, stages, x, y = named()
    method = METHODS[name](model, stages, readout=lambda output: output)
    assert refuses(method, "readout returned OrderedDict; give a tensor", lambda: call(method, x, y))


# --- dense logits and a criterion of one's own


def own(z, y):
    return F.cross_entropy(z, y)


SAYS = r"logits have shape .*not known on which axis the classes are; say it with readout=lambda output: "
ONE, EITHER = r"output\.movedim\(1, -1\)", r"output \(classes last\) or output\.movedim\(1, -1\)"


@pytest.mark.parametrize("criterion", [own, F.cross_entropy, Subclass()], ids=["own", "function", "subclass"])
@pytest.mark.parametrize("name", WITH_SUBNETS)
@every_call
def test_classes_on_the_second_axis_are_not_guessed(name, call, criterion):
    model, stages, x, y = dense(ClassesSecond)
    method = METHODS[name](model, stages, criterion=criterion)
    assert refuses(method, SAYS + ONE, lambda: call(method, x, y))


@pytest.mark.parametrize(
    "targets",
    [
        lambda y: y[:, :3, :3],  # of logits (2, 3, 3, 3) all axes but the last, and all but the second
        lambda y: F.one_hot(y, 3).movedim(-1, 1).double(),  # shares of classes, as Dice takes them
        lambda y: {"labels": y},
    ],
    ids=["ambiguous", "shares", "mapping"],
)
@pytest.mark.parametrize("name", WITH_SUBNETS)
def test_shapes_that_do_not_tell_are_refused(name, targets):
    model, stages, x, y = dense(ClassesSecond)
    y = targets(y)
    if isinstance(y, torch.Tensor) and y.shape == (2, 3, 3):
        x = x[:, :3, :3]
    method = METHODS[name](model, stages, criterion=lambda z, y: z.square().mean())
    assert refuses(method, SAYS + EITHER, lambda: method.backward(x, y))


@pytest.mark.parametrize("name", ["st", "gkt"])
def test_labels_of_positions_tell_that_the_classes_are_last(name):
    model, stages, x, y = dense()
    method = METHODS[name](model, stages, criterion=lambda z, y: F.cross_entropy(z.movedim(-1, 1), y))
    expected = gradients(METHODS[name](model, stages), "backward", x, y, pinned(name, stages))
    found = gradients(method, "backward", x, y, pinned(name, stages))
    assert (found - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("name", ["common", "stochastic depth"])
def test_without_a_second_loss_a_criterion_takes_any_axis(name):
    model, stages, x, y = dense(ClassesSecond)
    out = METHODS[name](model, stages, criterion=own).backward(x, y)
    assert out.loss.isfinite()


@pytest.mark.parametrize("mode", CALLS)
def test_a_dense_regression_needs_no_classes(mode):
    model, stages, x, _ = dense(ClassesSecond)
    y, subnets = torch.randn(2, 3, 5, 7).double(), pinned("st", stages)
    method = unloaf.StimulativeTraining(model, stages, criterion=F.mse_loss, subnet_loss=F.mse_loss)
    found = gradients(method, mode, x, y, subnets)
    plain = ToyNetwork(norm=False).double()
    plain.load_state_dict(model.state_dict())
    method = unloaf.StimulativeTraining(plain, stages, criterion=F.mse_loss, subnet_loss=F.mse_loss)
    expected = gradients(method, mode, x.flatten(0, 2), y.movedim(1, -1).flatten(0, 2), subnets)
    assert (found - expected).norm() < 1e-10 * expected.norm()


def test_costs_of_a_method_with_a_readout():
    # The same layers and outputs, so the same operations, whatever the logits are called.
    model, stages, x, _ = named()
    plain, x = ToyNetwork(norm=False).double(), x[:, 0, 0]
    method = unloaf.StimulativeTraining(model, stages, readout=lambda output: output["out"])
    expected = method_flops(unloaf.StimulativeTraining(plain, stages), x, range(3))
    assert method_flops(method, x, range(3)) == expected
