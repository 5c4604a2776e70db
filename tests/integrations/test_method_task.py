"""MethodTask: what is particular to timm."""

import pytest
import torch
from loops import batches, build, network, stages_of, weights
from timm.utils import NativeScaler
from torch import nn
from torch.nn import functional as F

import unloaf
from unloaf.integrations.timm import MethodTask


def test_a_checkpoint_has_plain_keys_and_restores_the_draws():
    trained = MethodTask(build("gkt"))
    x, y = batches()[0]
    trained(x, y)["loss"].backward()
    state = trained.get_checkpoint_state()
    assert list(state["state_dict"]) == list(network().state_dict())
    resumed = MethodTask(build("gkt"))
    resumed.load_checkpoint_state(**state)
    assert resumed.method.state_dict() == {"seed": 0, "step": 1}
    expected, found = trained.method(x, y), resumed.method(x, y)
    assert found.subnets == expected.subnets
    assert torch.equal(found.loss, expected.loss)


def test_a_checkpoint_of_another_task_is_refused_unless_it_may_be_one():
    task = MethodTask(build("st"))
    with pytest.raises(unloaf.CheckpointError, match="strict=False begins the draws anew"):
        task.load_checkpoint_state(network().state_dict())
    task.load_checkpoint_state(network().state_dict(), strict=False)
    assert task.method.step == 0


def test_another_model_than_the_method_s_is_refused():
    with pytest.raises(ValueError, match="model is another TinyNetwork than the one that the method was built with"):
        MethodTask(build("st"), network())


def test_evaluation_is_the_main_network_s():
    model = network()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    task = MethodTask(unloaf.stimulative_plus(model, stages_of(model), num_subnets=1, criterion=criterion)).eval()
    x, y = batches()[0]
    found, expected = task(x, y), model(x)
    assert torch.equal(found["output"], expected)
    torch.testing.assert_close(found["loss"], F.cross_entropy(expected, y, label_smoothing=0.1))
    assert task.method.step == 0


def test_a_moving_average_holds_the_weights_of_the_model():
    task = MethodTask(build("st"))
    task.setup_ema(decay=0.0)
    x, y = batches()[0]
    task(x, y)["loss"].backward()
    torch.optim.SGD(task.get_clip_parameters(), lr=0.1).step()
    task.update_ema(step=1)
    assert torch.equal(weights(task.get_eval_model(ema=True).module), weights(task.trainable_module))
    assert list(task.get_checkpoint_state(ema=True)) == ["state_dict_ema"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_block_by_block_the_loss_is_the_same():
    compiled, plain = MethodTask(build("st")), MethodTask(build("st"))
    x, y = batches()[0]
    compiled.compile(backend="eager")
    assert "forward" in vars(compiled.trainable_module.blocks[0])
    torch.testing.assert_close(compiled(x, y)["loss"], plain(x, y)["loss"])
    with pytest.raises(ValueError, match="fullgraph: blocks are compiled with backend and mode alone"):
        compiled.compile(fullgraph=True)


def test_gradients_in_float16_hold_the_factor_of_timm_s_scaler():
    def tiny_loss(logits, y):
        return F.cross_entropy(logits.float(), y) * 1e-6

    def method():
        model = network().float()
        stages = unloaf.find_stages(model, torch.zeros(2, 1, 8, 8))
        return unloaf.StimulativeTraining(model, stages, criterion=tiny_loss, subnet_weight=0.0)

    scaler = NativeScaler(device="cpu")
    scaler._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    task, twin = MethodTask(method(), scaler=scaler), method()
    x, y = batches()[0][0].float(), batches()[0][1]
    with torch.autocast("cpu", torch.float16):
        result = task(x, y)
        twin.backward(x, y, loss_scale=2.0**14)
    before, expected = weights(task), torch.cat([p.grad.flatten() for p in twin.model.parameters()]) / 2.0**14
    scaler(result["loss"], torch.optim.SGD(task.parameters(), lr=1e5))
    assert expected.any()
    torch.testing.assert_close(weights(task), before - 1e5 * expected)


def test_weights_of_classes_are_moved_with_the_task():
    model = network()
    criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 4.0]))
    task = MethodTask(unloaf.stimulative_plus(model, stages_of(model), num_subnets=1, criterion=criterion))
    task.to(torch.bfloat16)
    assert criterion.weight.dtype == torch.bfloat16
