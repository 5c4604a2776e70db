"""What exits are worth, against models of fewer layers and counts by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F

import unloaf
from decoders import decoder, prompts
from unloaf.language import judge_exits, measure_decoding
from unloaf.language.exits import expected_speed


@pytest.fixture(scope="module")
def llama():
    model = decoder("Llama")
    return model, unloaf.find_stages(model, {"input_ids": torch.tensor([[1, 2, 3]])})


def test_an_exit_is_judged_as_the_model_of_so_many_layers(llama):
    model, stages = llama
    texts = [prompts(3, seed=seed)[0].clamp(min=3) for seed in (1, 2)]
    small = copy.deepcopy(model)
    del small.model.layers[2:]
    two, main = judge_exits(model, stages, texts, depths=[2])
    with torch.no_grad():
        own, whole = ([net(text).logits[:, :-1].flatten(0, 1) for text in texts] for net in (small, model))
    own, whole = torch.cat(own), torch.cat(whole)
    labels = torch.cat([text[:, 1:].flatten() for text in texts])
    assert (two.depth, main.depth) == (2, 4)
    assert two.nats == pytest.approx(float(F.cross_entropy(own, labels)), rel=1e-5)
    assert main.nats == pytest.approx(float(F.cross_entropy(whole, labels)), rel=1e-5)
    assert two.perplexity == pytest.approx(float(F.cross_entropy(own, labels).exp()), rel=1e-5)
    assert two.agreement == pytest.approx(float((own.argmax(-1) == whole.argmax(-1)).float().mean()))
    assert two.overlap == pytest.approx(
        float(1 - (own.softmax(-1) - whole.softmax(-1)).abs().sum(-1).mean() / 2), rel=1e-4
    )
    assert (main.agreement, main.speed, main.draft_tokens) == (1.0, 1.0, 0)


def test_expected_speed_by_hand():
    # Never right: one token for 2 x 2 layers, 6 others, 2 heads, where plain decoding runs 8 layers and one head.
    assert expected_speed(0.0, draft=2, main=8, head=1.0) == (round(9 / 12, 2), 1)
    # Half of the time right: 1.5 tokens for 2 + 7 layers with one drafted, 1.75 for 3 + 7, 1.875 for 4 + 7.
    assert expected_speed(0.5, draft=1, main=8, head=0.0) == (1.4, 2)


@pytest.mark.parametrize(
    ("texts", "depths", "message"),
    [
        ([], None, "no tokens"),
        ([torch.tensor([[5]])], None, r"tokens \(1, 1\)"),
        ([torch.tensor([[5, 6]])], [5], "depth 5: the model has 4 layers"),
    ],
)
def test_bad_input_of_exits_is_told(llama, texts, depths, message):
    with pytest.raises(ValueError, match=message):
        judge_exits(*llama, texts, depths)


def test_ways_to_decode_are_counted_side_by_side(llama):
    model, stages = llama
    text, _ = prompts(1)
    draft = unloaf.Subnet.from_depths(stages, (3,))
    plain, own, theirs = measure_decoding(
        model, stages, [text, text[:, 3:]], [draft], max_new_tokens=12, draft_tokens=3, repeats=1
    )
    assert (plain.layer_calls, plain.layer_tokens, plain.speed, plain.same) == (1.0, 1.0, 1.0, 1.0)
    assert (own.same, theirs.same, own.depth, theirs.depth) == (1.0, 1.0, 3, 3)
    assert own.acceptance == pytest.approx(0.5, abs=0.49)
    # 3 layers of a token are not run again here, in its verification; its own draft is another one.
    assert theirs.layer_tokens > own.layer_tokens
    assert own.speed > 0


def test_a_model_that_transformers_cannot_leave_early_is_decoded_here():
    model = decoder("GPT-2")
    text, _ = prompts(1)
    stages = unloaf.find_stages(model, {"input_ids": text})
    draft = unloaf.Subnet.from_depths(stages, (2,))
    rows = measure_decoding(model, stages, [text], [draft], max_new_tokens=4, repeats=0)
    assert rows[1].same == 1.0
    assert rows[2].note.startswith("transformers cannot: IndexError")


def test_a_model_that_is_being_trained_is_measured_without_its_dropout():
    model, (ids, _) = decoder("Llama", attention_dropout=0.5), prompts(1)
    stages = unloaf.find_stages(model, {"input_ids": ids})
    model.train()
    draft = unloaf.Subnet.from_depths(stages, (2,))
    rows = measure_decoding(model, stages, [ids], [draft], max_new_tokens=8, repeats=0, early_exit=False)
    assert [row.same for row in rows] == [1.0, 1.0]
    assert model.training
