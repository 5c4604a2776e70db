"""Self-speculative decoding: the tokens of transformers' own decoding, and no layer twice for a token."""

import math
from collections import Counter

import pytest
import torch
import transformers
from scipy.stats import chi2_contingency, chisquare

import unloaf
from decoders import FAMILIES, VOCAB, decoder, prompts
from unloaf.language import generate
from unloaf.language.draft_length import DraftLength
from unloaf.language.slots import Slots

NEW = 16


def stages_of(model):
    return unloaf.find_stages(model, {"input_ids": torch.tensor([[1, 2, 3]])})


def first(model, depth):
    stages = stages_of(model)
    return stages, unloaf.Subnet.from_depths(stages, (depth,))


@pytest.fixture(scope="module")
def llama():
    return decoder("Llama")


def plain(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, do_sample=False, **{"max_new_tokens": NEW, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_plain_decoding(family):
    model, (ids, mask) = decoder(family), prompts(4)
    stages, draft = first(model, 3)
    rounds = []
    tokens = generate(
        model, stages, ids, attention_mask=mask, draft=draft, max_new_tokens=NEW, draft_tokens=4, on_round=rounds.append
    )
    assert torch.equal(tokens, plain(model, ids, mask))
    assert any(len(set(one.accepted)) > 1 for one in rounds)  # rows differ
    single = generate(model, stages, ids[:1], draft=draft, max_new_tokens=NEW, draft_tokens=4)
    assert torch.equal(single, plain(model, ids[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_a_thousand_prompts(family):
    """In float32, where 2 of 1,000 texts may leave the other's at a tie: two logits equal to rounding."""
    model = decoder(family)
    stages, draft = first(model, 3)
    left = 0
    for start in range(0, 1000, 4):
        ids, mask = prompts(4, seed=start)
        expected = plain(model, ids, mask, max_new_tokens=64)
        options = {"draft": draft, "max_new_tokens": 64, "draft_tokens": 4}
        tokens = generate(model, stages, ids, attention_mask=mask, **options)
        single = generate(model, stages, ids[:1], **options)
        left += int((tokens != expected).any(-1).sum()) + int(not torch.equal(single, expected[:1]))
    assert left <= 2


def test_drafting_stops_where_the_draft_is_sure_of_nothing_and_goes_on_where_it_is_right(llama):
    ids, _ = prompts(1)
    stages, draft = first(llama, 1)
    rounds = []
    generate(llama, stages, ids, draft=draft, max_new_tokens=NEW, on_round=rounds.append)
    assert sum(one.drafted for one in rounds) == 0
    with torch.no_grad():
        same = decoder("Llama")  # layers behind the draft change nothing, and it is sure
        for layer in same.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        same.lm_head.weight.mul_(100)
    rounds.clear()
    tokens = generate(same, stages, ids, draft=draft, max_new_tokens=20, on_round=rounds.append)
    assert torch.equal(tokens, plain(same, ids, max_new_tokens=20))
    assert [one.drafted for one in rounds] == [16, 1]  # the longest draft, one token more; the first is the prompt's


def test_a_useless_draft_rests_for_twice_as_many_rounds_each_time():
    length = DraftLength(draft=1, main=8, head=0.5)
    asked = []
    for number in range(16):
        if not length.rests():
            asked.append(number)
            length.begin(rows=1)
            assert not length.goes_on([0.01])
            length.end(1.0)
    assert asked == [0, 2, 6, 14]


def runs(model, work):
    """For how many tokens each layer's attention has run, and how often."""
    tokens, calls = Counter(), Counter()
    attention = [(i, layer.self_attn) for i, layer in enumerate(model.model.layers)]

    def count(index):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            tokens[index] += hidden.shape[0] * hidden.shape[1]
            calls[index] += 1

        return hook

    handles = [module.register_forward_pre_hook(count(index), with_kwargs=True) for index, module in attention]
    made = work()
    for handle in handles:
        handle.remove()
    return made, tokens, calls


@pytest.mark.parametrize(
    ("rows", "windows", "expected"), [([[1, 1]], (None,), True), ([[0, 1]], (None,), False), ([[1, 1]], (1,), False)]
)
def test_a_token_needs_no_mask_where_it_sees_all(rows, windows, expected):
    slots = Slots(torch.tensor(rows), windows, torch.float32)
    assert slots.last_sees_all is expected
    slots.append(1)
    nothing_hidden = bool((slots.mask(1) if len(set(windows)) == 1 else None).eq(0).all())
    assert nothing_hidden is expected


def test_rows_that_part_need_a_mask(llama):
    slots = Slots(torch.ones(2, 3), (None,), torch.float32)
    slots.append(2)
    slots.drop([0, 1])
    assert not slots.last_sees_all
    slots.keep(torch.tensor([0]))
    assert slots.last_sees_all


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_single_row_without_padding_gives_the_same_tokens(attention):
    model, (ids, _) = decoder("Llama"), prompts(1)
    model.set_attn_implementation(attention)
    stages, draft = first(model, 2)
    for count in (1, 3):
        tokens = generate(model, stages, ids, draft=draft, max_new_tokens=NEW, draft_tokens=count)
        assert torch.equal(tokens, plain(model, ids))


def test_no_layer_runs_twice_for_a_token(llama):
    ids, _ = prompts(1)
    stages, draft = first(llama, 3)
    rounds = []
    _, tokens, calls = runs(
        llama,
        lambda: generate(llama, stages, ids, draft=draft, max_new_tokens=NEW, draft_tokens=4, on_round=rounds.append),
    )
    looked_at = ids.shape[1] + sum(one.drafted + 1 for one in rounds)
    assert tokens == dict.fromkeys(range(4), looked_at)
    assert calls[3] == 1 + len(rounds)
    assert calls[0] == 1 + sum(one.drafted + 1 for one in rounds)


def test_fewer_layer_runs_than_early_exit_of_transformers_and_the_same_tokens(llama):
    ids, _ = prompts(1)
    stages, draft = first(llama, 3)
    llama.generation_config.num_assistant_tokens_schedule = "constant"
    llama.generation_config.num_assistant_tokens = 4
    llama.generation_config.assistant_confidence_threshold = 0.0
    rounds = []
    ours, mine, _ = runs(
        llama,
        lambda: generate(llama, stages, ids, draft=draft, max_new_tokens=NEW, draft_tokens=4, on_round=rounds.append),
    )
    theirs, other, _ = runs(llama, lambda: plain(llama, ids, assistant_early_exit=3))
    assert torch.equal(ours, theirs)
    drafted = sum(one.drafted for one in rounds)
    # Both look at nearly the same tokens with the last layer: there the first draft reads the prompt, too.
    assert abs(other[3] - mine[3]) <= 4
    # The draft of theirs reads the prompt and writes for itself; ours has left that to the verification.
    assert all(mine[index] == mine[3] and other[index] - other[3] >= drafted for index in range(3))


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_end_at_a_stop_token_as_those_of_transformers(llama, rows):
    ids, mask = prompts(rows)
    stages, draft = first(llama, 3)
    text = plain(llama, ids, mask)[:, 9:]
    stops = [int(text[0, 5]), int(text[-1, 9])]
    tokens = generate(
        llama, stages, ids, attention_mask=mask, draft=draft, max_new_tokens=NEW, draft_tokens=4, eos_token_id=stops
    )
    assert torch.equal(tokens, plain(llama, ids, mask, eos_token_id=stops))
    assert tokens.shape[1] < 9 + NEW or rows > 1


def test_without_a_draft_it_decodes_plainly(llama):
    ids, mask = prompts(4)
    tokens = generate(llama, stages_of(llama), ids, attention_mask=mask, draft=None, max_new_tokens=NEW)
    assert torch.equal(tokens, plain(llama, ids, mask))


def test_the_whole_context_can_be_filled():
    model = decoder("GPT-2", n_positions=9 + NEW)
    ids, mask = prompts(4)
    stages, draft = first(model, 3)
    tokens = generate(model, stages, ids, attention_mask=mask, draft=draft, max_new_tokens=NEW, draft_tokens=7)
    assert torch.equal(tokens, plain(model, ids, mask))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sampled_texts_have_the_distribution_of_plain_sampling(seed):
    """All texts of three tokens, counted, against their exact chances and against transformers' own sampling."""
    model = decoder("Llama", vocab_size=4, pad_token_id=None, hidden_size=16, intermediate_size=16)
    count, temperature = 20_000, 0.25
    ids = torch.tensor([[1, 2, 3]]).expand(count, 3)
    stages, draft = first(model, 1)
    drawn = generate(
        model,
        stages,
        ids,
        draft=draft,
        max_new_tokens=3,
        draft_tokens=2,
        do_sample=True,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    )
    with torch.no_grad():
        texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
        logits = model(torch.cat([ids[: len(texts)], texts], dim=1)).logits[:, 2:-1] / temperature
    chances = logits.double().log_softmax(-1).gather(-1, texts[..., None]).sum((1, 2)).exp()

    def counts(tokens):
        return torch.bincount((tokens[:, 3:] * torch.tensor([16, 4, 1])).sum(-1), minlength=64)

    often = chances * count >= 10
    assert 20 < often.sum() < 64  # neither even nor on a few texts
    observed = torch.cat([counts(drawn)[often], counts(drawn)[~often].sum()[None]]).double()
    expected = torch.cat([chances[often], chances[~often].sum()[None]]) * count
    assert chisquare(observed, expected).pvalue > 0.01
    torch.manual_seed(100 + seed)
    theirs = model.generate(
        ids, attention_mask=ids * 0 + 1, max_new_tokens=3, do_sample=True, temperature=temperature, top_k=0
    )
    assert chi2_contingency(torch.stack([counts(drawn), counts(theirs)])[:, often].numpy()).pvalue > 0.01


def test_the_same_generator_draws_the_same_tokens(llama):
    ids, mask = prompts(3)
    stages, draft = first(llama, 2)
    first_, second = (
        generate(
            llama,
            stages,
            ids,
            attention_mask=mask,
            draft=draft,
            max_new_tokens=8,
            do_sample=True,
            generator=torch.Generator().manual_seed(7),
        )
        for _ in range(2)
    )
    assert torch.equal(first_, second)


def test_the_model_is_afterwards_as_it_was(llama):
    ids, _ = prompts(1)
    stages, draft = first(llama, 2)
    llama.train()

    def fail(_):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        generate(llama, stages, ids, draft=draft, max_new_tokens=8, on_round=fail)
    assert llama.training
    assert not any("forward" in module.__dict__ for module in llama.modules())
    llama.eval()


def wrong_draft(stages):
    return unloaf.Subnet(((True, False, True, False),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": wrong_draft}, "not the first blocks"),
        ({"draft": unloaf.Subnet.full}, "the main network itself"),
        ({"max_new_tokens": 120}, "prompt of 9 tokens and 120 new ones are 129.*max_new_tokens of 119"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"draft_tokens": 0}, "draft_tokens 0"),
        ({"temperature": 0.0, "do_sample": True}, "temperature 0"),
        ({"temperature": 0.5}, "no effect"),
        ({"input_ids": torch.full((1, 140), 5)}, "a prompt has 140 tokens; LlamaForCausalLM was made for 128"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"input_ids of shape \(1, 0\)"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0]])}, "padded on the right"),
        ({"attention_mask": torch.tensor([[1, 0] + [1] * 7])}, "have gaps"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask"),
        ({"input_ids": torch.tensor([[0, 5], [5, 5]])}, "begins with the pad token 0"),
    ],
)
def test_bad_input_is_told(llama, options, message):
    stages, draft = first(llama, 2)
    given = {"input_ids": prompts(1)[0], "draft": draft, "max_new_tokens": 4, **options}
    if callable(given["draft"]):
        given["draft"] = given["draft"](stages)
    with pytest.raises(ValueError, match=message):
        generate(llama, stages, given.pop("input_ids"), **given)


def test_rows_without_any_pad_token_are_refused():
    model = decoder("Llama", pad_token_id=None)
    model.generation_config.pad_token_id = None
    stages, draft = first(model, 1)
    ids = torch.full((2, 3), 5)
    # A stop token fills rows where there is no pad token, as in transformers.
    tokens = generate(model, stages, ids, draft=draft, max_new_tokens=4, eos_token_id=63)
    assert tokens.shape == (2, 7)


def small(kind, **options):
    name = f"{kind}Config"
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, name)(**options)).eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small("Mamba", vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4), "Mamba"),
        (lambda: small("Bloom", vocab_size=64, hidden_size=16, n_layer=2, n_head=2), "Bloom"),
        (
            lambda: small(
                "Qwen3Next",
                vocab_size=64,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                intermediate_size=16,
                num_experts=2,
                num_experts_per_tok=1,
                moe_intermediate_size=8,
                shared_expert_intermediate_size=8,
                linear_num_key_heads=2,
                linear_num_value_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                layer_types=["linear_attention", "full_attention"],
            ),
            "layer 0 of Qwen3NextForCausalLM .linear_attention. keeps a state that cannot be cut",
        ),
    ],
    ids=["Mamba", "Bloom", "Qwen3-Next"],
)
def test_models_that_cannot_start_in_the_middle_are_refused(make, message):
    model = make()
    ids = torch.tensor([[3, 4, 5]])
    stage = unloaf.Stage(
        "layers", tuple(name for name, module in model.named_modules() if name.count(".") == 2)[:2], (True, True)
    )
    with pytest.raises(ValueError, match=message):
        generate(model, [stage], ids, draft=unloaf.Subnet(((True, False),)), max_new_tokens=4)


def test_layers_that_no_stage_holds_are_told(llama):
    stage = unloaf.Stage("model.layers", ("model.layers.1", "model.layers.2"), (True, True))
    draft = unloaf.Subnet(((True, False),))
    with pytest.raises(ValueError, match=r"has 2 blocks in its stages, and its cache has 4 layers"):
        generate(llama, [stage], prompts(1)[0], draft=draft, max_new_tokens=4)


def test_head_counts_in_layers(llama):
    from unloaf.language.decoding import head_in_layers

    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32  # q, o; k, v; the three of the MLP; two norms
    assert math.isclose(head_in_layers(llama, list(llama.model.layers)), VOCAB * 32 / layer)
