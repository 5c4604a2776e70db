"""Smaller inputs: which sides are drawn, what a subnet sees, and models that cannot take them."""

from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import unloaf
from test_methods_bad_input import refuses, toy
from toy_networks import Block
from unloaf import SmallerInputs
from unloaf.inputs import first_examples, first_tensor, resize
from unloaf.measure.flops import method_flops
from unloaf.sampling import draw_generator

# --- the rule


@pytest.mark.parametrize(("side", "smallest"), [(224, 96), (200, 86), (32, 13)])
def test_sides_range_from_the_published_smallest_to_the_full(side, smallest):
    assert list(SmallerInputs().candidates(side)) == list(range(smallest, side + 1))


def test_sides_can_be_listed():
    assert tuple(SmallerInputs(sides=(16, 32)).candidates(32)) == (16, 32)


@pytest.mark.parametrize("rule", [SmallerInputs(), SmallerInputs(sides=(8, 12, 20))])
def test_sides_are_drawn_uniformly(rule):
    candidates, count = rule.candidates(20), 3000
    counts = Counter(rule.draw(20, draw_generator(0, step, 0)) for step in range(count))
    assert set(counts) == set(candidates)
    expected = count / len(candidates)
    statistic = sum((counts[side] - expected) ** 2 / expected for side in candidates)
    freedom = torch.tensor((len(candidates) - 1) / 2)
    assert float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2))) > 1e-4


@given(st.floats(0.01, 1), st.integers(1, 512), st.integers(0, 2**40))
def test_every_drawn_side_lies_in_the_range(ratio, side, seed):
    assert max(1, int(ratio * side)) <= SmallerInputs(ratio).draw(side, draw_generator(seed, 0, 0)) <= side


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_ratio": 0.0}, r"min_ratio is 0.0.*above 0 and up to 1"),
        ({"min_ratio": 1.2}, r"min_ratio is 1.2"),
        ({"min_ratio": float("nan")}, r"min_ratio is nan"),
        ({"per": "epoch"}, r"per is 'epoch'.*'subnet'.*'step'"),
        ({"sides": ()}, r"sides is \(\)"),
        ({"sides": (0, 8)}, r"sides is \(0, 8\).*positive"),
    ],
)
def test_a_rule_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SmallerInputs(**options)


def test_a_listed_side_above_the_batch_is_refused():
    with pytest.raises(ValueError, match=r"64, but the batch has side 32"):
        SmallerInputs(sides=(16, 64)).candidates(32)


# --- resize


@pytest.mark.parametrize(
    ("shape", "side", "expected"), [((32, 32), 20, (20, 20)), ((32, 64), 16, (16, 32)), ((60, 40), 20, (30, 20))]
)
def test_the_shorter_side_becomes_the_side(shape, side, expected):
    assert resize(torch.zeros(1, 3, *shape), side).shape[-2:] == expected


def test_resize_is_bilinear():
    # 4 -> 2 without aligned corners: the mean of the two pixels around each new centre
    images = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resize(images, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_the_full_side_is_the_batch_itself():
    images = torch.randn(1, 3, 8, 8)
    assert resize(images, 8) is images


# --- what subnets see in a step


class Looking(nn.Module):
    """A residual network of any side that remembers the inputs it was called with."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(3, 3), Block(3, 3)), nn.Linear(3, 4)
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x)
        return self.head(self.blocks(x.mean((-2, -1))))


def sides_of_a_step(rule, num_subnets=8, x=None, **options):
    model = Looking()
    x = torch.randn(2, 3, 32, 32) if x is None else x
    stages = unloaf.find_stages(model, x)
    pair = [unloaf.Subnet.from_depths(stages, (1,)), unloaf.Subnet.full(stages)] * (num_subnets // 2)
    method = unloaf.StimulativeTraining(model, stages, subnet_inputs=rule, **options)
    model.inputs.clear()
    method.backward(x, torch.tensor([0, 1]), subnets=pair)
    return model.inputs


def test_the_main_network_keeps_the_full_side():
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(sides_of_a_step(SmallerInputs(), x=x)[0], x)


def test_every_smaller_input_is_resized_once_from_the_main_input():
    x = torch.randn(2, 3, 32, 32)
    smaller = [images for images in sides_of_a_step(SmallerInputs(), x=x)[1:] if images.shape != x.shape]
    assert len(smaller) > 2
    for images in smaller:
        once = F.interpolate(x, size=images.shape[-2:], mode="bilinear", align_corners=False)
        assert torch.equal(images, once)


def test_each_subnet_draws_a_side_of_its_own():
    drawn = {images.shape[-1] for images in sides_of_a_step(SmallerInputs(), num_subnets=6)[1:]}
    assert len(drawn) > 2


def test_one_side_serves_all_subnets_of_a_step():
    assert len({images.shape[-1] for images in sides_of_a_step(SmallerInputs(per="step"), num_subnets=6)[1:]}) == 1


def test_one_side_per_step_changes_between_steps():
    model, x = Looking(), torch.randn(2, 3, 32, 32)
    stages = unloaf.find_stages(model, x)
    rule = SmallerInputs(per="step", sides=tuple(range(8, 32)))
    method = unloaf.StimulativeTraining(model, stages, subnet_inputs=rule)
    model.inputs.clear()
    for _ in range(6):
        method.backward(x, torch.tensor([0, 1]))
    assert len({images.shape[-1] for images in model.inputs if images is not x}) > 2


def test_sides_do_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    one = [images.shape for images in sides_of_a_step(SmallerInputs(), x=torch.ones(2, 3, 32, 32))]
    torch.manual_seed(2)
    assert [images.shape for images in sides_of_a_step(SmallerInputs(), x=torch.ones(2, 3, 32, 32))] == one


# --- a rule of the caller's own


def noisy(batch, generator):
    return batch[..., 8:] + torch.randn(batch[..., 8:].shape, generator=generator)


def test_a_rule_of_ones_own_sees_the_main_batch_and_draws_by_seed_step_and_index():
    x = torch.randn(2, 3, 32, 32)
    main, *seen = sides_of_a_step(noisy, x=x, num_subnets=4, seed=5)
    assert main is x
    assert len(seen) == 4
    for index, images in enumerate(seen):
        assert torch.equal(images, noisy(x, draw_generator(5, 0, index, purpose="inputs")))
    assert not torch.equal(seen[0], seen[1])


def test_a_rule_of_ones_own_may_serve_a_whole_step():
    calls = []

    def rule(batch, generator):
        calls.append(batch)
        return noisy(batch, generator)

    rule.per = "step"
    _, *seen = sides_of_a_step(rule, num_subnets=4)
    assert len(calls) == 1
    assert len(seen) == 2  # of two subnets, each asked for twice
    assert seen[0] is seen[1]


def gradient(rule):
    torch.manual_seed(0)
    model, x = Looking().double(), torch.randn(2, 3, 32, 32).double()
    stages = unloaf.find_stages(model, x)
    method = unloaf.stimulative_plus(model, stages, subnet_inputs=rule, num_subnets=2)
    method.backward(x, torch.tensor([0, 1]))
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_a_rule_that_resizes_is_as_smaller_inputs():
    assert torch.equal(gradient(lambda batch, generator: resize(batch, 16)), gradient(SmallerInputs(sides=(16,))))


def test_a_rule_of_ones_own_is_counted_in_the_cost_of_a_step():
    model, stages = build("resnet18", layers=(2, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=4)
    rules = (lambda batch, generator: resize(batch, 32)), SmallerInputs(sides=(32,))
    methods = [unloaf.StimulativeTraining(model, stages, subnet_inputs=rule) for rule in rules]
    one, other = (method_flops(method, torch.zeros(2, 3, 64, 64), range(2)) for method in methods)
    assert one == other
    assert one.shared == one.separate  # a quarter of the pixels beside the main network's


def changing(batch, generator):
    return batch.add_(1)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            lambda batch, generator: None,
            r"returned NoneType for a batch of 4; give a function of \(batch, generator\)",
        ),
        (lambda batch, generator: batch[:3], "subnet_inputs returned a batch of 3 examples for a batch of 4"),
        (changing, "subnet_inputs changed the batch that it was given in place"),
    ],
)
def test_what_a_rule_may_not_return(rule, message):
    method = unloaf.StimulativeTraining(*toy(), subnet_inputs=rule)
    assert refuses(method, message, lambda: method.backward(torch.randn(4, 4), torch.tensor([0, 1, 2, 0])))


@pytest.mark.parametrize("rule", [3, "smaller", SmallerInputs], ids=str)
def test_what_is_no_rule_for_inputs(rule):
    with pytest.raises(
        ValueError, match=r"subnet_inputs is .*; give SmallerInputs\(\.\.\.\), 'auto' or None, or a function of"
    ):
        unloaf.StimulativeTraining(*toy(), subnet_inputs=rule)


# --- models that cannot take them

VIT = {"img_size": 64, "embed_dim": 24, "num_heads": 3, "num_classes": 4, "depth": 2}
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (2, 2, 2, 2), "num_classes": 4}


def build(name, **options):
    model, x = timm.create_model(name, **options), torch.randn(1, 3, 64, 64)
    return model, unloaf.find_stages(model, x)


REFUSED = {
    # a side of 64 alone; multiples of the 16-pixel patches from int(0.43 * 64) = 27 up
    "fixed ViT": ("vit_tiny_patch16_224", VIT | {"dynamic_img_size": False}, "64"),
    "dynamic ViT": ("vit_tiny_patch16_224", VIT | {"dynamic_img_size": True}, "32, 48, 64"),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, "64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_of_fixed_sizes_are_refused_with_the_legal_ones(name):
    architecture, options, legal = REFUSED[name]
    model, stages = build(architecture, **options)
    with pytest.raises(
        ValueError, match=rf"sides 27 to 64; legal sides up to 64: {legal}\. Give SmallerInputs\(sides="
    ):
        unloaf.stimulative_plus(model, stages, subnet_inputs=SmallerInputs())


def test_a_refused_model_is_left_as_it_was():
    model, stages = build("vit_tiny_patch16_224", **VIT)
    before = [m.training for m in model.modules()], [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="legal sides"):
        unloaf.stimulative_plus(model, stages, subnet_inputs=SmallerInputs())
    assert [m.training for m in model.modules()] == before[0]
    assert all(map(torch.equal, model.parameters(), before[1]))


def test_legal_sides_are_accepted():
    model, stages = build("vit_tiny_patch16_224", **VIT, dynamic_img_size=True)
    method = unloaf.stimulative_plus(model, stages, subnet_inputs=SmallerInputs(sides=(32, 48, 64)), num_subnets=2)
    assert method.backward(torch.randn(2, 3, 64, 64), torch.tensor([0, 1])).loss.isfinite()


def test_an_illegal_listed_side_is_refused():
    model, stages = build("vit_tiny_patch16_224", **VIT, dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"legal sides up to 64: 16, 32, 48, 64\."):
        unloaf.stimulative_plus(model, stages, subnet_inputs=SmallerInputs(sides=(32, 40)))


def test_resnets_take_any_side():
    model, stages = build("resnet18", layers=(2, 1, 1, 1), channels=(64, 8, 8, 8), num_classes=4)
    assert unloaf.stimulative_plus(model, stages).subnet_inputs == SmallerInputs()


def test_inputs_that_are_no_images_are_refused():
    model = nn.Sequential(Block(4, 4), Block(4, 4), nn.Linear(4, 3))
    stages = unloaf.find_stages(model, torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"need images.*shape \(4,\)"):
        unloaf.StimulativeTraining(model, stages, subnet_inputs=SmallerInputs())


# --- ST++ on any model


FIXED = {"ViT": ("vit_tiny_patch16_224", VIT), "Swin": ("swin_tiny_patch4_window7_224", SWIN)}


@pytest.mark.parametrize("name", FIXED)
def test_without_smaller_sides_subnets_see_the_full_one_and_it_is_said_once(name):
    architecture, options = FIXED[name]
    (model, stages), x = build(architecture, **options), torch.randn(2, 3, 64, 64)
    with pytest.warns(UserWarning, match=r"cannot have a side of 27 to 63 pixels.*subnet_inputs=None") as told:
        method = unloaf.stimulative_plus(model, stages, num_subnets=3)
    assert [warning.filename for warning in told] == [__file__]
    assert {request.side for request in method.draw(len(x), x.shape[-1])} == {None}
    assert method.backward(x, torch.tensor([0, 1])).loss.isfinite()


def test_sides_that_the_model_takes_are_drawn_from():
    model, stages = build("vit_tiny_patch16_224", **VIT, dynamic_img_size=True)
    method = unloaf.stimulative_plus(model, stages, num_subnets=30)
    assert method.subnet_inputs == SmallerInputs(sides=(32, 48, 64))
    assert {request.side for request in method.draw(2, 64)} == {32, 48, None}


def test_sides_fit_the_batch_and_not_the_example_of_the_stages():
    model, stages = build("vit_tiny_patch16_224", **VIT, dynamic_img_size=True)
    method = unloaf.stimulative_plus(model, stages, num_subnets=60)
    sides = {request.side for request in method.draw(1, 96)}
    assert sides == {48, 64, 80, None}  # multiples of 16 from int(0.43 * 96) = 41 up
    method.subnet_inputs = None
    assert {request.side for request in method.draw(1, 96)} == {None}


@pytest.mark.parametrize("kind", ["features", "mapping"])
def test_what_is_no_image_is_shown_as_it_is(kind):
    torch.manual_seed(0)
    model = Graph() if kind == "mapping" else nn.Sequential(Block(6, 6), Block(6, 6), nn.Linear(6, 3))
    x = torch.randn(7, 6)
    batch = {"x": x, "edges": torch.zeros(2, 3)} if kind == "mapping" else x
    with pytest.warns(UserWarning, match="are no images"):
        method = unloaf.stimulative_plus(model, unloaf.find_stages(model, batch))
    assert method.backward(batch, torch.randint(3, (7,))).loss.isfinite()


# --- mappings, whose order means nothing


class Graph(nn.Module):
    """A class for each node; the edges have two rows, whatever the number of nodes."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(6, 6), Block(6, 6)), nn.Linear(6, 3)

    def forward(self, x, edges):
        return self.head(self.blocks(x + 0 * edges.sum()))


@pytest.mark.parametrize("names", [("x", "edges"), ("edges", "x")])
@pytest.mark.parametrize("method", [unloaf.StimulativeTraining, unloaf.GroupKnowledgeTraining, unloaf.StochasticDepth])
def test_the_order_of_a_mapping_does_not_matter(method, names):
    torch.manual_seed(0)
    given = {"x": torch.randn(7, 6), "edges": torch.randint(7, (2, 12))}
    batch, model = {name: given[name] for name in names}, Graph()
    stages = unloaf.find_stages(model, batch)
    assert method(model, stages).backward(batch, torch.randint(3, (7,))).logits.shape == (7, 3)


def test_targets_that_do_not_fit_the_logits_of_a_mapping():
    model, batch = Graph(), {"edges": torch.randint(7, (2, 12)), "x": torch.randn(7, 6)}
    method = unloaf.StimulativeTraining(model, unloaf.find_stages(model, batch))
    with pytest.raises(ValueError, match=r"7.*2"):
        method.backward(batch, torch.zeros(2).long())


def test_a_part_of_a_mapping_is_that_of_most_tensors():
    table, pixels, mask = torch.zeros(9, 2), torch.zeros(4, 3), torch.zeros(4)
    for names in (["table", "pixels", "mask"], ["mask", "pixels", "table"]):
        batch = {name: {"table": table, "pixels": pixels, "mask": mask}[name] for name in names}
        part = first_examples(batch, 2)
        assert {name: len(value) for name, value in part.items()} == {"table": 9, "pixels": 2, "mask": 2}


def test_a_part_of_a_mapping_that_cannot_be_told_is_refused():
    model, batch = Graph(), {"edges": torch.randint(7, (2, 12)), "x": torch.randn(7, 6)}
    method = unloaf.StimulativeTraining(model, unloaf.find_stages(model, batch), subnet_batch_fraction=0.5)
    with pytest.raises(ValueError, match=r"rows: edges 2, x 7; it is not known.*subnet_batch_fraction=1"):
        method.backward(batch, torch.zeros(7).long())


def test_a_number_before_the_tensors_of_a_mapping():
    assert first_tensor({"scale": torch.tensor(2.0), "pixels": torch.zeros(4, 3)}).shape == (4, 3)
