"""Ground-truth training (ST*): any loss of any model; gradients are those of separate passes."""

import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import unloaf
from reference.separate_passes import distance, ground_truth
from test_methods_bad_input import CALLS, batch, every_call, everything_about, refuses, toy, unchanged
from unloaf import GroundTruthTraining, Subnet
from unloaf.sampling import draw_generator


class Residual(nn.Module):
    def __init__(self, width_in, width, stride=1):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width_in, width, 3, stride, 1), nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, width, 1)

    def forward(self, x):
        y = self.last(torch.relu(self.norm(self.conv(x))))
        return x + y if x.shape == y.shape else y


class Backbone(nn.Module):
    """Two maps of 8 channels, 4 and 8 pixels a cell; its stages have 2 and 3 blocks."""

    out_channels = 8

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.layer1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 12, 2), Residual(12, 12), Residual(12, 12))
        self.fpn = FeaturePyramidNetwork([8, 12], 8)

    def forward(self, x):
        first = self.layer1(self.stem(x))
        return self.fpn(OrderedDict([("0", first), ("1", self.layer2(first))]))


def detector():
    """Returns its losses itself, by name, and samples boxes at random for them."""
    torch.manual_seed(0)
    model = FasterRCNN(
        Backbone(),
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,)), ((1.0,),) * 2),
        rpn_head=RPNHead(8, 1),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 3, 2),
        box_head=TwoMLPHead(72, 16),
        box_predictor=FastRCNNPredictor(16, 3),
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=20,
        rpn_batch_size_per_image=16,
        box_batch_size_per_image=8,
        _skip_resize=True,
    ).double()
    images = [torch.rand(3, 64, 64).double(), torch.rand(3, 64, 96).double()]
    boxes = torch.tensor([[8, 8, 40, 40], [20, 20, 60, 50]]).double()
    return model, (images, [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images])


def halved(batch, generator):
    images, targets = batch
    images = [F.interpolate(image[None], scale_factor=0.5)[0] for image in images]
    return images, [target | {"boxes": target["boxes"] / 2} for target in targets]


class Segmenter(nn.Module):
    """Dropout is drawn in its head, noise in its own forward."""

    def __init__(self):
        super().__init__()
        self.encoder, self.dropout, self.head = Backbone(), nn.Dropout(0.3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        maps = self.encoder(x + 0.1 * torch.randn_like(x))
        merged = maps["0"] + F.interpolate(maps["1"], scale_factor=2.0)
        return F.interpolate(self.head(self.dropout(merged)), scale_factor=4.0)


def segmenter():
    torch.manual_seed(0)
    return Segmenter().double(), (torch.rand(2, 3, 32, 32).double(), torch.randint(4, (2, 32, 32)))


def quarter(batch, generator):
    at = int(torch.randint(16, (), generator=generator))
    return tuple(part[..., at : at + 16, at : at + 16] for part in batch)


CASES = {
    "detector": (detector, "backbone", lambda model, batch: model(*batch), halved),
    "segmenter": (segmenter, "encoder", lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), quarter),
}


@pytest.mark.parametrize(("shrinks", "call"), [(False, "backward"), (False, "forward"), (True, "backward")])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_separate_passes(case, shrinks, call):
    build, within, loss, shrink = CASES[case]
    model, whole = build()
    stages = unloaf.find_stages(model, whole[0], within=within)
    subnets = [Subnet.from_depths(stages, depths) for depths in ((2, 2), (1, 3), (1, 1))]
    method = GroundTruthTraining(model, stages, loss, subnet_weight=0.5, shrink=shrink if shrinks else None, seed=4)
    batches = [whole] * 4
    if shrinks:
        batches[1:] = [shrink(whole, draw_generator(4, 0, index, purpose="inputs")) for index in range(3)]
    state = torch.get_rng_state()
    expected = ground_truth(model, stages, subnets, loss, batches, weight=0.5)
    torch.set_rng_state(state)
    out = CALLS[call](method, whole, subnets=subnets)
    if call == "forward":
        out.loss.backward()
    assert distance(model, expected) < 1e-10
    assert list(out.terms) == ["main", "subnet0", "subnet1", "subnet2"]
    assert out.logits is None


def test_subnets_of_a_classifier_are_taught_by_the_labels():
    # CE_target of the published script: one backward of the sum of plain cross-entropies.
    model, stages = toy(norm=False)
    x, y = batch()
    subnet = Subnet.from_depths(stages, (1, 2))
    loss = F.cross_entropy(model(x), y)
    with unloaf.active_subnet(model, stages, subnet):
        loss = loss + F.cross_entropy(model(x), y)
    expected = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    model.zero_grad()
    method = GroundTruthTraining(model, stages, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    out = method.backward(x, y, subnets=[subnet])  # as loops call any method
    assert torch.allclose(out.loss, loss)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, grad, atol=1e-7)


def count_calls(module, calls, name):
    # Not by a hook: a loss may read what hooks inside a block see, so that it would be computed in each pass.
    forward = module.forward
    module.forward = lambda *args: calls.append(name) or forward(*args)


def test_blocks_before_the_first_skipped_one_are_computed_once():
    model, whole = segmenter()
    stages = unloaf.find_stages(model, whole[0], within="encoder")
    computed = []
    for name, block in model.named_modules():
        if isinstance(block, Residual):
            count_calls(block.conv, computed, name[len("encoder.layer") :])
    method = GroundTruthTraining(model, stages, CASES["segmenter"][2])
    method.backward(whole, subnets=[Subnet.from_depths(stages, (2, 1)), Subnet.from_depths(stages, (1, 1))])
    assert computed == ["1.0", "1.1", "2.0", "2.1", "2.2", "2.0"]  # the second subnet alone has another input of 2.0


# --- draws


def square(model, x):
    return model(x).square().mean()


def test_draws_depend_on_seed_and_step_and_cease_at_weight_zero():
    model, stages = toy()
    options = {"num_subnets": 3, "subnet_weight": lambda step: step % 2, "sampler": unloaf.OrderedSampler()}
    method = GroundTruthTraining(model, stages, square, seed=3, **options)
    assert method.backward(batch()[0]).subnets == ()
    out = method.backward(batch()[0])
    generators = [draw_generator(3, 1, index) for index in range(3)]
    assert list(out.subnets) == [unloaf.OrderedSampler().sample(stages, generator) for generator in generators]
    assert method.state_dict() == {"seed": 3, "step": 2}


def test_a_loss_may_take_its_labels_out_of_the_batch():
    def loss(model, batch):
        y = batch.pop("y")
        return F.cross_entropy(model(**batch), y)

    x, y = batch()
    given = {"x": x, "y": y}
    assert GroundTruthTraining(*toy(), loss, num_subnets=2).backward(given).loss.isfinite()
    assert given.keys() == {"x", "y"}


# --- bad input

LOSSES = {
    "never": (lambda model, x: model.head.weight.sum(), r"did not call the model .*must call it once"),
    "twice": (lambda model, x: (model(x) - model(x)).mean(), r"called the model twice, but a pass is one call; join"),
    "rows": (
        lambda model, x: model(x).mean(1),
        r"loss returned shape \(4,\) of torch\.float32; it must return one number",
    ),
    "integer": (lambda model, x: model(x).argmax(), r"loss returned shape \(\) of torch\.int64"),
    "no tensor": (lambda model, x: float(square(model, x).detach()), "loss returned float; it must return one number"),
    "nothing": (lambda model, x: {"loss": None} | {"z": model(x).sum()}, "loss returned NoneType under 'loss'"),
    "no scalar": (lambda model, x: {"a": model(x).sum(), "b": model(x[:0])}, "called the model twice"),
    "output": (
        lambda model, x: {"loss": (z := model(x)).sum(), "logits": z},
        r"shape \(4, 3\) .* under 'logits'; it must",
    ),
    "empty": (lambda model, x: dict(zip((), model(x), strict=False)), "loss returned an empty mapping"),
    "nan": (lambda model, x: square(model, x) * math.nan, "loss of the main network is nan; no gradient was added"),
    "inf": (lambda model, x: {"a": (z := square(model, x)), "b": z * math.inf}, r"is inf \(a \d.*, b inf\)"),
    "in place": (lambda model, x: square(model, x.mul_(2)), "loss changed the batch that it was given in place"),
    "frozen": (lambda model, x: square(model, x).detach(), "no loss of this step has a gradient"),
}


@pytest.mark.parametrize("name", LOSSES)
@every_call
def test_what_a_loss_may_not_return(name, call):
    loss, message = LOSSES[name]
    method = GroundTruthTraining(*toy(), loss)
    assert refuses(method, message, lambda: call(method, batch()[0]))


@every_call
def test_a_subnet_that_diverges_leaves_no_gradient(call):
    model, stages = toy()
    subnet = Subnet.from_depths(stages, (3, 2))
    calls = iter([1.0, math.nan])
    method = GroundTruthTraining(model, stages, lambda model, x: {"a": square(model, x) * next(calls)})
    message = r"loss of subnet 3-2 is nan \(a nan\); no gradient was added"
    assert refuses(method, message, lambda: call(method, batch()[0], subnets=[subnet]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "detection"}, r"loss is 'detection'; give a function of \(model, batch\)"),
        ({"loss": torch.compile(square, backend="eager")}, r"loss was compiled by torch\.compile.*compile_blocks"),
        ({"shrink": 0.5}, r"shrink is 0.5; give a function of \(batch, generator\), or None"),
        ({"num_subnets": 0}, "num_subnets is 0; give a whole number of at least 1"),
        ({"subnet_weight": -1}, "subnet_weight is -1; give a finite number, 0 or above"),
        ({"sampler": unloaf.InterStageSampler(((1,),))}, "names depths for 1 stages"),
    ],
)
def test_arguments_out_of_range(options, message):
    model, stages = toy()
    with pytest.raises(ValueError, match=message):
        GroundTruthTraining(model, stages, **({"loss": square} | options))


@pytest.mark.parametrize(
    ("shrink", "message"),
    [
        (lambda batch, generator: None, "shrink returned NoneType for a batch of 4; give a function"),
        (
            lambda batch, generator: batch.mul_(2),
            "shrink changed the batch that it was given in place",
        ),
    ],
)
def test_what_shrink_may_not_do(shrink, message):
    method = GroundTruthTraining(*toy(), square, shrink=shrink)
    assert refuses(method, message, lambda: method.backward(batch()[0]))


def test_a_loss_that_raises_leaves_the_model_as_it_was():
    method = GroundTruthTraining(*toy(), lambda model, x: model(x)["losses"])
    before = everything_about(method)
    with pytest.raises(IndexError):
        method.backward(batch()[0])
    assert unchanged(before, everything_about(method))


# --- what passes leave behind for a loss


class Noted(nn.Module):
    """``x + f(x)``; leaves the size of what it adds on itself, as blocks of experts do with the load of theirs."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 5), nn.Linear(5, 5)
        self.size, self.factor = None, 1.0

    def forward(self, x):
        added = self.outer(torch.tanh(self.inner(x)))
        self.size = added.square().mean()
        self.factor = 1 + self.size.item()
        return x + added


def noted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), *(Noted() for _ in range(4)), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    stages = unloaf.find_stages(model, x)
    kept = [(True, True, True, False), (False, True, True, True), (True, False, True, True), (True, True, False, True)]
    return model, stages, x, [Subnet((keep,)) for keep in kept]


def reads_attributes(model, x):
    blocks = [module for module in model.modules() if isinstance(module, Noted)]
    for block in blocks:
        block.size = None
    loss = model(x).square().mean()
    return loss + sum(block.size for block in blocks if block.size is not None)


def reads_numbers(model, x):
    blocks = [module for module in model.modules() if isinstance(module, Noted)]
    for block in blocks:
        block.factor = 1.0
    return model(x).square().mean() * math.prod(block.factor for block in blocks)


def reads_by_hooks(model, x):
    seen = []
    inner = [module.inner for module in model.modules() if isinstance(module, Noted)]
    handles = [module.register_forward_hook(lambda module, args, output: seen.append(output)) for module in inner]
    loss = model(x).square().mean()
    for handle in handles:
        handle.remove()
    return loss + sum(output.square().mean() for output in seen)


@pytest.mark.parametrize("loss", [reads_attributes, reads_numbers, reads_by_hooks])
@every_call
def test_a_loss_finds_what_its_own_pass_left_in_blocks(loss, call):
    model, stages, x, subnets = noted()
    method = GroundTruthTraining(model, stages, loss)
    for subnet in [Subnet.full(stages), *subnets]:  # of a sequence of blocks, a shorter one
        kept = [block for block, keep in zip(model[1:5], subnet.keep[0], strict=True) if keep]
        loss(nn.Sequential(model[0], *kept, model[5]), x).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    out = call(method, x, subnets=subnets)
    if out.loss.requires_grad:
        out.loss.backward()
    assert distance(model, expected) < 1e-12


def test_blocks_that_leave_nothing_are_replayed_beside_others():
    model, stages, x, _ = noted()
    calls = []
    count_calls(model[0], calls, "stem")
    GroundTruthTraining(model, stages, reads_attributes).backward(x, subnets=[Subnet.from_depths(stages, (2,))])
    assert calls == ["stem"]


def test_batch_norm_s_advice_in_a_batch_of_a_tuple():
    method = GroundTruthTraining(*toy(), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    assert refuses(
        method, r"more than 1 value per channel.*give at least 2 examples", lambda: method.backward(batch(1))
    )


def test_a_batch_that_was_made_in_inference_mode_trains_what_lies_behind_a_frozen_stem():
    model, stages, x, subnets = noted()
    model[0].requires_grad_(False)
    with torch.inference_mode():
        same = x.clone()
    found = []
    for given in (x, same):
        model.zero_grad()
        GroundTruthTraining(model, stages, square).backward(given, subnets=subnets)
        found.append([p.grad for p in model[1:].parameters()])
    assert all(map(torch.equal, *found))
