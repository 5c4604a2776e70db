"""MethodModule: what is particular to Lightning."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from loops import BATCH, STEPS, batches, build, lightning_trainer, network, sgd, stages_of, weights
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import unloaf
from unloaf.integrations.lightning import MethodModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
)


def loader(found=None):
    return DataLoader(found if found is not None else batches(), batch_size=None)


def module(kind="st", **options):
    return MethodModule(build(kind), optimizer=sgd, **options)


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    whole, begun, resumed = module("gkt"), module("gkt"), module("gkt")
    lightning_trainer(tmp_path, max_epochs=2).fit(whole, loader())
    trainer = lightning_trainer(tmp_path)
    trainer.fit(begun, loader())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    options = {"ckpt_path": tmp_path / "first.ckpt", "weights_only": True}
    lightning_trainer(tmp_path, max_epochs=2).fit(resumed, loader(), **options)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.method.state_dict() == whole.method.state_dict()


def test_a_checkpoint_has_the_state_and_the_model_s_keys_below_model(tmp_path):
    trained = module()
    trainer = lightning_trainer(tmp_path)
    trainer.fit(trained, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["method_state"] == {"seed": 0, "step": 2 * STEPS}
    assert list(saved["state_dict"]) == [f"model.{key}" for key in network().state_dict()]
    other = MethodModule.load_from_checkpoint(tmp_path / "last.ckpt", method=build("st"), weights_only=True)
    assert torch.equal(weights(other.model), weights(trained.model))
    assert other.method.step == 2 * STEPS


def test_a_checkpoint_of_another_module_is_refused():
    with pytest.raises(unloaf.CheckpointError, match="no method's state"):
        module().on_load_checkpoint({"state_dict": {}})


def test_the_validation_loss_is_the_criterion_of_the_main_network(tmp_path):
    model = network()
    criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 4.0]).double())
    method = unloaf.stimulative_plus(model, stages_of(model), num_subnets=1, criterion=criterion)
    x, y = batches()[0]
    [found] = lightning_trainer(tmp_path).validate(MethodModule(method), loader([{"x": x, "labels": y}]), verbose=False)
    expected = F.cross_entropy(model.eval()(x), y, criterion.weight)
    assert found["val_loss"] == pytest.approx(expected.item(), rel=1e-12)
    assert method.step == 0


def test_gradients_in_float16_hold_the_scaler_s_factor(tmp_path):
    """Lightning's own plugin, for it puts bfloat16 in place of float16 on a CPU."""

    def tiny_loss(logits, y):
        return F.cross_entropy(logits.float(), y) * 1e-6

    def method():
        model = network().float()
        stages = unloaf.find_stages(model, torch.zeros(2, 1, 8, 8))
        return unloaf.StimulativeTraining(model, stages, criterion=tiny_loss, subnet_weight=0.0)

    trained, twin = method(), method()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    x, y = batches()[0][0].float(), batches()[0][1]
    trainer = lightning_trainer(
        tmp_path, plugins=MixedPrecision("16-mixed", "cpu", scaler), accumulate_grad_batches=1, max_steps=1
    )
    fast = lambda parameters: torch.optim.SGD(parameters, lr=1e5)  # noqa: E731
    trainer.fit(MethodModule(trained, optimizer=fast), loader([(x, y)]))
    with torch.autocast("cpu", torch.float16):
        twin.backward(x, y, loss_scale=2.0**14)
    for found, parameter in zip(trained.model.parameters(), twin.model.parameters(), strict=True):
        assert parameter.grad.any()
        torch.testing.assert_close(found, parameter - 1e5 * parameter.grad / 2.0**14)


def test_a_moving_average_leaves_the_training_as_it_is(tmp_path):
    plain, averaged = module(), module()
    lightning_trainer(tmp_path).fit(plain, loader())
    # Of the latest weights alone, which it puts in place of the trained ones at the end.
    lightning_trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.0)]).fit(averaged, loader())
    assert torch.equal(weights(averaged.model), weights(plain.model))
    assert averaged.method.step == plain.method.step


def test_st_star_gets_the_batch_whole_and_asks_for_a_validation_of_its_own(tmp_path):
    model, seen = network(), []

    def loss(model, batch):
        seen.append(sorted(batch))
        return F.cross_entropy(model(batch["x"]), batch["labels"])

    method = unloaf.GroundTruthTraining(model, stages_of(model), loss)
    found = [{"x": x, "labels": y} for x, y in batches(steps=1)]
    trainer = lightning_trainer(tmp_path)
    trainer.fit(MethodModule(method, optimizer=sgd), loader(found))
    assert seen == [["labels", "x"]] * 4  # two batches, a subnet each
    with pytest.raises(ValueError, match="override validation_step"):
        trainer.validate(MethodModule(method), loader(found), verbose=False)


# --- what is refused


def test_a_module_that_is_compiled_as_a_whole_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unloaf\.compile_blocks\(model, stages\)"):
        lightning_trainer(tmp_path).fit(torch.compile(module(), backend="eager"), loader())


def test_a_strategy_that_shards_is_refused(monkeypatch):
    class Sharding:
        strategy, world_size = FSDPStrategy(), 1

    monkeypatch.setattr(MethodModule, "trainer", Sharding())
    with pytest.raises(ValueError, match=r"FSDPStrategy; methods are trained on one device or by DDP"):
        module().on_fit_start()


def test_another_model_than_the_method_s_is_refused():
    with pytest.raises(ValueError, match="model is another TinyNetwork than the one that the method was built with"):
        MethodModule(build("st"), network())


def test_without_an_optimizer_there_is_no_training(tmp_path):
    with pytest.raises(ValueError, match=r"optimizer=lambda parameters: .*or override configure_optimizers"):
        lightning_trainer(tmp_path).fit(MethodModule(build("st")), loader())


def test_a_batch_of_another_form_is_refused(tmp_path):
    x, y = batches()[0]
    with pytest.raises(ValueError, match=r"keys x, target; StimulativeTraining takes \(inputs, labels\)"):
        lightning_trainer(tmp_path).fit(module(), loader([{"x": x, "target": y}] * BATCH))
