"""MethodTrainer: what is particular to the Trainer of transformers."""

import copy
import json

import pytest
import torch
from loops import (
    ACCUMULATED,
    BATCH,
    STEPS,
    arguments,
    build,
    examples,
    method_trainer,
    network,
    sgd,
    stages_of,
    weights,
)
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, Trainer

import tiny
import unloaf
from unloaf.integrations.transformers import MethodTrainer

TOLERANCE = 1e-12  # float64: sums in another order


def close(found, expected):
    return (found - expected).norm() <= TOLERANCE * expected.norm()


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    whole, begun, resumed = build("gkt"), build("gkt"), build("gkt")
    method_trainer(whole, tmp_path / "whole").train()
    method_trainer(begun, tmp_path / "begun", save_strategy="steps", save_steps=3).train()
    checkpoint = tmp_path / "begun" / "checkpoint-3"
    method_trainer(resumed, tmp_path / "begun").train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.state_dict() == whole.state_dict() == {"seed": 0, "step": STEPS * ACCUMULATED}
    assert json.loads((checkpoint / "method_state.json").read_text()) == {"seed": 0, "step": 3 * ACCUMULATED}


def test_a_checkpoint_without_the_method_s_state_is_refused(tmp_path):
    trainer = method_trainer(build("st"), tmp_path, save_strategy="steps", save_steps=STEPS)
    trainer.train()
    (tmp_path / f"checkpoint-{STEPS}" / "method_state.json").unlink()
    with pytest.raises(unloaf.CheckpointError, match=r"the draws cannot go on.*leave out resume_from_checkpoint"):
        method_trainer(build("st"), tmp_path).train(resume_from_checkpoint=True)


def test_a_saved_model_has_the_keys_of_the_model_alone(tmp_path):
    method = build("st")
    method_trainer(method, tmp_path).save_model()
    assert load_file(tmp_path / "model.safetensors").keys() == method.model.state_dict().keys()


def test_evaluation_and_prediction_are_the_main_network_s(tmp_path):
    model, data = network(), examples(steps=1)
    method = unloaf.stimulative_plus(model, stages_of(model), num_subnets=1)
    trainer = MethodTrainer(model, arguments(tmp_path), method=method, eval_dataset=data)
    x, y = torch.stack([one["x"] for one in data]), torch.tensor([one["labels"] for one in data])
    logits = model.eval()(x)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-12)
    found = trainer.predict(data)
    assert torch.equal(torch.tensor(found.predictions), logits)
    assert found.label_ids.tolist() == y.tolist()
    assert method.step == 0


# --- language models


def language_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, max_position_embeddings=8, use_cache=False, **sizes)).double()
    return model, unloaf.find_stages(model, {"input_ids": torch.zeros(1, 6, dtype=torch.long)})


def sentences():
    """Six tokens each, the last of which may be padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (STEPS * ACCUMULATED * BATCH, 6), generator=generator)
    labels = tokens.clone()
    labels[::3, 4:] = -100
    mask = (labels != -100).long()
    return [{"input_ids": t, "attention_mask": m, "labels": y} for t, m, y in zip(tokens, mask, labels, strict=True)]


def shifted(sentence):
    return sentence | {"labels": torch.cat([sentence["labels"][1:], torch.tensor([-100])])}


def trained_plainly(method):
    """On the labels one place to the left, without padding."""
    optimizer, data = sgd(method.model.parameters()), [shifted(sentence) for sentence in sentences()]
    method.model.train()
    for index in range(STEPS * ACCUMULATED):
        part = data[index * BATCH : (index + 1) * BATCH]
        batch = {key: torch.stack([one[key] for one in part]) for key in part[0]}
        labels = batch.pop("labels")
        method.backward(batch, labels, loss_scale=1 / ACCUMULATED)
        if (index + 1) % ACCUMULATED == 0:
            optimizer.step()
            optimizer.zero_grad()
    return weights(method.model)


@pytest.mark.parametrize("by", ["trainer", "data", "trainer, recomputed"])
def test_a_causal_model_with_padding_is_trained_as_by_plain_steps(by, tmp_path):
    expected = trained_plainly(unloaf.StimulativeTraining(*language_model(), num_subnets=2))
    method = unloaf.StimulativeTraining(*language_model(), num_subnets=2)
    data = [shifted(sentence) for sentence in sentences()] if by == "data" else sentences()
    options = {"activation_checkpointing": "recomputed" in by}
    trainer = method_trainer(method, tmp_path, data=data, **options)
    trainer.shift_labels = by != "data"
    trainer.train()
    assert close(weights(method.model), expected)


def test_labels_that_are_the_input_tokens_are_told_of(tmp_path):
    trainer = method_trainer(unloaf.StimulativeTraining(*language_model()), tmp_path, data=sentences())
    with pytest.warns(UserWarning, match=r"learns to repeat its input.*shift_labels=True"):
        trainer.train()


def test_a_loss_that_the_model_computes_itself_is_trained_by_ground_truth_training(tmp_path):
    model, stages = language_model()
    method = unloaf.GroundTruthTraining(model, stages, lambda model, batch: model(**batch).loss)
    trainer = method_trainer(method, tmp_path, data=sentences(), max_steps=1, gradient_accumulation_steps=1)
    before = weights(model)
    trainer.train()
    moved = weights(model) - before
    twin, stages = language_model()
    batch = {key: torch.stack([one[key] for one in sentences()[:BATCH]]) for key in sentences()[0]}
    out = unloaf.GroundTruthTraining(twin, stages, method.loss).backward(batch)
    # the first step of SGD, at a learning rate of 0.1
    assert close(moved, torch.cat([p.grad.flatten() for p in twin.parameters()]) * -0.1)
    assert out.loss.item() == pytest.approx(trainer.state.log_history[-1]["train_loss"], rel=1e-6)
    assert trainer.evaluate(sentences())["eval_loss"] > 0


@pytest.mark.parametrize("kind", ["decoder", "encoder and decoder"])
def test_the_evaluation_loss_is_that_of_the_plain_trainer(kind, tmp_path):
    data = sentences()[:BATCH]
    model, stages = language_model()
    if kind != "decoder":
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(vocab_size=11, decoder_start_token_id=0, **sizes)).double()
        tokens = data[0]["input_ids"][None]
        stages = unloaf.find_stages(model, {"input_ids": tokens, "decoder_input_ids": tokens})
    method = unloaf.StimulativeTraining(model, stages)
    found = MethodTrainer(method=method, args=arguments(tmp_path), shift_labels=kind == "decoder").evaluate(data)
    assert found["eval_loss"] == pytest.approx(Trainer(model, arguments(tmp_path)).evaluate(data)["eval_loss"])


# --- mixed precision


def test_in_bfloat16_gradients_are_those_of_plain_steps_in_autocast(tmp_path):
    torch.manual_seed(0)
    model, data = tiny.TinyNetwork(dropout=0.0), examples(steps=1)[:BATCH]
    data = [one | {"x": one["x"].float()} for one in data]
    twin = copy.deepcopy(model)
    stages = unloaf.find_stages(model, torch.zeros(2, 1, 8, 8))
    method, before = unloaf.StimulativeTraining(model, stages), weights(model)
    method_trainer(method, tmp_path, data=data, bf16=True, max_steps=1, gradient_accumulation_steps=1).train()
    x, y = torch.stack([one["x"] for one in data]), torch.tensor([one["labels"] for one in data])
    with torch.autocast("cpu", torch.bfloat16):
        unloaf.StimulativeTraining(twin, stages).backward(x, y)
    expected = torch.cat([p.grad.flatten() for p in twin.parameters()])
    # Gradients of float32 read off weights of float32; of the passes alone bfloat16 would leave 1e-2.
    assert ((before - weights(model)) / 0.1 - expected).norm() < 1e-4 * expected.norm()


class Half(tiny.TinyNetwork):
    """As accelerate makes it: mixed precision inside the model's own forward."""

    half = False

    def forward(self, x):
        with torch.autocast("cpu", torch.float16, enabled=self.half):
            return super().forward(x.float())


def half_precision_method():
    """Whose gradients are too small for float16 without a factor."""
    torch.manual_seed(0)
    model = Half(dropout=0.0)
    stages = unloaf.find_stages(model, torch.zeros(2, 1, 8, 8))
    model.half = True
    criterion = lambda logits, y: F.cross_entropy(logits.float(), y) * 1e-6  # noqa: E731
    return unloaf.StimulativeTraining(model, stages, criterion=criterion, subnet_weight=0.0)


def test_gradients_in_float16_hold_the_scaler_s_factor(tmp_path):
    scaler, data = torch.amp.GradScaler("cpu", init_scale=2.0**14), examples(steps=1)[:BATCH]
    method, twin = half_precision_method(), half_precision_method()
    trainer = method_trainer(method, tmp_path, data=data, max_steps=1, gradient_accumulation_steps=1)
    trainer.accelerator.scaler = scaler
    trainer.optimizer = torch.optim.SGD(method.model.parameters(), lr=1e5)
    trainer.train()
    x, y = torch.stack([one["x"] for one in data]), torch.tensor([one["labels"] for one in data])
    twin.backward(x, y, loss_scale=2.0**14)
    for trained, parameter in zip(method.model.parameters(), twin.model.parameters(), strict=True):
        assert parameter.grad.any()
        torch.testing.assert_close(trained, parameter - 1e5 * parameter.grad / 2.0**14)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, r"criterion=nn\.CrossEntropyLoss\(label_smoothing=\.\.\.\)"),
        ({"torch_compile": True}, r"unloaf\.compile_blocks\(model, stages\)"),
        ({"ddp_find_unused_parameters": True}, r"parameter\.requires_grad_\(False\)"),
        ({"ddp_static_graph": True}, r"ddp_static_graph is True"),
    ],
    ids=str,
)
def test_arguments_that_a_step_would_not_take_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # torch_compile sets it
    with pytest.raises(ValueError, match=message):
        method_trainer(build("st"), tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_loss_func": lambda *_: None}, "give it to the method: criterion="),
        ({"model_init": network}, "give the model that the method was built with"),
        ({"model": nn.Linear(2, 2)}, "model is another Linear than the one that the method was built with"),
        ({"method": "st++"}, r"method is str; give a method such as unloaf\.StimulativeTraining"),
    ],
    ids=["compute_loss_func", "model_init", "model", "method"],
)
def test_what_does_not_fit_the_method_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MethodTrainer(**{"method": build("st"), "args": arguments(tmp_path)} | options)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs in one process are not supported.*torchrun --nproc-per-node 2"):
        MethodTrainer(method=build("st"), args=args)


def test_sharded_weights_are_refused(tmp_path, monkeypatch):
    prepare = Trainer.create_accelerator_and_postprocess

    def sharded(self):
        prepare(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(MethodTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match="leave out DeepSpeed and FSDP"):
        MethodTrainer(method=build("st"), args=arguments(tmp_path))


def test_inputs_without_labels_are_refused(tmp_path):
    data = [{"x": one["x"], "start_positions": 1} for one in examples()]
    trainer = method_trainer(build("st"), tmp_path, data=data, remove_unused_columns=False)
    with pytest.raises(ValueError, match=r"keys x, start_positions; StimulativeTraining takes .*GroundTruthTraining"):
        trainer.train()


def test_weights_of_classes_count_through_the_criterion(tmp_path):
    criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 4.0]).double())
    model = network()
    method = unloaf.StimulativeTraining(model, stages_of(model), criterion=criterion, subnet_weight=0.0)
    data = examples(steps=1)[:BATCH]
    method_trainer(method, tmp_path, data=data, max_steps=1, gradient_accumulation_steps=1).train()
    twin = network()
    x, y = torch.stack([one["x"] for one in data]), torch.tensor([one["labels"] for one in data])
    each = F.cross_entropy(twin(x), y, reduction="none")
    share = torch.tensor([1.0, 2.0, 4.0]).double()[y]
    ((each * share).sum() / share.sum()).backward()
    assert close(weights(model), torch.cat([(p - 0.1 * p.grad).flatten() for p in twin.parameters()]))
