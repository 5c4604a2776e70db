"""A run from its settings to its folder, on a network small enough for a moment."""

import csv
import json
import os
import shutil
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import tiny
from unloaf.commands import main as cli
from unloaf.config import Config, load_config
from unloaf.data import load_data
from unloaf.engine.checkpoint import load_checkpoint
from unloaf.engine.checkpoint.saver import Saver
from unloaf.engine.log_lines import step_line
from unloaf.engine.loop import StepRow, Training, fit, prepare, train_epoch
from unloaf.engine.run import Run, train
from unloaf.errors import CheckpointError
from unloaf.tasks.methods import check_classes

METHODS = ["common", "stochastic-depth", "st", "st++", "gkt"]
# A network by name, on the digits.
NAMED = Config(model="cifar/resnet14", width=4, epochs=1, batch_size=256, min_ratio=0.75, device="cpu")


@pytest.fixture
def own_precision():
    """accelerate keeps one precision for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def digits():
    return load_data(NAMED)


def begin(model: torch.nn.Module | None = None, **settings: Any) -> Training:
    return prepare(tiny.config(**settings), data=tiny.data(), model=model or tiny.network())


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_a_complete_run_folder(tmp_path, method):
    path = tiny.run(tiny.config(method=method, output=str(tmp_path), name="run", log_interval=2)).path
    files = {
        "args.yaml",
        "env.json",
        "summary.csv",
        "metrics.jsonl",
        "log.txt",
        "checkpoints",
        "data.json",
        "last",
        "model_best",
    }
    assert {file.name for file in path.iterdir()} == files
    rows = list(csv.DictReader((path / "summary.csv").read_text().splitlines()))
    assert list(rows[0]) == ["epoch", "time", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [event["event"] for event in events(path)] == ["step", "step", "epoch"] * 2 + ["result"]


def test_folder_is_named_after_time_model_and_method(tmp_path):
    path = tiny.run(tiny.config(method="st", output=str(tmp_path), epochs=1)).path
    assert path.parent == tmp_path
    assert path.name.endswith("-cifar_resnet20-st")


def test_last_gives_the_reported_accuracy(tmp_path):
    result = tiny.run(tiny.config(output=str(tmp_path)))
    training = begin()
    training.model.load_state_dict(load_file(result.path / "last" / "model.safetensors"))
    assert training.evaluate("test").main == result.test
    [event] = [event for event in events(result.path) if event["event"] == "result"]
    assert (event["test_loss"], event["test_top1"]) == (result.test.loss, result.test.top1)


def test_best_gives_the_highest_validation_accuracy(tmp_path):
    path = tiny.run(tiny.config(method="common", output=str(tmp_path), epochs=4, lr=0.2)).path
    tops = [float(row["eval_top1"]) for row in csv.DictReader((path / "summary.csv").read_text().splitlines())]
    assert load_checkpoint(path / "model_best").step == tiny.STEPS * (1 + tops.index(max(tops)))
    training = begin()
    training.model.load_state_dict(load_file(path / "model_best" / "model.safetensors"))
    assert training.evaluate("val").main.top1 == max(tops)


def test_checkpoints_beyond_the_number_are_deleted(tmp_path):
    path = tiny.run(tiny.config(output=str(tmp_path), checkpoint_interval=1, checkpoint_hist=3)).path
    steps = sorted(int(folder.name[5:]) for folder in (path / "checkpoints").iterdir())
    best = load_checkpoint(path / "model_best").step
    assert steps == sorted({6, 7, 8, best})


def test_where_no_test_images_are_the_validation_images_are_judged(tmp_path):
    data = tiny.data()
    data = replace(data, test=data.test.subset(torch.arange(0)))
    result = train(tiny.config(output=str(tmp_path), epochs=1), console=tiny.quiet(), data=data, model=tiny.network())
    assert result.split == "val"


def test_methods_start_from_the_same_weights(digits):
    starts = [tiny.weights(prepare(replace(NAMED, method=method), data=digits).model) for method in METHODS]
    assert all(tiny.same(starts[0], start) for start in starts)


def test_another_seed_starts_from_other_weights(digits):
    first, second = (tiny.weights(prepare(replace(NAMED, seed=seed), data=digits).model) for seed in (0, 1))
    assert not tiny.same(first, second)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_gives_the_same_weights(digits, method):
    config = replace(NAMED, method=method)
    first = tiny.weights(fit(config, data=digits).model)
    torch.rand(5)
    assert tiny.same(first, tiny.weights(fit(config, data=digits).model))


def test_args_yaml_reproduces_the_run(tmp_path):
    first = train(replace(NAMED, method="gkt", seed=5, output=str(tmp_path), name="a"), console=tiny.quiet())
    again = load_config(first.path / "args.yaml")
    assert again == replace(NAMED, method="gkt", seed=5, output=str(tmp_path), name="a")
    second = train(replace(again, name="b"), console=tiny.quiet())
    assert tiny.same(*(load_file(result.path / "last" / "model.safetensors") for result in (first, second)))


def test_checkpoint_interval_changes_no_bit(tmp_path):
    config = tiny.config(method="st++", output=str(tmp_path))
    runs = [tiny.run(replace(config, name=str(every), checkpoint_interval=every)) for every in (None, 1)]
    assert tiny.same(*(load_file(run.path / "last" / "model.safetensors") for run in runs))


def test_validation_changes_no_bit():
    first, second = begin(epochs=3), begin(epochs=3, eval_interval=3)
    for training in (first, second):
        while not training.finished:
            train_epoch(training)
    assert tiny.same(tiny.weights(first.model), tiny.weights(second.model))


def test_last_epoch_is_always_validated():
    training, judged = begin(epochs=3, eval_interval=2), []
    while not training.finished:
        judged.append(train_epoch(training).eval is not None)
    assert judged == [False, True, True]


def test_evaluation_puts_the_mode_back():
    training = begin()
    training.model.train()
    training.evaluate("val")
    assert training.model.training


def test_judged_subnets_are_in_the_record(tmp_path):
    path = tiny.run(tiny.config(method="st", output=str(tmp_path), epochs=1, eval_subnets=2)).path
    [row] = csv.DictReader((path / "summary.csv").read_text().splitlines())
    [event] = [event for event in events(path) if event["event"] == "subnets"]
    assert len(event["top1"]) == 2
    assert float(row["subnets_top1_min"]) == min(event["top1"].values())
    assert float(row["subnets_top1_mean"]) == pytest.approx(sum(event["top1"].values()) / 2)


class NormOnOnePixel(tiny.TinyNetwork):
    """A batch norm after the pooling: it has no statistics of a single image."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.blocks(self.stem(x)).mean(dim=(2, 3))))


def test_subnets_are_judged_whatever_the_last_calibration_batch_holds():
    training = begin(NormOnOnePixel(), epochs=1, eval_subnets=1, recalibrate=17)  # 16 and 1
    row = train_epoch(training)
    assert row.eval is not None
    assert len(row.eval.subnets) == 1


def test_last_batch_of_one_image_is_judged():
    data = tiny.data()
    data = replace(data, val=data.val.subset(torch.arange(17)))
    training = prepare(tiny.config(epochs=1), data=data, model=NormOnOnePixel())
    assert train_epoch(training).eval is not None


def test_a_setting_of_another_method_is_told_of(tmp_path):
    path = tiny.run(tiny.config(output=str(tmp_path), name="run", epochs=1, method="common", groups=5)).path
    assert "groups 5 has no effect here: it is for --method gkt" in (path / "log.txt").read_text()


def test_environment_names_versions_and_hardware(tmp_path):
    path = tiny.run(tiny.config(output=str(tmp_path), epochs=1)).path
    env = json.loads((path / "env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert env["hardware"]
    assert (env["processes"], env["threads"]) == (1, torch.get_num_threads())
    assert yaml.safe_load((path / "args.yaml").read_text())["epochs"] == 1


def test_first_line_states_the_global_batch(tmp_path):
    path = tiny.run(tiny.config(output=str(tmp_path), epochs=1, grad_accum_steps=2)).path
    line = (path / "log.txt").read_text().splitlines()[0]
    assert line.endswith("global batch 32 = 16 x 1 x 2 (images, devices, accumulated batches)")


# Starting weights


def initial(path: Path, model: torch.nn.Module | None = None) -> Training:
    torch.manual_seed(7)
    return begin(model or tiny.TinyNetwork(), initial_checkpoint=str(path))


@pytest.mark.parametrize("place", ["", "last", "last/model.safetensors"])
def test_initial_weights_of_a_run_a_checkpoint_or_a_file(tmp_path, place):
    path = tiny.run(tiny.config(output=str(tmp_path), epochs=1)).path
    assert tiny.same(tiny.weights(initial(path / place).model), load_file(path / "last" / "model.safetensors"))


@pytest.mark.parametrize("place", ["", "last", "last/model.safetensors"])
@pytest.mark.parametrize("damage", ["a flipped bit", "of another step", "no manifest"])
def test_initial_weights_of_a_damaged_checkpoint_are_refused(tmp_path, place, damage):
    """All of these load without an error in safetensors."""
    path = tiny.run(tiny.config(output=str(tmp_path), epochs=2)).path
    weights = path / "last" / "model.safetensors"
    if damage == "a flipped bit":
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "of another step":
        shutil.copy(path / "checkpoints" / "step-00000004" / "model.safetensors", weights)
    else:
        (path / "last" / "manifest.json").unlink()
    assert load_file(weights)
    with pytest.raises(CheckpointError, match=r"SHA-256 differs|has .* of .* bytes|holds no manifest"):
        initial(path / place)


def test_initial_weights_leave_a_head_for_other_classes(tmp_path):
    save_file(tiny.weights(tiny.network(classes=7)), tmp_path / "seven.safetensors")
    model = tiny.TinyNetwork()
    head = model.head.weight.detach().clone()
    training = initial(tmp_path / "seven.safetensors", model)
    assert torch.equal(training.model.head.weight, head)
    assert torch.equal(training.model.stem.weight, tiny.network().stem.weight)


def test_initial_weights_of_another_network_are_refused(tmp_path):
    save_file({"elsewhere.weight": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="none of its 1 tensors fits this model"):
        initial(tmp_path / "other.safetensors")


@pytest.mark.parametrize("text", [None, "no weights"])
def test_initial_weights_that_are_none_are_refused(tmp_path, text):
    if text:
        (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=r"initial_checkpoint .*file: "):
        initial(tmp_path / "file")


# Precision and format


@pytest.mark.parametrize("method", METHODS)
def test_channels_last_trains_the_same_network(method):
    first, second = (
        begin(tiny.network(dropout=0.0), method=method, epochs=1, channels_last=last) for last in (False, True)
    )  # without dropout, which draws in the order of memory
    losses = [train_epoch(training).train_loss for training in (first, second)]
    assert second.model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # float32, other kernels


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_trains_and_judges_in_float32(own_precision, method):
    training, dtypes = begin(method=method, amp=True, epochs=1), []
    training.model.head.register_forward_hook(lambda module, args, out: dtypes.append((module.training, out.dtype)))
    train_epoch(training)
    assert set(dtypes) == {(True, torch.bfloat16), (False, torch.float32)}
    assert all(parameter.dtype == torch.float32 for parameter in training.model.parameters())


def test_bfloat16_leaves_no_attribute_on_the_model(own_precision):
    training = begin(amp=True)
    assert not any("forward" in vars(module) for module in training.model.modules())


def test_bfloat16_is_close_to_float32(own_precision):
    loss = train_epoch(begin(method="st", epochs=1)).train_loss
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_epoch(begin(method="st", epochs=1, amp=True)).train_loss == pytest.approx(loss, rel=0.03)  # 8 bits


def test_network_that_is_no_classifier_of_the_classes_is_refused_before_its_folder(tmp_path, capsys):
    words = ["train", "--device", "cpu", "--img-size", "8", "--epochs", "1", "--warmup-epochs", "0"]
    words += ["--method", "common"]
    words += ["--model", "timm/vit_tiny_patch16_224", "--output", str(tmp_path), "--name", "run", "--model-kwargs"]
    words += ["patch_size=4", "embed_dim=24", "depth=2", "num_heads=2"]
    assert cli.main([*words, "class_token=False", "global_pool="]) == 2
    told = "of 2 images its output has the shape (2, 4, 10), not (2, 10); give a classifier"
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_network_that_does_not_take_the_training_images_is_refused_before_its_folder(tmp_path):
    small = ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=2")
    config = replace(NAMED, model="timm/vit_tiny_patch16_224", model_kwargs=small, img_size=32, train_img_size=16)
    with pytest.raises(
        ValueError, match=r"^train_img_size 16: model .* takes 32 pixels, not 16 \(AssertionError: .*16"
    ):
        train(replace(config, output=str(tmp_path), name="run"), console=tiny.quiet())
    assert not list(tmp_path.iterdir())
    assert prepare(replace(config, model_kwargs=(*small, "dynamic_img_size=True"), method="common"))


@pytest.mark.parametrize("settings", [{"method": "st++"}, {"method": "gkt", "main_logits": "direction"}], ids=str)
def test_directions_of_two_classes_are_refused_before_the_folder(tmp_path, settings):
    data, config = tiny.data(num_classes=2), replace(NAMED, output=str(tmp_path), name="run", **settings)
    with pytest.raises(ValueError, match="two classes have only a sign under layer_norm: with eps 1e-07"):
        train(config, data=data, console=tiny.quiet())
    assert not list(tmp_path.iterdir())
    check_classes(replace(config, eps=1.0), 2)
    check_classes(config, 3)
    check_classes(replace(config, method="common"), 2)


def test_float16_on_a_cpu_is_refused(own_precision):
    with pytest.raises(ValueError, match="float16"):
        begin(amp=True, amp_dtype="float16")


def test_synchronised_batch_norm_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="sync_bn"):
        begin(sync_bn=True)


def test_tensorboard_gets_the_figures(tmp_path):
    pytest.importorskip("tensorboard")
    path = tiny.run(tiny.config(output=str(tmp_path), name="run", epochs=1, trackers=("tensorboard",))).path
    assert list(path.rglob("events.out.tfevents.*"))


def test_trackers_get_every_curve_and_the_training_time_of_a_resumed_run(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: told.append((step, values)))
    settings = {
        "output": str(tmp_path),
        "name": "run",
        "trackers": ("tensorboard",),
        "eval_subnets": 2,
        "log_interval": 1,
    }
    path = tiny.run(tiny.config(epochs=1, **settings)).path
    tiny.run(tiny.config(epochs=2, **settings), resume="auto")
    rows = list(csv.DictReader((path / "summary.csv").read_text().splitlines()))
    epochs = [values for _, values in told if "epoch" in values]
    steps = [values for _, values in told if "epoch" not in values]
    assert len(epochs) == len(rows) == 2
    assert [values["train_seconds"] for values in epochs] == pytest.approx(
        [float(rows[0]["time"]), float(rows[0]["time"]) + float(rows[1]["time"])], abs=2e-3
    )
    for values, row in zip(epochs, rows, strict=True):
        subnets = [value for name, value in values.items() if name.startswith("subnets_top1/")]
        assert len(subnets) == 2
        assert sum(subnets) / 2 == pytest.approx(float(row["subnets_top1_mean"]))
        assert values["eval_top1"] == float(row["eval_top1"])
    assert all({"train_loss", "lr", "main"} <= set(values) for values in steps)


@pytest.mark.skipif(find_spec("mlflow") is not None, reason="mlflow is installed")
def test_tracker_that_is_not_installed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mlflow"):
        tiny.run(tiny.config(output=str(tmp_path), name="run", trackers=("mlflow",)))
    assert not list(tmp_path.iterdir())


# Cost of saving


def test_training_thread_waits_for_no_disk(tmp_path, monkeypatch):
    flushed, fsync = set(), os.fsync

    def note(descriptor: int) -> None:
        flushed.add(threading.current_thread().name.partition("_")[0])
        fsync(descriptor)

    config, network = tiny.config(output=str(tmp_path), checkpoint_interval=1), tiny.network()
    # From the first step on: env.json and args.yaml are written before anything is trained.
    network.on_forward = lambda model, x: monkeypatch.setattr(os, "fsync", note) if model.training else None
    tiny.run(config, model=network)
    assert flushed == {"checkpoint"}


def test_failed_save_is_told_at_the_next_step(tmp_path, monkeypatch):
    def full(self: Saver, step: int, *args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Saver, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        tiny.run(tiny.config(output=str(tmp_path), checkpoint_interval=1))


@pytest.mark.slow
def test_saving_costs_at_most_two_percent_of_an_epoch(tmp_path, monkeypatch):
    """ResNet-20 and digits, 7 steps to an epoch: far shorter than the epoch of any published run."""
    spent, save = [], Run.save

    def timed(self: Run, **options: Any) -> None:
        start = time.perf_counter()
        save(self, **options)
        spent.append(time.perf_counter() - start)

    monkeypatch.setattr(Run, "save", timed)
    config = Config(epochs=9, batch_size=128, device="cpu", output=str(tmp_path), name="run")
    path = train(config, console=tiny.quiet()).path
    epochs = sorted(event["time"] for event in events(path) if event["event"] == "epoch")
    ratio = sorted(spent)[len(spent) // 2] / epochs[len(epochs) // 2]
    print(f"saving takes {100 * ratio:.2f} % of an epoch")
    assert ratio <= 0.02


@pytest.mark.parametrize(("seconds", "told"), [(5.2, "0.77 images/s"), (0.5, "8 images/s"), (0.016, "250 images/s")])
def test_a_slow_step_has_a_rate_too(seconds, told):
    """Of batches of four."""
    training = prepare(replace(NAMED, batch_size=4))
    row = StepRow(step=1, epoch=1, loss=2.0, terms={}, subnets=(), lr=0.1, made=True)
    assert step_line(row, training, seconds).endswith(told)
