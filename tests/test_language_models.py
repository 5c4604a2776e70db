"""One step of stimulative training on language models: logits per token, inputs by keyword, shifted labels."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from tests.reference import separate_passes as twin

import unloaf

SMALL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DROPOUTS = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TOLERANCE = 1e-8  # of the global norm, in float64


def gpt2():
    options = {"n_embd": 24, "n_head": 3, "n_layer": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, **DROPOUTS, **options))


def llama():
    options = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 32, "num_hidden_layers": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1, **options))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                # computes in float32 whatever the type of the model: sums would agree to 1e-8 only
                setattr(parent, name, torch.nn.RMSNorm(24, eps=child.variance_epsilon))
    return model


def next_token_loss(logits, tokens):
    """Cross-entropy of each token given those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def kl_per_text(student, teacher):
    """Sum over classes, mean over texts and tokens, written out."""
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.fixture(params=[gpt2, llama])
def network(request):
    torch.manual_seed(0)
    model = request.param().double().train()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, -3:] = 0
    inputs = {"input_ids": torch.randint(3, 40, (2, 9)), "attention_mask": mask}
    return model, unloaf.find_stages(model, inputs), inputs


def hook_that_returns_the_input(module, args, kwargs, output):
    given = args[0] if args else kwargs["hidden_states"]
    return (given,) if isinstance(output, tuple) else given  # layers of transformers 5.0 return tuples, later ones not


def separate(model, stages, subnets, inputs):
    main = model(**inputs).logits
    terms = [twin.gradients(model, next_token_loss(main, inputs["input_ids"]))]
    for subnet in subnets:
        blocks = zip(stages[0].blocks, subnet.keep[0], strict=True)
        handles = [
            model.get_submodule(path).register_forward_hook(hook_that_returns_the_input, with_kwargs=True)
            for path, kept in blocks
            if not kept
        ]
        student = model(**inputs).logits
        for handle in handles:
            handle.remove()
        terms.append(twin.gradients(model, kl_per_text(student, main.detach())))
    return twin.total(terms)


def test_a_language_model_has_one_stage_of_all_its_layers(network):
    _, stages, _ = network
    assert [stage.skippable for stage in stages] == [(True,) * 4]


@pytest.mark.parametrize("sampler", [unloaf.OrderedSampler(), unloaf.StochasticSampler(), unloaf.RawSampler()])
def test_a_step_has_a_finite_loss_per_token(network, sampler):
    model, stages, inputs = network
    method = unloaf.StimulativeTraining(model, stages, sampler=sampler, num_subnets=2, criterion=next_token_loss)
    assert torch.isfinite(method.backward(inputs, inputs["input_ids"]).loss)


@pytest.mark.parametrize("sampler", [unloaf.OrderedSampler(), unloaf.StochasticSampler()])
@pytest.mark.parametrize("mode", ["lean", "one graph"])
def test_gradients_of_a_step_are_those_of_separate_passes(network, sampler, mode):
    model, stages, inputs = network
    method = unloaf.StimulativeTraining(
        model, stages, sampler=sampler, num_subnets=3, criterion=next_token_loss, seed=4
    )
    if mode == "lean":
        subnets = method.backward(inputs, inputs["input_ids"]).subnets
    else:
        out = method(inputs, inputs["input_ids"])
        out.loss.backward()
        subnets = out.subnets
    assert any(not all(subnet.keep[0]) for subnet in subnets)
    assert twin.distance(model, separate(model, stages, subnets, inputs)) < TOLERANCE


# --- BERT: the norm stands behind the sum, so its blocks are never identities


def bert():
    options = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 32, "num_hidden_layers": 3}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=40, num_labels=3, hidden_dropout_prob=0.0, **options)
    )


BERT_BLOCKS = [[f"bert.encoder.layer.{i}" for i in range(3)]]


def bert_inputs():
    return {"input_ids": torch.randint(3, 40, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}


def test_bert_is_refused_with_the_way_to_opt_in():
    with pytest.raises(unloaf.NoResidualBlocksError, match=r"BERT.*norm behind the sum.*find_stages\(.*blocks="):
        unloaf.find_stages(bert(), bert_inputs())


def test_bert_is_taken_by_opting_in():
    (stage,) = unloaf.find_stages(bert(), bert_inputs(), blocks=BERT_BLOCKS)
    assert (stage.blocks, stage.skippable, stage.additive) == (tuple(BERT_BLOCKS[0]), (True,) * 3, (False,) * 3)


def test_a_subnet_of_bert_is_bert_without_its_last_layers():
    model, inputs = bert().eval(), bert_inputs()
    stages = unloaf.find_stages(model, inputs, blocks=BERT_BLOCKS)
    with torch.no_grad(), unloaf.active_subnet(model, stages, unloaf.Subnet.from_depths(stages, (1,))):
        logits = model(**inputs).logits
    del model.bert.encoder.layer[1:]
    with torch.no_grad():
        assert torch.equal(logits, model(**inputs).logits)
