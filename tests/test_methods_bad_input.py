"""What a training step refuses, that it then changes nothing, and the arithmetic around a step."""

import re
from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import unloaf
from toy_networks import Block, ToyNetwork
from unloaf import CommonTraining, GroupKnowledgeTraining, SmallerInputs, StimulativeTraining, StochasticDepth, Subnet

METHODS = {
    "common": lambda model, stages, **options: CommonTraining(model, **options),
    "stochastic depth": StochasticDepth,
    "st": StimulativeTraining,
    "st++": lambda model, stages, **options: unloaf.stimulative_plus(model, stages, subnet_inputs=None, **options),
    "gkt": GroupKnowledgeTraining,
}
WITH_SUBNETS = ["st", "st++", "gkt"]
CALLS = {
    "backward": lambda method, *args, **options: method.backward(*args, **options),
    "forward": lambda method, *args, **options: method(*args, **options),
}
every_method = pytest.mark.parametrize("name", METHODS)
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def toy(seed=0, **options):
    """A network in mixed training modes that has gradients and running statistics to lose."""
    torch.manual_seed(seed)
    model = ToyNetwork(**({"norm": True} | options)).train()
    stages = unloaf.find_stages(model, torch.randn(2, 4))
    model(torch.randn(4, 4)).square().sum().backward()
    model.second[2].eval()
    return model, stages


def batch(size=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(classes, (size,), generator=generator)


def everything_about(method):
    model = method.model
    return (
        {key: value.clone() for key, value in model.state_dict().items()}
        | {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters()},
        [module.training for module in model.modules()],
        [sorted(module.__dict__) for module in model.modules()],
        method.state_dict(),
    )


def unchanged(before, after):
    tensors, *rest = before
    others, *others_rest = after
    return (
        tensors.keys() == others.keys()
        and all(map(torch.equal, tensors.values(), others.values()))
        and rest == others_rest
    )


def refuses(method, message, run):
    """The call raises this ValueError, and nothing about the model or the method has changed."""
    before = everything_about(method)
    with pytest.raises(ValueError, match=message):
        run()
    return unchanged(before, everything_about(method))


# --- batches


@every_method
@every_call
def test_a_batch_of_one_with_batch_norm(name, call):
    method = METHODS[name](*toy())
    assert refuses(method, r"1 example.*at least 2.*drop_last=True", lambda: call(method, *batch(1)))


@every_method
def test_a_batch_of_one_without_batch_norm_is_fine(name):
    assert METHODS[name](*toy(norm=False)).backward(*batch(1)).loss.isfinite()


@every_method
@every_call
def test_a_batch_on_another_device(name, call):
    method, (x, y) = METHODS[name](*toy()), batch()
    message = r"batch is on meta, the model on cpu; move the batch: x\.to\('cpu'\)"
    assert refuses(method, message, lambda: call(method, x.to("meta"), y))


@every_method
@every_call
def test_targets_of_another_length(name, call):
    method, (x, y) = METHODS[name](*toy()), batch()
    assert refuses(method, r"x has 4 examples, y has 3; give one target for each", lambda: call(method, x, y[:3]))


@every_method
@every_call
def test_a_batch_without_examples(name, call):
    (x, y), method = batch(), METHODS[name](*toy())
    assert refuses(method, r"x has shape \(0, 4\), no example", lambda: call(method, x[:0], y[:0]))


@every_method
@every_call
def test_no_targets_for_a_cross_entropy(name, call):
    method = METHODS[name](*toy())
    assert refuses(method, "y is None.*give targets.*GroundTruthTraining", lambda: call(method, batch()[0]))


@pytest.mark.parametrize("x", [None, 3.0, [1.0, 2.0], {"tokens": "text"}, {}])
def test_batches_that_are_no_tensors(x):
    method = CommonTraining(toy()[0])
    assert refuses(method, r"x is .*; give a tensor, or a mapping with tensors", lambda: method.backward(x, batch()[1]))


@pytest.mark.parametrize("name", ["st", "st++"])
@every_call
def test_smaller_inputs_on_a_batch_that_is_no_image(name, call):
    method = METHODS[name](*toy())
    method.subnet_inputs = SmallerInputs()
    message = r"need x as images \(batch, channels, height, width\); set subnet_inputs=None"
    assert refuses(method, message, lambda: call(method, *batch()))


@pytest.mark.parametrize(
    ("readout", "shape"), [(lambda z: z[:3], "(3, 3)"), (lambda z: z.sum(), "()"), (lambda z: z.flatten(), "(12,)")]
)
@pytest.mark.parametrize("name", ["common", "st"])
def test_a_readout_of_another_number_of_rows(name, readout, shape):
    method = METHODS[name](*toy(), readout=readout)
    message = rf"readout returned shape {re.escape(shape)} for a batch of 4 examples; give a row for each"
    assert refuses(method, message, lambda: method.backward(*batch()))


# --- subnets


@pytest.mark.parametrize("name", ["stochastic depth", "st", "st++"])
@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (((True, True),), r"\(2,\) blocks per stage.*\(3, 3\).*another model"),
        (((False, True, True), (True, True, True)), r"skips block 'first.0', which changes shape.*keep it"),
    ],
    ids=["of another model", "unskippable"],
)
@every_call
def test_subnets_that_do_not_fit(name, call, keep, message):
    method = METHODS[name](*toy())
    assert refuses(method, message, lambda: call(method, *batch(), subnets=[Subnet(keep)]))


@every_call
def test_group_knowledge_refuses_subnets_that_do_not_fit(call):
    method = GroupKnowledgeTraining(*toy(), groups=1, loops=1)
    run = partial(call, method, *batch(), subnets=[Subnet(((False, True, True), (True,) * 3))])
    assert refuses(method, "skips block 'first.0'", run)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("common", 1, r"runs no subnets, but 1 are given; leave subnets out"),
        ("stochastic depth", 2, r"1 subnet a step, but 2 are given"),
        ("stochastic depth", 0, r"1 subnet a step, but 0 are given"),
        ("gkt", 4, r"4 subnets are given for 2 loops of 3 groups; give 6"),
    ],
)
@every_call
def test_wrong_numbers_of_subnets(name, call, count, message):
    model, stages = toy()
    method = METHODS[name](model, stages)
    assert refuses(method, message, lambda: call(method, *batch(), subnets=[Subnet.full(stages)] * count))


@pytest.mark.parametrize("state", [{"seed": 1.5, "step": 0}, {"seed": 0, "step": None}, {"seed": 0, "step": -1}])
@every_method
def test_a_state_of_other_than_whole_numbers(name, state):
    method = METHODS[name](*toy())
    assert refuses(method, "seed and step are whole numbers", lambda: method.load_state_dict(state))


@pytest.mark.parametrize("name", ["stochastic depth", *WITH_SUBNETS])
@every_call
def test_depths_in_place_of_a_subnet(name, call):
    method = METHODS[name](*toy())
    message = r"\(2, 1\) is of type tuple; give a Subnet, e\.g\. Subnet\.from_depths\(stages, \(3, 3\)\)"
    count = 6 if name == "gkt" else 1
    assert refuses(method, message, lambda: call(method, *batch(), subnets=[(2, 1)] * count))


@pytest.mark.parametrize("name", ["stochastic depth", *WITH_SUBNETS])
@every_call
def test_a_step_inside_active_subnet(name, call):
    model, stages = toy()
    method = METHODS[name](model, stages)
    with unloaf.active_subnet(model, stages, Subnet.from_depths(stages, (1, 1))):
        assert refuses(method, "already runs inside active_subnet", lambda: call(method, *batch()))


# --- logits


class Uneven(ToyNetwork):
    """Has one more class while its last block is skipped."""

    def forward(self, x):
        h = self.second[:2](self.first(x))
        y = self.second[2](h)
        logits = self.head(y)
        return torch.cat([logits, logits[:, :1]], dim=1) if torch.equal(y, h) else logits


@pytest.mark.parametrize("name", WITH_SUBNETS)
@every_call
def test_logits_of_unequal_shape(name, call):
    torch.manual_seed(0)
    model, (_, stages) = Uneven(norm=True), toy()
    model(torch.randn(4, 4)).square().sum().backward()
    method = METHODS[name](model, stages)
    count = 6 if name == "gkt" else 1
    run = partial(call, method, *batch(), subnets=[Subnet.from_depths(stages, (3, 2))] * count)
    assert refuses(method, r"\(4, 4\).*\(4, 3\)", run)


@every_method
@every_call
def test_a_single_class(name, call):
    method = METHODS[name](*toy(classes=1))
    message = r"logits have shape \(4, 1\).*at least 2 classes"
    assert refuses(method, message, lambda: call(method, *batch(classes=1)))


@pytest.mark.parametrize("main_logits", ["direction", "raw"])
@every_call
def test_two_classes_without_magnitude(call, main_logits):
    method = unloaf.stimulative_plus(*toy(classes=2), subnet_inputs=None, main_logits=main_logits)
    message = r"two classes have only a sign under layer_norm.*give norm='l2', or a larger eps such as 1\.0"
    assert refuses(method, message, lambda: call(method, *batch(classes=2)))


@every_method
@every_call
def test_a_criterion_that_does_not_reduce(name, call):
    method = METHODS[name](*toy(), criterion=lambda logits, y: F.cross_entropy(logits.double(), y, reduction="none"))
    assert refuses(method, r"criterion returned shape \(4,\).*reduction='mean'", lambda: call(method, *batch()))


@every_method
@every_call
def test_a_criterion_that_raises(name, call):
    method = METHODS[name](*toy())
    message = "expected|target|Target"
    before = everything_about(method)
    with pytest.raises((IndexError, RuntimeError), match=message):
        call(method, batch()[0], torch.full((4,), 99))
    assert unchanged(before, everything_about(method))


@pytest.mark.parametrize("name", WITH_SUBNETS)
@pytest.mark.parametrize("shape", [(4,), (1,)])
@every_call
def test_a_subnet_loss_that_does_not_reduce(name, call, shape):
    method = METHODS[name](*toy())
    method.subnet_loss = lambda student, teacher: student.sum(1) if shape == (4,) else student.sum()[None]
    message = rf"subnet_loss returned shape \({shape[0]},\); it must return one number"
    assert refuses(method, message, lambda: call(method, *batch()))


# --- gradients


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@every_method
def test_backward_where_nothing_has_a_gradient(name, context):
    method = METHODS[name](*toy())

    def run():
        with context():
            method.backward(*batch())

    assert refuses(method, r"computes no gradient; leave it, or call method\(x, y\)", run)


@every_method
@every_call
def test_a_frozen_model(name, call):
    model, stages = toy()
    model.requires_grad_(False)
    method = METHODS[name](model, stages)
    assert refuses(
        method, "no loss of this step has a gradient: all parameters are frozen", lambda: call(method, *batch())
    )


@every_method
def test_the_loss_alone_without_gradients(name):
    method, subnets = METHODS[name](*toy()), pinned(name, toy()[1])
    expected = METHODS[name](*toy())(*batch(), subnets=subnets).loss
    with torch.no_grad():
        out = method(*batch(), subnets=subnets)
    assert not out.loss.requires_grad
    assert torch.equal(out.loss, expected.detach())


@pytest.mark.parametrize("name", WITH_SUBNETS)
def test_inference_mode_hides_changes_in_place(name):
    method = METHODS[name](*toy())

    def run():
        with torch.inference_mode():
            method(*batch())

    assert refuses(method, r"inference_mode\(\) hides.*use torch\.no_grad\(\)", run)


@pytest.mark.parametrize("call", CALLS)
def test_a_criterion_without_a_gradient_leaves_those_of_the_subnets(call):
    model, stages = toy()
    model.zero_grad()
    method = StimulativeTraining(model, stages, criterion=lambda logits, y: logits.new_zeros(()))
    out = CALLS[call](method, *batch(), subnets=pinned("st", stages))
    if call == "forward":
        out.loss.backward()
    assert model.head.weight.grad.any()


@pytest.mark.parametrize("call", CALLS)
def test_a_frozen_model_below_a_criterion_with_weights(call):
    model, _ = toy()
    model.requires_grad_(False)
    criterion = nn.Module()
    criterion.scale = nn.Parameter(torch.ones(3))
    method = CommonTraining(model, criterion=lambda logits, y: F.cross_entropy(logits * criterion.scale, y))
    out = CALLS[call](method, *batch())
    if call == "forward":
        out.loss.backward()
    assert criterion.scale.grad.any()


# --- construction


@pytest.mark.parametrize("name", WITH_SUBNETS)
@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), F.mse_loss, partial(F.huber_loss, delta=2.0)], ids=["module", "function", "partial"]
)
def test_a_softmax_over_the_outputs_of_a_regression_is_refused(name, criterion):
    with pytest.raises(ValueError, match=r"a loss of a regression.*give subnet_loss too \(F\.mse_loss.*readout="):
        METHODS[name](*toy(), criterion=criterion)


@pytest.mark.parametrize("name", WITH_SUBNETS)
@pytest.mark.parametrize(
    "criterion", [nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits], ids=["module", "function"]
)
def test_a_softmax_over_labels_that_exclude_nothing_is_refused(name, criterion):
    with pytest.raises(ValueError, match=r"labels that are each yes or no.*unloaf\.bce_kl_loss for binary outputs"):
        METHODS[name](*toy(), criterion=criterion)


def squares(outputs, y):
    return (outputs - y).square().mean()


QUANTITIES = {
    "regression": torch.randn(4, 3),
    "one quantity, three quantiles": torch.rand(4),
    "several labels": torch.tensor([[1.0, 0, 1]] * 4),
    "two class indices": torch.zeros(4, 2, dtype=torch.long),
}


@pytest.mark.parametrize("y", QUANTITIES.values(), ids=QUANTITIES)
def test_columns_that_are_no_classes_are_asked_about(y):
    # A criterion of one's own says nothing; the targets do.
    method = StimulativeTraining(*toy(), criterion=lambda z, y: z.square().mean())
    message = rf"outputs have shape \(4, 3\), y \({', '.join(map(str, y.shape))},?\).*give subnet_loss too.*readout="
    assert refuses(method, message, lambda: method.backward(batch()[0], y))


@pytest.mark.parametrize(
    "y", [F.one_hot(torch.tensor([0, 1, 2, 0]), 3) * torch.tensor([[1.0], [1], [1], [0]]), torch.full((4, 3), 1 / 3)]
)
def test_shares_of_classes_are_taken_by_a_criterion_of_ones_own(y):
    assert StimulativeTraining(*toy(), criterion=squares).backward(batch()[0], y).loss.isfinite()


def test_a_readout_answers_what_the_columns_are():
    options = {"criterion": F.mse_loss, "readout": lambda output: output}
    assert StimulativeTraining(*toy(), **options).backward(batch()[0], torch.randn(4, 3)).loss.isfinite()


@pytest.mark.parametrize("name", ["common", "st"])
@every_call
def test_targets_that_a_regression_would_compare_each_with_each(name, call):
    options = {"subnet_loss": F.mse_loss} if name == "st" else {}
    method = METHODS[name](*toy(classes=1), criterion=F.mse_loss, **options)
    message = r"outputs have shape \(4, 1\), y \(4,\): the criterion would compare each with each; give y the shape"
    assert refuses(method, message, lambda: call(method, batch()[0], torch.randn(4)))


def test_a_label_outside_the_classes_is_told_where_it_is_judged():
    model, stages = toy()
    x, y = batch()
    with pytest.raises(ValueError, match=r"Target 99 is out of bounds\. Labels are from 0 .* give ignore_index"):
        unloaf.evaluate_subnets(model, stages, [(x, torch.full_like(y, 99))], subnets=1)


def test_a_regression_with_a_distance_of_its_own_is_not_told_anything():
    StimulativeTraining(*toy(), criterion=F.mse_loss, subnet_loss=F.mse_loss)  # warnings are errors


@pytest.mark.parametrize("name", WITH_SUBNETS)
@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_out_of_range(name, weight):
    with pytest.raises(ValueError, match=rf"subnet_weight is {weight}; give a finite number, 0 or above"):
        METHODS[name](*toy(), subnet_weight=weight)


@pytest.mark.parametrize("name", WITH_SUBNETS)
@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_shares_of_the_batch_out_of_range(name, share):
    with pytest.raises(ValueError, match=rf"subnet_batch_fraction is {share}; give a share above 0, up to 1"):
        METHODS[name](*toy(), subnet_batch_fraction=share)


@pytest.mark.parametrize("name", ["st", "st++"])
@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_numbers_of_subnets_out_of_range(name, count):
    with pytest.raises(ValueError, match=rf"num_subnets is {count}; give a whole number of at least 1"):
        METHODS[name](*toy(), num_subnets=count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups is 0"),
        ({"loops": 0}, "loops is 0"),
        ({"loops": 1.5}, r"loops is 1\.5"),
        ({"ema": 1.0}, r"ema is 1\.0"),
        ({"ema": -0.1}, r"ema is -0\.1"),
        ({"ema": float("nan")}, "ema is nan"),
        ({"teacher": "parent"}, "teacher is 'parent'"),
    ],
)
def test_arguments_of_group_knowledge_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"{message}; give "):
        GroupKnowledgeTraining(*toy(), **options)


@pytest.mark.parametrize("survival", [0.0, 1.5, -1.0])
def test_a_survival_probability_out_of_range(survival):
    with pytest.raises(ValueError, match=f"final_survival is {survival}"):
        StochasticDepth(*toy(), final_survival=survival)


@pytest.mark.parametrize(
    "options", [{"amplitude": 0.0}, {"amplitude": "big"}, {"norm": "max"}, {"main_logits": "cosine"}]
)
def test_options_of_stimulative_plus_out_of_range_are_refused_at_construction(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; give"):
        unloaf.stimulative_plus(*toy(), subnet_inputs=None, **options)


@pytest.mark.parametrize("name", ["stochastic depth", *WITH_SUBNETS])
def test_stages_of_another_model_are_refused_at_construction(name):
    _, stages = toy()
    with pytest.raises(ValueError, match=r"no block 'first\.0' of stage 'first'"):
        METHODS[name](nn.Sequential(Block(4, 4), Block(4, 4)), stages)


@pytest.mark.parametrize("name", ["st", "st++", "gkt"])
def test_a_space_that_does_not_fit_is_refused_at_construction(name):
    with pytest.raises(ValueError, match="'second' keeps 4 of 3"):
        METHODS[name](*toy(), sampler=unloaf.OrderedSampler(min_depths=(1, 4)))


# --- state


@pytest.mark.parametrize("state", [{}, {"seed": 0}, {"seed": 0, "step": 1, "lr": 0.1}, {"model": 3}])
@every_method
def test_a_wrong_state(name, state):
    method = METHODS[name](*toy())
    assert refuses(method, r"state has the keys.*seed, step", lambda: method.load_state_dict(state))


@pytest.mark.parametrize("name", ["stochastic depth", *WITH_SUBNETS])
def test_a_resumed_method_draws_what_the_uninterrupted_one_draws(name):
    uninterrupted = METHODS[name](*toy(), seed=5)
    drawn = [uninterrupted.backward(*batch()).subnets for _ in range(8)]
    before = METHODS[name](*toy(), seed=5)
    for _ in range(4):
        before.backward(*batch())
    resumed = METHODS[name](*toy(), seed=99)
    resumed.load_state_dict(before.state_dict())
    assert [resumed.backward(*batch()).subnets for _ in range(4)] == drawn[4:]


@pytest.mark.parametrize("name", ["stochastic depth", *WITH_SUBNETS])
def test_steps_draw_different_subnets(name):
    method = METHODS[name](*toy())
    assert len({method.backward(*batch()).subnets for _ in range(12)}) > 1


@every_method
def test_steps_are_counted(name):
    method = METHODS[name](*toy())
    method.backward(*batch())
    method(*batch())
    assert method.state_dict() == {"seed": 0, "step": 2}


# --- arithmetic around a step


@every_method
def test_soft_labels_are_mixed_cross_entropies(name):
    model, stages = toy(norm=False)
    x, y = batch()
    method = METHODS[name](model, stages, **({"main_logits": "raw"} if name == "st++" else {}))
    soft = 0.7 * F.one_hot(y, 3).float() + 0.3 * F.one_hot(y.flip(0), 3).float()
    out = method.backward(x, soft)
    by_hand = -(soft * torch.log(out.logits.exp() / out.logits.exp().sum(1, keepdim=True))).sum(1).mean()
    torch.testing.assert_close(out.terms["main"], by_hand)


@every_method
def test_the_loss_is_the_sum_of_the_terms(name):
    out = METHODS[name](*toy()).backward(*batch())
    torch.testing.assert_close(out.loss, sum(out.terms.values()))


@every_method
@every_call
def test_what_a_step_returns_is_detached(name, call):
    out = call(METHODS[name](*toy()), *batch())
    assert not any(tensor.requires_grad for tensor in (out.logits, *out.terms.values()))


def pinned(name, stages):
    depths = {"common": [], "stochastic depth": [(2, 1)]}.get(name, [(3, 2), (2, 2), (1, 1)])
    subnets = [Subnet.from_depths(stages, d) for d in depths] * (2 if name == "gkt" else 1)
    return subnets or None


def gradients(method, run):
    for parameter in method.model.parameters():
        parameter.grad = None
    run()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in method.model.parameters()]


def relative_distance(one, another):
    difference = torch.stack([(a - b).norm() for a, b in zip(one, another, strict=True)]).norm()
    return float(difference / torch.stack([b.norm() for b in another]).norm())


@every_method
def test_two_half_batches_at_half_scale_are_the_whole_batch(name):
    model, stages = toy(norm=False)
    method, (x, y), subnets = METHODS[name](model.double(), stages), batch(8), pinned(name, stages)
    x = x.double()

    def halves():
        for part in (slice(0, 4), slice(4, 8)):
            method.backward(x[part], y[part], subnets=subnets, loss_scale=0.5)

    whole = gradients(method, lambda: method.backward(x, y, subnets=subnets))
    assert relative_distance(gradients(method, halves), whole) < 1e-12  # rounding of sums in float64


@every_method
def test_gradients_add_to_those_there_are(name):
    model, stages = toy(norm=False)
    method, (x, y), subnets = METHODS[name](model.double(), stages), batch(), pinned(name, stages)
    x = x.double()
    once = gradients(method, lambda: method.backward(x, y, subnets=subnets))
    twice = gradients(method, lambda: [method.backward(x, y, subnets=subnets) for _ in range(2)])
    assert relative_distance(twice, [2 * grad for grad in once]) < 1e-12


@every_method
def test_loss_scale_leaves_the_returned_losses_alone(name):
    losses = [
        METHODS[name](*toy()).backward(*batch(), loss_scale=scale).loss for scale in (1.0, 1024.0, torch.tensor(0.5))
    ]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


@every_method
@every_call
def test_gradients_under_bfloat16_autocast_are_close_to_those_of_float32(name, call):
    model, stages = toy(norm=False)
    method, (x, y), subnets = METHODS[name](model, stages), batch(8), pinned(name, stages)

    def under_autocast():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = call(method, x, y, subnets=subnets)
        if out.loss.requires_grad:
            out.loss.backward()

    expected = gradients(method, lambda: method.backward(x, y, subnets=subnets))
    # bfloat16 keeps 8 bits: 2**-8 = 0.4 % an operation, a dozen of them in a row
    assert relative_distance(gradients(method, under_autocast), expected) < 0.05


@settings(max_examples=10)
@given(st.floats(0, 10))
def test_the_weight_multiplies_the_subnet_terms(weight):
    model, stages = toy(norm=False)
    subnets = pinned("st", stages)
    plain, weighted = (
        StimulativeTraining(model, stages, subnet_weight=w)(*batch(), subnets=subnets).terms for w in (1.0, weight)
    )
    assert [float(weighted[f"subnet{i}"]) for i in range(3)] == pytest.approx(
        [weight * float(plain[f"subnet{i}"]) for i in range(3)], rel=1e-5
    )


# --- logits of further heads


Outputs = namedtuple("Outputs", ["logits", "aux_logits2", "aux_logits1"])  # as torchvision's GoogLeNet names them
FURTHER = {
    "a tuple with names": lambda logits, further: Outputs(logits, further, None),
    "a mapping": lambda logits, further: {"logits": logits, "aux_logits": further},
    "an object": lambda logits, further: SimpleNamespace(logits=logits, auxiliary_outputs=further),
}


class WithFurtherHead(ToyNetwork):
    """Returns what its attribute `form` makes of the logits and of those of a head in the middle."""

    def __init__(self, **options):
        super().__init__(**options)
        self.middle = nn.Linear(6, 3)
        self.form = FURTHER["a mapping"]

    def forward(self, x):
        between = self.first(x)
        return self.form(self.head(self.second(between)), self.middle(between))


@pytest.mark.parametrize("name", ["common", "st"])
def test_outputs_of_another_meaning_are_asked_about(name):
    further = WithFurtherHead(norm=True)
    further.form = lambda logits, boxes: {"logits": logits, "boxes": boxes}
    further(torch.randn(4, 4))["boxes"].sum().backward()
    for parameter in further.parameters():
        parameter.grad = torch.zeros_like(parameter)
    message = r"returned boxes beside its logits, and no loss reaches them.*GroundTruthTraining.*or give readout="
    method = METHODS[name](further, toy()[1])
    assert refuses(method, message, lambda: method.backward(*batch()))


class Telling(ToyNetwork):
    def forward(self, x):
        features = self.second(self.first(x))
        logits = self.head(features)
        return {"logits": logits, "features": features.flatten(1), "probabilities": logits.softmax(1)}


def test_outputs_made_on_the_way_to_the_logits_are_no_heads():
    assert StimulativeTraining(Telling(), toy()[1]).backward(*batch()).loss.isfinite()


@every_method
@every_call
@pytest.mark.parametrize("form", FURTHER)
def test_logits_that_no_loss_reaches(name, call, form):
    model = WithFurtherHead(norm=True)
    model.form = FURTHER[form]
    method = METHODS[name](model, unloaf.find_stages(ToyNetwork(norm=True), torch.randn(2, 4)))
    model(torch.randn(4, 4))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    message = r"returned aux\w+ beside its logits, and no loss reaches them.*aux_logits=False"
    assert refuses(method, message, lambda: call(method, *batch()))


@every_method
def test_logits_of_a_further_head_are_left_alone_where_a_readout_says_so(name):
    model = WithFurtherHead(norm=True)
    stages = unloaf.find_stages(ToyNetwork(norm=True), torch.randn(2, 4))
    METHODS[name](model, stages, readout=lambda output: output["logits"]).backward(*batch())
    assert (model.middle.weight.grad is None, model.head.weight.grad is None) == (True, False)


@every_method
def test_further_logits_that_are_not_there_are_none(name):
    model = WithFurtherHead(norm=True)
    model.form = lambda logits, further: Outputs(logits, None, None)
    stages = unloaf.find_stages(ToyNetwork(norm=True), torch.randn(2, 4))
    assert METHODS[name](model, stages).backward(*batch()).loss.isfinite()
