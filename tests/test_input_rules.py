"""What subnets see in place of smaller images."""

import pytest
import torch

import unloaf
from unloaf.methods.input_rules import CroppedInputs, FlippedInputs, JitteredInputs, LargerInputs
from unloaf.models.build import build_model

RULES = [LargerInputs(), CroppedInputs(), FlippedInputs(), JitteredInputs()]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count=64, side=8):
    return torch.rand(count, 3, side, side, generator=generator(7))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_the_same_generator_gives_the_same_batch_and_leaves_the_given_one(rule):
    given = batch()
    first, again, other = rule(given, generator()), rule(given, generator()), rule(given, generator(1))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert torch.equal(given, batch())


def test_larger_sides_are_drawn_alike_up_to_the_largest():
    sides = [LargerInputs(1.5)(batch(1), generator(seed)).shape[-1] for seed in range(200)]
    assert set(sides) == {8, 9, 10, 11, 12}


def test_a_crop_is_a_part_of_its_own_image():
    """Images that grow by 1 a pixel to the right: a part of them grows by its share of the side, wherever it is cut."""
    ramp = torch.arange(16.0).expand(32, 1, 16, 16)
    seen = CroppedInputs(0.5)(ramp, generator())
    steps = seen[:, 0, 8, 9] - seen[:, 0, 8, 8]
    assert torch.all((steps >= 0.499) & (steps <= 1.001))
    assert len(steps.unique()) == 32
    assert float(seen.min()) >= 0
    assert float(seen.max()) <= 15


def test_images_are_mirrored_one_by_one():
    given = batch()
    seen = FlippedInputs(0.5)(given, generator())
    kept = [torch.equal(a, b) for a, b in zip(seen, given, strict=True)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(seen, given, strict=True)]
    assert all(k != m for k, m in zip(kept, mirrored, strict=True))
    assert 16 < sum(kept) < 48


def test_jitter_scales_the_contrast_and_shifts_each_channel():
    given = batch()
    seen = JitteredInputs(0.4)(given, generator())
    factor = seen.std((2, 3)) / given.std((2, 3))
    assert torch.allclose(factor, factor[:, :1].expand_as(factor), atol=1e-4)  # one for all channels of an image
    assert 0.6 <= float(factor.min()) <= float(factor.max()) <= 1.4
    shift = (seen - given).mean((2, 3))
    assert 0.3 < float(shift.abs().max()) <= 0.4001
    assert not torch.allclose(shift[:, 0], shift[:, 1])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LargerInputs(0.5), "max_ratio is 0.5; give a multiple of at least 1"),
        (lambda: CroppedInputs(0), "min_ratio is 0; give a ratio above 0"),
        (lambda: FlippedInputs(2), "p is 2; give a probability"),
        (lambda: JitteredInputs(-1), "strength is -1; give a number from 0 to 1"),
    ],
)
def test_values_out_of_range_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_method_trains_subnets_on_them(rule):
    torch.manual_seed(0)
    model, x = build_model("cifar/resnet14", num_classes=10, in_chans=3, img_size=8, width=2), batch(4)
    method = unloaf.StimulativeTraining(model, unloaf.find_stages(model, x), subnet_inputs=rule)
    method.backward(x, torch.arange(4))
    assert all(p.grad is not None for p in model.parameters())


def test_raw_subnets_of_a_small_resnet_run_blocks_without_their_skip_connection():
    torch.manual_seed(0)
    model, x = build_model("cifar/resnet14", num_classes=10, in_chans=3, img_size=8, width=2).eval(), batch(4)
    stages = unloaf.find_stages(model, x)
    raw = unloaf.Subnet(((True, True),) * 3, ((True, False), (True, True), (True, True)))
    with torch.no_grad(), unloaf.active_subnet(model, stages, raw):
        found = model(x)
    block = model.layer1[1]
    with torch.no_grad():
        h = model.layer1[0](model.bn1(model.conv1(x)).relu())
        h = block.bn2(block.conv2(block.bn1(block.conv1(h)).relu())).relu()
        expected = model.fc(model.layer3(model.layer2(h)).mean((2, 3)))
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, model(x).detach(), atol=1e-3)
