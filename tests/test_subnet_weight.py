"""The weight of the subnets' losses where it changes from step to step."""

import numpy as np
import pytest
import torch

import unloaf
from toy_networks import ToyNetwork
from unloaf import GroupKnowledgeTraining, StimulativeTraining
from unloaf.measure.flops import method_flops
from unloaf.passes import separate_backward

METHODS = {"st": StimulativeTraining, "gkt": GroupKnowledgeTraining}
every_method = pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)


def build(kind, weight):
    torch.manual_seed(0)
    model = ToyNetwork(norm=True).train()
    return kind(model, unloaf.find_stages(model, torch.randn(2, 4)), subnet_weight=weight)


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 4, generator=generator), torch.randint(3, (4,), generator=generator)


def gradients(method, step, *, lean):
    method.model.zero_grad(set_to_none=True)
    method.step = step
    out = method.backward(*batch()) if lean else method(*batch())
    if not lean:
        out.loss.backward()
    return out, {name: p.grad for name, p in method.model.named_parameters() if p.grad is not None}


@every_method
@pytest.mark.parametrize("lean", [True, False])
def test_a_step_has_the_weight_that_the_function_gives_it(kind, lean):
    out, found = gradients(build(kind, lambda step: step / 4), 3, lean=lean)
    same, expected = gradients(build(kind, 0.75), 3, lean=lean)
    assert {name: float(term) for name, term in out.terms.items()} == {n: float(t) for n, t in same.terms.items()}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_method
@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("weight", [0.0, lambda step: 0.0])
def test_a_step_of_weight_0_is_a_step_of_common_training(kind, lean, weight):
    out, found = gradients(build(kind, weight), 0, lean=lean)
    common = unloaf.CommonTraining(build(kind, 1.0).model)
    _, expected = gradients(common, 0, lean=lean)
    assert (list(out.terms), out.subnets) == (["main"], ())
    torch.testing.assert_close(found, expected)


@every_method
def test_the_arithmetic_of_a_step_of_weight_0_is_that_of_common_training(kind):
    method = build(kind, lambda step: float(step % 2))
    without, with_subnets = (method_flops(method, batch()[0], [step]) for step in (0, 1))
    assert without.shared == without.separate == without.common
    assert with_subnets.separate > with_subnets.common == without.common


@every_method
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), None])
def test_a_function_that_returns_no_weight(kind, bad):
    method = build(kind, lambda step: 1.0 if step == 0 else bad)
    method.backward(*batch())
    with pytest.raises(ValueError, match=rf"subnet_weight\(1\) returned {bad}; give a finite number, 0 or above"):
        method.backward(*batch())
    assert method.step == 1
    with pytest.raises(ValueError, match=rf"subnet_weight\(0\) returned {bad}"):
        build(kind, lambda step: bad)


@every_method
@pytest.mark.parametrize("weight", [np.float32(0.5), torch.tensor(0.5), 0.5], ids=["numpy", "torch", "python"])
def test_a_number_of_any_library_is_a_weight(kind, weight):
    assert build(kind, weight).subnet_weight == 0.5
    with pytest.raises(ValueError, match=r"subnet_weight is '0\.5'; give a finite number"):
        build(kind, "0.5")


@every_method
def test_subnets_that_are_given_are_run_at_any_weight(kind):
    method = build(kind, 0.0)
    subnets = [request.subnet for request in build(kind, 1.0).draw(len(batch()[0]))]
    out = method.backward(*batch(), subnets=subnets)
    assert out.subnets == tuple(subnets)
    assert {float(term) for name, term in out.terms.items() if name != "main"} == {0.0}


def test_the_measured_step_of_separate_passes_has_the_weight_of_its_step():
    shared, apart = (build(StimulativeTraining, lambda step: float(step)) for _ in range(2))
    _, expected = gradients(shared, 2, lean=True)
    apart.step = 2
    apart.step_in(separate_backward, *batch())
    found = {name: p.grad for name, p in apart.model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected)
