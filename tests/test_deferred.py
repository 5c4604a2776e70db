"""A lean step inside the call, whose gradients the backward of its loss hands over: as `method.backward` gives them."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unloaf
from toy_networks import ToyNetwork
from unloaf.models.build import build_model

SUBNETS = 3


def network(dtype=torch.float64):
    torch.manual_seed(0)
    model = build_model("cifar/resnet20", num_classes=3, width=4).to(dtype)
    x = torch.randn(4, 3, 16, 16, dtype=dtype)
    return model, unloaf.find_stages(model, x), x, torch.tensor([0, 1, 2, 0])


def build(kind, model, stages, **options):
    if kind == "gkt":
        return unloaf.GroupKnowledgeTraining(model, stages, groups=2, loops=2, **options)
    if kind == "st++":
        inputs = unloaf.SmallerInputs(sides=(8, 12, 16))
        return unloaf.stimulative_plus(model, stages, num_subnets=SUBNETS, subnet_inputs=inputs, **options)
    if kind == "st*":
        loss = lambda model, batch: {"ce": F.cross_entropy(model(batch[0]), batch[1])}  # noqa: E731
        return unloaf.GroundTruthTraining(model, stages, loss, num_subnets=SUBNETS, **options)
    return unloaf.StimulativeTraining(model, stages, num_subnets=SUBNETS, **options)


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_equal(found, expected):
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("kind", ["st", "st++", "gkt", "st*"])
def test_gradients_buffers_and_output_are_those_of_a_lean_step(kind):
    model, stages, x, y = network()
    twin = copy.deepcopy(model)
    lean, deferred = build(kind, twin, stages), build(kind, model, stages)
    expected = lean.backward(x, y)
    out = deferred(x, y, lean=True)
    assert all(p.grad is None for p in model.parameters())
    out.loss.backward()
    assert torch.equal(flat(model), flat(twin))
    assert all(map(torch.equal, model.buffers(), twin.buffers()))
    assert (out.terms, out.subnets, deferred.step) == (expected.terms, expected.subnets, 1)
    assert out.loss.item() == expected.loss.item()


def test_a_model_of_one_pass_has_the_gradients_of_a_lean_step():
    model, stages, x, y = network()
    twin = copy.deepcopy(model)
    unloaf.StochasticDepth(twin, stages).backward(x, y)
    unloaf.StochasticDepth(model, stages)(x, y, lean=True).loss.backward()
    found, expected = ({n: p.grad for n, p in net.named_parameters() if p.grad is not None} for net in (model, twin))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_accumulation_and_clipping():
    model, stages, x, y = network()
    twin = copy.deepcopy(model)
    lean, deferred = build("st", twin, stages), build("st", model, stages)
    for part in (slice(0, 2), slice(2, 4)):
        lean.backward(x[part], y[part], loss_scale=1 / 2)
        (deferred(x[part], y[part], lean=True).loss / 2).backward()
    assert_equal(flat(model), flat(twin))
    norms = [nn.utils.clip_grad_norm_(net.parameters(), 0.1) for net in (model, twin)]
    assert norms[0] > 0.1
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
    assert_equal(flat(model), flat(twin))


def test_gradients_scale_with_what_comes_in():
    model, stages, x, y = network()
    twin = copy.deepcopy(model)
    build("st", twin, stages).backward(x, y, loss_scale=-0.3)
    (build("st", model, stages)(x, y, lean=True, loss_scale=torch.tensor(8.0)).loss * -0.3 + 7).backward()
    assert_equal(flat(model), flat(twin))


def half_precision_gradients(loss_scale):
    """Of a network whose gradients are too small for float16, but for the scaler's factor."""
    torch.manual_seed(0)
    model, x, y = ToyNetwork(), torch.randn(4, 4), torch.tensor([0, 2, 1, 1])
    method = unloaf.StimulativeTraining(
        model, unloaf.find_stages(model, x), criterion=lambda z, y: F.cross_entropy(z, y) * 1e-6
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.autocast("cpu", torch.float16):
        out = method(x, y, lean=True, loss_scale=scaler.get_scale() if loss_scale else 1.0)
    scaler.scale(out.loss).backward()
    scaler.unscale_(optimizer)
    found = [p.grad for p in model.parameters()]
    with torch.autocast("cpu", torch.float16):
        model.zero_grad()
        method.backward(x, y, out.subnets, loss_scale=scaler.get_scale())
    return found, [p.grad / scaler.get_scale() for p in model.parameters()]


def test_a_scaler_s_factor_is_inside():
    found, expected = half_precision_gradients(loss_scale=True)
    assert all(grad.any() for grad in expected)
    assert all(map(torch.equal, found, expected))


def test_float16_without_the_scaler_s_factor_is_refused():
    with pytest.raises(ValueError, match=r"float16 without that factor.*loss_scale=scaler\.get_scale\(\)"):
        half_precision_gradients(loss_scale=False)


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan")])
def test_a_factor_that_is_none_is_refused(scale):
    model, stages, x, y = network()
    with pytest.raises(ValueError, match=f"loss_scale is {scale}; give a finite number above 0"):
        build("st", model, stages)(x, y, lean=True, loss_scale=scale)


class Margin(nn.Module):
    """A criterion with weights of its own, as metric learning has them."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, logits, y):
        return F.cross_entropy(logits * self.scale, y)


def test_what_losses_depend_on_beside_the_model_gets_its_gradient_with_the_backward():
    """In a criterion, in closures and fields of functions, and the model's own weights reached past the model."""

    def step(deferred):
        model, stages, x, y = network()
        margin, temperature = Margin(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        offset, x = nn.Parameter(torch.zeros(3, dtype=torch.float64)), x.requires_grad_()

        def distance(student, teacher):
            return unloaf.kl_loss(student / temperature, teacher) + model.fc.weight.square().sum()

        method = unloaf.StimulativeTraining(
            model, stages, num_subnets=2, subnet_loss=distance, criterion=margin, readout=lambda z: z + offset
        )
        others = [margin.scale, temperature, offset, x]
        margin.scale.grad = torch.ones_like(margin.scale)
        if deferred:
            loss = method(x, y, lean=True).loss
            assert [leaf.grad for leaf in others] == [1, None, None, None]
            (loss * 0.25).backward()
        else:
            method.backward(x, y, loss_scale=0.25)
        return torch.cat([leaf.grad.flatten() for leaf in [*model.parameters(), *others]])

    assert_equal(step(True), step(False))


def test_a_head_outside_the_model_that_subnets_alone_have_gets_its_gradient_with_the_backward():
    def step(deferred):
        model, stages, x, y = network()
        heads, passes = [nn.Linear(3, 3).double() for _ in range(3)], []

        def loss(model, batch):
            passes.append(batch)
            return F.cross_entropy(heads[len(passes) - 1](model(batch[0])), batch[1])

        method = unloaf.GroundTruthTraining(model, stages, loss, num_subnets=2)
        if deferred:
            out = method(x, y, lean=True, loss_scale=8.0)
            assert all(p.grad is None for head in heads for p in head.parameters())
            out.loss.backward()
        else:
            method.backward(x, y)
        return torch.cat([flat(module) for module in [model, *heads]])

    assert_equal(step(True), step(False))


@pytest.mark.parametrize("kind", ["st", "st*"])
def test_learned_inputs_of_subnets_get_their_gradient_with_the_backward(kind):
    def step(deferred):
        model, stages, x, y = network()
        contrast = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        if kind == "st":
            options = {"subnet_inputs": lambda images, generator: images * contrast}
        else:
            options = {"shrink": lambda batch, generator: (batch[0] * contrast, batch[1])}
        method = build(kind, model, stages, **options)
        if deferred:
            out = method(x, y, lean=True, loss_scale=8.0)
            assert contrast.grad is None
            out.loss.backward()
        else:
            method(x, y).loss.backward()
        return torch.cat([flat(model), contrast.grad[None]])

    assert_equal(step(True), step(False))


def test_hooks_on_parameters_run_once_with_the_backward():
    model, stages, x, y = network()
    seen = []
    model.fc.weight.register_hook(lambda grad: seen.append("gradient") or grad * 0)
    model.fc.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    loss = build("st", model, stages)(x, y, lean=True).loss
    assert seen == []
    loss.backward()
    assert seen == ["gradient", "accumulated"]
    assert not model.fc.weight.grad.any()


def test_a_second_backward_is_refused():
    model, stages, x, y = network()
    loss = build("st", model, stages)(x, y, lean=True).loss
    loss.backward(retain_graph=True)
    before = flat(model)
    with pytest.raises(ValueError, match=r"lean=True went backward twice.*call method\(x, y, lean=True\) again"):
        loss.backward()
    assert torch.equal(flat(model), before)


def test_a_loss_that_never_went_backward_is_told_of_once():
    model, stages, x, y = network()
    method = build("st", model, stages)
    method(x, y, lean=True)
    with pytest.warns(UserWarning, match=r"lean=True has not gone backward.*call out\.loss\.backward\(\)") as told:
        out = method(x, y, lean=True)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(x, y, lean=True)
        out.loss.backward()  # an earlier one may still go backward


def test_a_step_that_fails_leaves_everything_as_it_was():
    model, stages, x, y = network()
    margin = Margin()
    model.fc.weight.grad = marker = torch.ones_like(model.fc.weight)
    buffers = [b.clone() for b in model.buffers()]

    def refuse(student, teacher):
        raise RuntimeError("no loss today")

    method = unloaf.StimulativeTraining(model, stages, subnet_loss=refuse, criterion=margin)
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match="no loss today"):
        method(x, y, lean=True)
    assert all(map(torch.equal, model.buffers(), buffers))
    assert [p is q for p, q in zip(model.parameters(), parameters, strict=True)] == [True] * len(parameters)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert model.fc.weight.grad is marker
    assert margin.scale.grad is None


def test_without_gradients_there_is_a_loss_alone():
    model, stages, x, y = network()
    with torch.no_grad():
        out = build("st", model, stages)(x, y, lean=True)
    assert not out.loss.requires_grad
    assert len(out.terms) == 1 + SUBNETS


def test_a_graph_of_the_gradients_is_refused():
    model, stages, x, y = network()
    loss = build("st", model, stages)(x, y, lean=True).loss
    with pytest.raises(ValueError, match=r"create_graph=True.*without lean=True"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


class HalfInside(ToyNetwork):
    """Its forward switches autocast on by itself."""

    def forward(self, x):
        with torch.autocast("cpu", torch.float16):
            return super().forward(x)


def test_float16_inside_the_model_is_seen():
    model, x, y = HalfInside(), torch.randn(4, 4), torch.tensor([0, 2, 1, 1])
    loss = unloaf.StimulativeTraining(model, unloaf.find_stages(model, x))(x, y, lean=True).loss
    with pytest.raises(ValueError, match=r"float16 without that factor.*loss_scale=scaler\.get_scale\(\)"):
        (loss * 1024).backward()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_factor_without_lean_is_refused():
    model, stages, x, y = network()
    with pytest.raises(ValueError, match=r"loss_scale is 0\.25, which is for lean=True.*multiply the loss"):
        build("st", model, stages)(x, y, loss_scale=0.25)


def test_a_factor_that_is_no_number_is_refused_before_anything_is_computed():
    model, stages, x, y = network()
    with pytest.raises(ValueError, match="loss_scale is nan; give a finite number"):
        build("st", model, stages).backward(x, y, loss_scale=float("nan"))
    assert all(p.grad is None for p in model.parameters())
