"""Language: packed texts, gradients of the methods, figures, runs that are resumed and exported, and bad input."""

import logging
import math
import os
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers
from tests.reference import separate_passes as twin
from torch import nn

import tiny
import unloaf
from unloaf.commands.main import main
from unloaf.config import Config
from unloaf.data.text.files import ByteTokenizer, load_text
from unloaf.data.text.sequences import packed
from unloaf.engine import loop
from unloaf.engine.checkpoint import load_checkpoint
from unloaf.engine.loop import prepare, train_step
from unloaf.engine.run import train
from unloaf.release.exports import export_run
from unloaf.runs.histories import read_histories, table_of
from unloaf.runs.judge import judge_run
from unloaf.tasks.language import Language, token_scores

SIZES = ("hidden_size=16", "intermediate_size=24", "num_hidden_layers=3", "num_attention_heads=2")
MODEL = (*SIZES, "num_key_value_heads=1", "max_position_embeddings=64")
TOLERANCE = 1e-10  # of the global norm, in float64


def write_text(place, texts=12, words=20):
    """Short texts of drawn words, one a file."""
    place.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for index in range(texts):
        some = torch.randint(97, 105, (words, 3), generator=generator).tolist()
        (place / f"{index:02}.txt").write_text(" ".join("".join(map(chr, word)) for word in some))
    return place


def config(folder, **settings):
    usual = {"task": "language", "dataset": "text", "data_dir": str(folder), "model": "hf/LlamaConfig", "device": "cpu"}
    usual |= {"model_kwargs": MODEL, "seq_len": 16, "batch_size": 8, "epochs": 1, "opt": "adamw", "lr": 1e-2}
    return Config(**usual | {"log_interval": 1} | settings)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("texts") / "set")


def double(model):
    """In float64 throughout: transformers' norm computes in float32 whatever the type of the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                setattr(parent, name, norm)
    return model.double().train()


# --- packing


def test_packed_tokens_are_those_of_the_texts_and_predict_the_next_one_of_their_own():
    texts = [torch.arange(start, start + count, dtype=torch.int32) for start, count in ((0, 5), (100, 2), (200, 9))]
    found = packed(texts, 4, pad=7)
    pairs = [(int(a), int(b)) for text in texts for a, b in pairwise(text)]
    counted = found.labels.flatten() != -100
    inputs, labels = found.inputs.flatten()[counted].tolist(), found.labels.flatten()[counted].tolist()
    assert list(zip(inputs, labels, strict=True)) == pairs
    assert found.positions.tolist() == [[0, 1, 2, 3], [0, 0, 1, 2], [0, 1, 2, 3], [0, 0, 1, 2]]
    assert (found.inputs[-1].tolist()[1:], found.tokens) == ([7, 7, 7], 13)


def test_whole_texts_are_held_out_and_always_the_same_ones(texts):
    data = load_text(config(texts), ByteTokenizer())
    again = load_text(config(texts, seed=5), ByteTokenizer())
    assert torch.equal(data.val.inputs, again.val.inputs)
    lengths = [len(file.read_bytes()) for file in texts.iterdir()]
    assert data.train.tokens + data.val.tokens == sum(lengths)
    assert data.val.tokens >= 0.1 * sum(lengths)


def test_of_one_text_the_end_is_held_out(tmp_path):
    (tmp_path / "one.md").write_text("abcdefghi " * 20)
    data = load_text(config(tmp_path / "one.md"), ByteTokenizer())
    assert (data.train.tokens, data.val.tokens, len(data.test)) == (180, 20, 0)


def test_texts_that_datasets_saved_are_read(tmp_path):
    import datasets

    rows = {"train": ["abcdefghijklmnop", "qrstuvwxyz" * 3], "validation": ["abc"]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": some}) for name, some in rows.items()})
    saved.save_to_disk(str(tmp_path / "set"))
    data = load_text(config(tmp_path / "set"), ByteTokenizer())
    assert (data.train.tokens, data.val.tokens) == (46, 3)


# --- gradients


def batch_of(sequences, count):
    some = sequences.subset(torch.arange(count))
    x = {"input_ids": some.inputs.long(), "position_ids": some.positions.long(), "use_cache": False}
    return x, some.labels.long()


def three_texts():
    """Two sequences of 12: a text cut in two, the end of it and another one; then padding."""
    return packed([torch.arange(1, 18), torch.arange(30, 36)], 12, pad=40)


def trained(texts, **settings):
    """A method on a network in float64 whose head is left to the losses, and the task that made them."""
    settings = config(texts, **settings)
    task = Language()
    data = load_text(settings, ByteTokenizer())
    torch.manual_seed(0)
    model = double(task.network(settings, data, resumed=False)[0])
    stages = task.find_stages(settings, model, data)
    model.train()
    return task.method(settings, model, stages, steps_per_epoch=4), model, stages


def gradients(model, loss):
    """Of the weights that are trained; None for the others."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return dict.fromkeys(twin.names(model)) | dict(zip(weights, found, strict=True))


def separate(model, stages, subnets, x, y):
    """Complete passes one by one, whose losses are written out over all logits."""

    def logits(handles=()):
        head = model.lm_head
        head.eval()  # where it makes logits
        output = model(**x).logits
        for handle in handles:
            handle.remove()
        return output

    counted = y != -100
    main = logits()
    terms = [gradients(model, -main.log_softmax(-1)[counted].gather(1, y[counted][:, None]).mean())]
    for subnet in subnets:
        dropped = [path for path, kept in zip(stages[0].blocks, subnet.keep[0], strict=True) if not kept]
        handles = [model.get_submodule(path).register_forward_hook(lambda _, args, __: args[0]) for path in dropped]
        student = logits(handles)
        log_p, log_q = main.detach().log_softmax(-1)[counted], student.log_softmax(-1)[counted]
        terms.append(gradients(model, (log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    return twin.total(terms)


def with_weights(texts, tmp_path):
    """A folder with a network of these sizes, as save_pretrained writes it."""
    torch.manual_seed(1)
    sizes = Config(task="language", dataset="text", model="hf/x", model_kwargs=MODEL).model_arguments
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 256)
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=257, **special, **sizes))
    network.save_pretrained(tmp_path / "trained")
    return f"hf/{tmp_path / 'trained'}"


@pytest.mark.parametrize("kind", ["plain", "tied", "lora", "inter-stage", "checkpointed"])
def test_gradients_are_those_of_separate_passes(texts, tmp_path, kind):
    settings = {"num_subnets": 2, "method": "st", "seed": 3}
    if kind == "tied":
        settings["model_kwargs"] = (*MODEL, "tie_word_embeddings=True")
    if kind == "inter-stage":
        settings["sampler"] = "inter-stage"
    if kind == "lora":
        settings |= {"model": with_weights(texts, tmp_path), "model_kwargs": (), "pretrained": True, "lora_rank": 2}
    method, model, stages = trained(texts, **settings)
    if kind == "lora":
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide the other factor
                nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(2))
    if kind == "checkpointed":
        unloaf.checkpoint_blocks(model, stages)
    x, y = batch_of(three_texts(), 2)
    subnets = method.backward(x, y).subnets
    assert any(not all(subnet.keep[0]) for subnet in subnets)
    assert twin.distance(model, separate(model, stages, subnets, x, y)) < TOLERANCE


def test_gradients_of_packed_and_padded_texts_are_those_of_texts_alone(texts):
    method, model, _ = trained(texts, method="common")
    x, y = batch_of(three_texts(), 2)
    method.backward(x, y)
    model.lm_head.eval()
    parts = [torch.arange(0, 12), torch.arange(12, 16), torch.arange(16, 21)]  # of x, of which each sees itself alone
    tokens, labels = x["input_ids"].flatten(), y.flatten()
    counted = sum(len(part) for part in parts)
    losses = [
        F.cross_entropy(model(input_ids=tokens[None, part], use_cache=False).logits[0], labels[part], reduction="sum")
        for part in parts
    ]
    assert int((y != -100).sum()) == counted
    assert twin.distance(model, twin.total([twin.gradients(model, sum(losses) / counted)])) < TOLERANCE


def test_what_is_filled_up_changes_no_gradient(texts):
    method, model, _ = trained(texts, method="st++", num_subnets=2)
    x, y = batch_of(three_texts(), 2)
    subnets = method.backward(x, y).subnets
    kept = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    x["input_ids"][y == -100] = 3
    method.backward(x, y, subnets=subnets)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, kept[name], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("method", "terms"), [("common", 1), ("st++", 7), ("gkt", 7), ("st-star", 2), ("st", 2)])
def test_every_method_makes_a_step(texts, method, terms):
    training = prepare(config(texts, method=method))
    before = tiny.weights(training.model)
    row = train_step(training, next(training.batches.epoch(1)))
    assert (row.made, len(row.terms)) == (True, terms)
    assert row.terms["main"] == pytest.approx(math.log(257), abs=0.7)
    assert not tiny.same(before, tiny.weights(training.model))


def test_logits_that_are_capped_are_trained_as_they_are(texts):
    arguments = ("head_dim=8", "sliding_window=64", "hidden_activation=gelu_pytorch_tanh")
    training = prepare(config(texts, model="hf/Gemma2Config", model_kwargs=(*MODEL, *arguments), method="st"))
    assert any("more than the output of the last layer" in line for line in training.opening)
    assert train_step(training, next(training.batches.epoch(1))).made


# --- figures


class Fixed(nn.Module):
    """Gives prepared logits, (N, L, classes), for the numbers of sequences."""

    def __init__(self, logits):
        super().__init__()
        self.weight, self.logits = nn.Parameter(torch.zeros(1)), logits

    def forward(self, rows):
        return self.logits[rows]


def test_figures_are_those_over_all_tokens_that_count():
    logits, y = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)), torch.arange(15).view(3, 5) % 7
    y[2, 2:] = -100
    batches = [({"rows": torch.tensor([0, 1])}, y[:2]), ({"rows": torch.tensor([2])}, y[2:])]
    found = token_scores(Fixed(logits), batches)
    counted = y != -100
    expected = -logits[counted].log_softmax(-1).gather(1, y[counted][:, None]).double().mean()
    assert found.loss == pytest.approx(float(expected), abs=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_a_network_that_gives_nan_has_no_figures():
    found = token_scores(
        Fixed(torch.full((1, 2, 3), math.nan)), [({"rows": torch.tensor([0])}, torch.zeros(1, 2).long())]
    )
    assert math.isnan(found.loss)
    assert math.isnan(found.perplexity)


# --- runs


def test_a_run_with_lora_that_is_stopped_continues_to_the_bit(texts, tmp_path, monkeypatch):
    model = with_weights(texts, tmp_path)
    settings = config(texts, model=model, model_kwargs=(), pretrained=True, lora_rank=2, method="st", batch_size=16)
    settings = replace(settings, output=str(tmp_path), name="whole", checkpoint_interval=1)
    whole = train(settings, console=tiny.quiet())
    other = replace(settings, name="stopped")
    made, step = 0, loop.train_step

    def stop_at_the_third(*args):
        nonlocal made
        made += 1
        if made == 3:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            train(other, console=tiny.quiet())
    again = train(other, console=tiny.quiet(), resume="auto")
    ends = [load_checkpoint(result.path / "last").weights["model"] for result in (whole, again)]
    assert tiny.same(dict(ends[0]), dict(ends[1]))
    assert again.test == whole.test
    start = load_checkpoint(whole.path / "last").weights["model"]
    begun = prepare(settings).model.state_dict()
    moved = {name for name, value in begun.items() if not torch.equal(value, start[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def killed_before_step(number, settings):
    """A run in a process of its own, which kills itself."""
    if (child := os.fork()) == 0:
        step, made = loop.train_step, []

        def die(*args):
            made.append(None)
            if len(made) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args)

        try:
            loop.train_step = die
            train(settings, console=tiny.quiet())
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def test_a_run_that_is_killed_continues_to_the_bit(texts, tmp_path):
    settings = config(texts, method="st", eval_subnets=1, output=str(tmp_path), name="whole", checkpoint_interval=1)
    whole = train(settings, console=tiny.quiet())
    other = replace(settings, name="killed")
    killed_before_step(4, other)
    assert 1 <= load_checkpoint(tmp_path / "killed" / "last").step < 4
    again = train(other, console=tiny.quiet(), resume="auto")
    ends = [load_checkpoint(result.path / "last") for result in (whole, again)]
    assert tiny.same(dict(ends[0].weights["model"]), dict(ends[1].weights["model"]))
    assert ends[0].step == ends[1].step
    assert again.test == whole.test


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    # the third epoch, far too large a step, is the worst: lower is better
    settings = config(texts, output=str(output), name="run", epochs=3, eval_subnets=1, method="st", lr=0.3, seed=1)
    train(settings, console=tiny.quiet())
    return output / "run"


def test_the_best_checkpoint_has_the_lowest_loss(run):
    lines = (run / "summary.csv").read_text().splitlines()
    assert lines[0] == (
        "epoch,time,train_loss,eval_loss,eval_perplexity,lr,subnets_loss_mean,subnets_loss_max,main_loss_reestimated"
    )
    losses = [float(line.split(",")[3]) for line in lines[1:]]
    best = judge_run(run, checkpoint="best", device="cpu").main["val"].loss
    assert best == pytest.approx(min(losses), abs=1e-9)
    heads, (cells,) = table_of(read_histories([run]))
    at = heads.index("best val\nnats per token (epoch)")
    assert cells[at] == f"{min(losses):.4f} ({1 + losses.index(min(losses))})"


def test_subnets_of_a_run_are_judged_by_nats(run, capsys):
    judged = judge_run(run, subnets="all", device="cpu")
    assert [row.depths for row in judged.subnets] == [(3,), (2,), (1,)]
    assert all(row.loss is not None and row.metric is None and row.top1 is None for row in judged.subnets)
    assert judged.subnets[0].loss == pytest.approx(judged.main["val"].loss, abs=1e-9)
    front = judge_run(run, subnets="pareto", device="cpu").subnets
    assert min(row.loss for row in judged.subnets) in [row.loss for row in front]
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    assert "nats per token" in capsys.readouterr().out


def test_a_subnet_leaves_as_a_folder_of_transformers(run, tmp_path, caplog):
    exported = export_run(run, depths="2", output=tmp_path / "small", device="cpu")
    transformers.utils.logging.get_logger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        network = transformers.AutoModelForCausalLM.from_pretrained(exported.folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(exported.folder)
    assert not caplog.records
    assert (network.config.num_hidden_layers, exported.difference) == (2, 0.0)
    tokens = torch.tensor([tokenizer("abc def").input_ids])
    assert tokens.tolist() == [list(b"abc def")]
    again = unloaf.load_subnet(exported.folder)
    with torch.no_grad():
        assert torch.equal(network.eval()(tokens).logits, again(tokens).logits)
    card = (exported.folder / "README.md").read_text()
    assert ("nats per token" in card, "text-generation" in card) == (True, True)


# --- bad input


def words(folder, **more):
    options = {"task": "language", "dataset": "text", "data_dir": folder, "model": "hf/LlamaConfig", "device": "cpu"}
    options |= {"seq_len": 16, "batch_size": 4, "epochs": 1} | more
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["train", *flags, "--model-kwargs", *MODEL]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data_dir": "nowhere"}, "data_dir nowhere is neither a file nor a folder"),
        ({"data_dir": "empty.txt"}, "empty.txt has 0 tokens to train on, less than one sequence of 16"),
        ({"data_dir": "short.txt"}, "short.txt has 5 tokens to train on, less than one sequence of 16"),
        ({"data_dir": "latin.txt"}, "latin.txt is no text: byte 1 is not UTF-8"),
        ({"data_dir": "zero.txt"}, "zero.txt is no text: byte 1 is 0"),
        ({"data_dir": "bare"}, "bare: no text to train on; expected files of .txt"),
        ({"seq_len": 128}, "seq_len 128: it takes 64 tokens at most"),
        ({"model": "hf/BertConfig"}, "not causal|model_kwargs num_key_value_heads"),
        ({"model": "hf/LlamaConfi"}, "did you mean hf/LlamaConfig"),
        ({"model": "hf/nowhere/config.json"}, "there is no such file or folder"),
        ({"tokenizer": "model"}, "tokenizer model: hf/LlamaConfig comes without one"),
        ({"model": "hf/endless", "tokenizer": "model"}, "has no token for the end of a text"),
        ({"lora_rank": 2}, "lora_rank 2 trains changes of weights that stay"),
        ({"hflip": 0.1}, "--hflip: without effect in task language"),
        ({"batch_size": 4000}, "a step takes 4000 sequences"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(texts, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abcdef")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin1") + b"\xff")
    (tmp_path / "zero.txt").write_bytes(b"a\0b" * 40)
    (tmp_path / "bare").mkdir()
    (tmp_path / "endless").mkdir()
    transformers.LlamaConfig(vocab_size=300).save_pretrained(tmp_path / "endless")
    endless = transformers.PreTrainedTokenizerFast(tokenizer_object=_letters())
    endless.save_pretrained(tmp_path / "endless")
    before = sorted(tmp_path.iterdir())
    assert main([*words(texts), *[w for n, v in more.items() for w in (f"--{n.replace('_', '-')}", str(v))]]) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|")), error
    assert [place for place in sorted(tmp_path.rglob("*")) if place.name == "args.yaml"] == []
    assert sorted(place for place in tmp_path.iterdir() if place.name != "output") == before


def _letters():
    import tokenizers

    return tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))


def test_blocks_of_a_language_model_are_deleted_and_nats_are_told(run, capsys, tmp_path):
    assert main(["damage", str(run), "--most", "1", "--device", "cpu", "--plot", str(tmp_path / "d.svg")]) == 0
    out = capsys.readouterr().out
    judged = judge_run(run, device="cpu").main["val"].loss
    assert out.split()[:3] == ["deleted", "networks", "run"]
    [line] = [line.split() for line in out.splitlines() if line.split()[:2] == ["0", "1"]]
    assert line == ["0", "1", f"{judged:.4f}"]
    assert "nats per token, mean" in out
    assert ">nats per token<" in (tmp_path / "d.svg").read_text()
