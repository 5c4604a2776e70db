"""Subnets as values, and what running a model as one of them computes and leaves behind."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import unloaf
from toy_networks import ToyNetwork
from unloaf import Stage, Subnet

HEADED = Stage("headed", ("a", "b", "c"), (False, True, True))
FREE = Stage("free", ("d", "e"), (True, True))
STAGES = (HEADED, FREE)


@pytest.fixture
def model():
    return ToyNetwork().eval()


@pytest.fixture
def x():
    return torch.randn(2, 4)


@pytest.fixture
def stages(model, x):
    return unloaf.find_stages(model, x)


# --- the value


@pytest.mark.parametrize(
    ("depths", "keep"),
    [
        ((3, 2), ((True, True, True), (True, True))),
        ((1, 2), ((True, False, False), (True, True))),
        ((2, 1), ((True, True, False), (True, False))),
    ],
)
def test_depths_keep_the_first_blocks_of_each_stage(depths, keep):
    assert Subnet.from_depths(STAGES, depths).keep == keep


def test_full_keeps_all():
    assert Subnet.full(STAGES) == Subnet.from_depths(STAGES, (3, 2))


def test_depths_of_a_subnet_count_its_kept_blocks():
    assert Subnet(((True, False, True), (False, True))).depths == (2, 1)


@pytest.mark.parametrize(
    ("keep", "shortcut", "text"),
    [
        (((True, True, False), (True, False)), None, "2-1"),
        (((True, False, True), (False, True)), None, "2:101-1:01"),
        (((True, True, True), (True, False)), ((True, True, True), (False, True)), "3-1:b0"),
    ],
)
def test_text_of_a_subnet(keep, shortcut, text):
    assert str(Subnet(keep, shortcut)) == text


@pytest.mark.parametrize(
    ("small", "large", "inside"),
    [
        ((1, 1), (2, 1), True),
        ((2, 1), (2, 1), True),
        ((2, 1), (1, 2), False),
        ((3, 2), (3, 1), False),
    ],
)
def test_order_of_ordered_subnets(small, large, inside):
    assert (Subnet.from_depths(STAGES, small) <= Subnet.from_depths(STAGES, large)) is inside


def test_a_block_without_its_shortcut_lies_inside_the_whole_block():
    branch = Subnet(((True, True),), ((True, False),))
    assert branch <= Subnet(((True, True),))
    assert not Subnet(((True, True),)) <= branch


def test_skipping_lies_not_inside_a_block_without_its_shortcut():
    assert not Subnet(((True, False),)) <= Subnet(((True, True),), ((True, False),))


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        ((0, 2), r"'headed' keeps 0 of 3.*\(1, 2, 3\)"),
        ((4, 2), r"'headed' keeps 4 of 3.*\(1, 2, 3\)"),
        ((3, -1), r"'free' keeps -1 of 2.*\(1, 2\)"),
        ((3,), r"1 depths \(3,\) for 2 stages \(headed, free\)"),
        ((1.5, 1), r"keeps 1.5 of 3"),
    ],
)
def test_depths_out_of_range_are_refused_with_the_legal_ones(depths, message):
    with pytest.raises(ValueError, match=message):
        Subnet.from_depths(STAGES, depths)


def test_one_number_is_no_list_of_depths():
    with pytest.raises(
        ValueError, match=r"depths is 3; give one depth for each stage, the main network's are \(3, 2\)"
    ):
        Subnet.from_depths(STAGES, 3)


def test_depths_may_come_from_a_generator():
    assert Subnet.from_depths(STAGES, (depth for depth in (2, 1))) == Subnet.from_depths(STAGES, (2, 1))


@pytest.mark.parametrize(
    ("value", "given"),
    [((2, 1), r"\(2, 1\) is of type tuple"), ("2-1", "'2-1' is of type str"), (2, "2 is of type int")],
)
def test_what_is_no_subnet_is_told_how_to_make_one(value, given, model, stages):
    advice = rf"{given}; give a Subnet, e\.g\. Subnet\.from_depths\(stages, \(3, 3\)\)"
    with pytest.raises(ValueError, match=advice), unloaf.active_subnet(model, stages, value):
        pass


def test_depths_that_drop_an_unskippable_block_are_refused_by_its_name():
    stage = Stage("s", tuple("abc"), (True, False, True))
    with pytest.raises(ValueError, match=r"'s' keeps 1 of 3 blocks, but block 'b' changes shape.*\(2, 3\)"):
        Subnet.from_depths([stage], (1,))


# --- running it


def smaller_network(model, first, second):
    """The blocks of a model that a subnet keeps, as a network of its own."""
    keep_first = [block for block, kept in zip(model.first, first, strict=True) if kept]
    keep_second = [block for block, kept in zip(model.second, second, strict=True) if kept]
    return nn.Sequential(*keep_first, *keep_second, model.head)


KEEPS = [
    ((True, True, True), (True, True, True)),
    ((True, False, False), (True, False, False)),
    ((True, True, False), (True, False, False)),
    ((True, False, True), (True, False, True)),
]


@pytest.mark.parametrize("keep", KEEPS)
def test_a_subnet_equals_the_network_built_of_its_blocks(model, stages, x, keep):
    with unloaf.active_subnet(model, stages, Subnet(keep)):
        logits = model(x)
    assert torch.equal(logits, smaller_network(model, *keep)(x))


@pytest.mark.parametrize("keep", KEEPS)
def test_a_subnet_runs_only_its_blocks(model, stages, x, keep):
    ran = []
    for path, module in model.named_modules():
        if path.endswith(".inner"):
            module.register_forward_hook(lambda *_, path=path: ran.append(path))
    with unloaf.active_subnet(model, stages, Subnet(keep)):
        model(x)
    flags = zip(("first", "second"), keep, strict=True)
    assert ran == [f"{name}.{i}.inner" for name, kept in flags for i, k in enumerate(kept) if k]


def test_gradients_reach_the_kept_blocks_alone(model, stages, x):
    with unloaf.active_subnet(model, stages, Subnet.from_depths(stages, (2, 1))):
        model(x).sum().backward()
    assert [block.outer.weight.grad is None for block in model.first] == [False, False, True]


def test_an_additive_block_without_its_shortcut_is_its_branch(model, stages, x):
    shortcut = ((True, False, True), (True, True, True))
    with unloaf.active_subnet(model, stages, Subnet(((True,) * 3, (True,) * 3), shortcut)):
        logits = model(x)
    h = model.first[0](x)
    branch = model.first[1].outer(torch.tanh(model.first[1].inner(h)))
    torch.testing.assert_close(logits, model.head(model.second(model.first[2](branch))))


def resnet():
    model = timm.create_model("resnet18", num_classes=5, channels=(64, 8, 8, 8), zero_init_last=False)
    return model.eval(), torch.randn(2, 3, 32, 32)


def test_a_resnet_block_without_its_shortcut_is_the_activation_of_its_branch():
    model, images = resnet()
    stages = unloaf.find_stages(model, images)
    cut = Subnet(((True,) * 2,) * 4, ((True, False), *((True, True),) * 3))
    seen = {}
    model.layer1[1].register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad(), unloaf.active_subnet(model, stages, cut):
        model(images)
        block, h = model.layer1[1], seen["x"]
        expected = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(h))))))
    torch.testing.assert_close(seen["y"], expected)


def test_a_resnet_block_gets_its_shortcut_back():
    model, images = resnet()
    stages = unloaf.find_stages(model, images)
    before = {path: sorted(module.__dict__) for path, module in model.named_modules()}
    cut = Subnet(((True,) * 2,) * 4, ((True, False), *((True, True),) * 3))
    with unloaf.active_subnet(model, stages, cut):
        model(images)
    assert {path: sorted(module.__dict__) for path, module in model.named_modules()} == before


# --- what it leaves behind


def leftovers(model):
    return [path for path, module in model.named_modules() if "forward" in module.__dict__]


def test_the_model_is_whole_again(model, stages, x):
    expected = model(x)
    with unloaf.active_subnet(model, stages, Subnet.from_depths(stages, (1, 1))):
        assert not torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)
    assert leftovers(model) == []


def test_the_model_is_whole_again_after_an_exception(model, stages):
    with (
        pytest.raises(ZeroDivisionError),
        unloaf.active_subnet(model, stages, Subnet.from_depths(stages, (1, 1))),
    ):
        raise ZeroDivisionError
    assert leftovers(model) == []


def test_the_model_is_whole_again_after_an_exception_in_its_own_pass(model, stages):
    with (
        pytest.raises(RuntimeError),
        unloaf.active_subnet(model, stages, Subnet.from_depths(stages, (1, 1))),
    ):
        model(torch.randn(2, 99))
    assert leftovers(model) == []


@pytest.mark.parametrize("outer", [(1, 1), (2, 3)])
@pytest.mark.parametrize("inner", [(1, 1), (3, 3)])
def test_nested_use_is_refused(model, stages, outer, inner):
    with (
        unloaf.active_subnet(model, stages, Subnet.from_depths(stages, outer)),
        pytest.raises(ValueError, match="already runs inside active_subnet"),
        unloaf.active_subnet(model, stages, Subnet.from_depths(stages, inner)),
    ):
        pass


def test_refused_nested_use_leaves_the_outer_subnet_running(model, stages, x):
    small = Subnet.from_depths(stages, (1, 1))
    with unloaf.active_subnet(model, stages, small):
        expected = model(x)
        with pytest.raises(ValueError, match="already"), unloaf.active_subnet(model, stages, Subnet.full(stages)):
            pass
        assert torch.equal(model(x), expected)


def test_a_deepcopy_made_inside_is_the_same_subnet(model, stages, x):
    with unloaf.active_subnet(model, stages, Subnet.from_depths(stages, (1, 2))):
        twin, expected = copy.deepcopy(model), model(x)
    assert torch.equal(twin(x), expected)


def test_a_deepcopy_made_inside_has_weights_of_its_own(model, stages, x):
    shortcut = ((True, False, True), (True, True, True))  # a replaced forward that computes with the block's weights
    with unloaf.active_subnet(model, stages, Subnet(((True,) * 3, (True,) * 3), shortcut)):
        twin, expected = copy.deepcopy(model), model(x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    assert torch.equal(twin(x), expected)


def test_class_and_keys_stay_inside(model, stages):
    before = [type(module) for module in model.modules()], list(model.state_dict())
    with unloaf.active_subnet(model, stages, Subnet.from_depths(stages, (1, 1))):
        assert ([type(module) for module in model.modules()], list(model.state_dict())) == before


@pytest.mark.parametrize("path", ["first.0", "first.2"], ids=["kept", "skipped"])
def test_hooks_of_the_user_still_fire(model, stages, x, path):
    calls = []
    model.get_submodule(path).register_forward_hook(lambda *_: calls.append(path))
    with unloaf.active_subnet(model, stages, Subnet.from_depths(stages, (1, 1))):
        model(x)
    assert calls == [path]


def test_a_forward_of_the_users_own_comes_back(model, stages, x):
    def doubled(h):
        return 2 * h

    model.first[2].forward = doubled
    with unloaf.active_subnet(model, stages, Subnet.from_depths(stages, (1, 1))):
        model(x)
    assert model.first[2].__dict__["forward"] is doubled


def test_a_forward_of_the_users_own_runs_in_a_kept_block(model, stages, x):
    model.first[1].forward = lambda h: 2 * h
    with unloaf.active_subnet(model, stages, Subnet.from_depths(stages, (2, 1))):
        logits = model(x)
    assert torch.equal(logits, model.head(model.second[0](2 * model.first[0](x))))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (((True, True),), r"\(2,\) blocks per stage.*\(3, 3\).*another model"),
        (((False, True, True), (True, True, True)), r"skips block 'first.0', which changes shape"),
    ],
)
def test_subnets_that_do_not_fit_are_refused(model, stages, keep, message):
    with pytest.raises(ValueError, match=message), unloaf.active_subnet(model, stages, Subnet(keep)):
        pass
    assert leftovers(model) == []


def test_stages_of_another_model_are_refused(model):
    stages = (Stage("layer1", ("layer1.0", "layer1.1"), (True, True)),)
    with (
        pytest.raises(ValueError, match=r"ToyNetwork has no block 'layer1.0'"),
        unloaf.active_subnet(model, stages, Subnet.full(stages)),
    ):
        pass


def test_an_unskippable_block_cannot_run_without_a_shortcut_it_does_not_have(model, stages):
    cut = Subnet(((True,) * 3, (True,) * 3), ((False, True, True), (True, True, True)))
    with (
        pytest.raises(ValueError, match=r"'first.0'.*cannot run without its skip connection"),
        unloaf.active_subnet(model, stages, cut),
    ):
        pass


# --- 2,000 generated specifications

flags = st.lists(st.booleans(), min_size=0, max_size=4).map(tuple)
keeps = st.one_of(st.tuples(*[st.tuples(*[st.booleans()] * 3)] * 2), st.lists(flags, max_size=3).map(tuple))
model_2000 = ToyNetwork().eval()
stages_2000 = unloaf.find_stages(model_2000, torch.zeros(1, 4))


@settings(max_examples=1000)
@given(st.lists(st.integers(-2, 5), max_size=3))
def test_any_depths_give_a_legal_subnet_or_a_value_error(depths):
    try:
        subnet = Subnet.from_depths(stages_2000, depths)
    except ValueError:
        assert len(depths) != 2 or not all(1 <= depth <= 3 for depth in depths)
    else:
        assert list(subnet.depths) == depths


@settings(max_examples=1000)
@given(keeps, st.none() | keeps)
def test_any_flags_give_a_run_or_a_value_error(keep, shortcut):
    legal = [len(k) for k in keep] == [3, 3] and all(k[0] for k in keep)
    shapes_agree = shortcut is None or [len(k) for k in shortcut] == [3, 3]
    try:
        with torch.no_grad(), unloaf.active_subnet(model_2000, stages_2000, Subnet(keep, shortcut)):
            assert model_2000(torch.zeros(1, 4)).shape == (1, 3)
        assert legal
        assert shapes_agree
    except ValueError:
        assert not (legal and shortcut is None)
    assert leftovers(model_2000) == []
