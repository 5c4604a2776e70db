"""Semantic segmentation: the network, gradients of ST* and ST, figures of pixels, and runs that are resumed."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mask_files as files
import tiny
import unloaf
from unloaf.commands.main import main
from unloaf.config import Config
from unloaf.data import Batch
from unloaf.engine.checkpoint import load_checkpoint
from unloaf.engine.loop import prepare, train_step
from unloaf.engine.run import train
from unloaf.inputs import SmallerInputs
from unloaf.models.segmenters import build_segmenter
from unloaf.release.exports import export_run
from unloaf.runs.judge import judge_run
from unloaf.tasks.semantic import Semantic, SmallerMasks, pixel_loss, pixel_scores

SMALL = "timm/mobilenetv3_small_050"  # for runs, whose checkpoints take most of the time


def config(folder, **settings):
    usual = {"task": "semantic", "dataset": "masks", "data_dir": str(folder), "model": "semantic-fpn", "device": "cpu"}
    usual |= {"backbone": "timm/resnet18", "method": "st-star", "img_size": 32, "batch_size": 4, "epochs": 2}
    usual |= {"opt": "adamw", "lr": 1e-4, "log_interval": 1, "recalibrate": 4}
    return Config(**usual | settings)


def segmenter(**settings):
    torch.manual_seed(0)
    network = build_segmenter("semantic-fpn", backbone="timm/resnet18", num_classes=4, **settings)[0]
    for name, weight in network.named_parameters():
        if name.endswith("bn2.weight"):  # zero in timm, which makes every subnet the main network
            nn.init.uniform_(weight, 0.5, 1)
    return network


def batch(side=32, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, 4, (2, side // 8, side // 8), generator=generator)
    y = y.repeat_interleave(8, 1).repeat_interleave(8, 2)
    y[0, : side // 4] = 255
    return torch.rand(2, 3, side, side, generator=generator, dtype=dtype), y


# --- the network


def test_logits_are_those_of_the_paper_written_out():
    """Kirillov et al. 2019, figure 3: three, two, one and no upsampling after 3x3 convolution, group norm and ReLU."""
    network = segmenter().double().eval()
    x = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    weights, total = dict(network.named_parameters()), 0
    for at, level in enumerate(network.backbone(x).values()):
        for step in range(max(1, at)):
            layer = f"branches.{at}.{step * (3 if at == 0 else 4)}"
            norm = f"branches.{at}.{step * (3 if at == 0 else 4) + 1}"
            level = F.conv2d(level, weights[f"{layer}.weight"], padding=1)
            level = F.relu(F.group_norm(level, 32, weights[f"{norm}.weight"], weights[f"{norm}.bias"]))
            if at:
                level = F.interpolate(level, scale_factor=2, mode="bilinear", align_corners=False)
        assert level.shape == (1, 128, 16, 24)
        total = total + level
    logits = F.conv2d(total, weights["classifier.weight"], weights["classifier.bias"])
    expected = F.interpolate(logits, size=(64, 96), mode="bilinear", align_corners=False)
    assert torch.allclose(network(x), expected, atol=1e-12)


def test_any_side_is_padded_to_a_multiple_of_32_and_cut_again():
    network = segmenter().double().eval()
    x = torch.rand(1, 3, 37, 70, dtype=torch.float64)
    padded = torch.zeros(1, 3, 64, 96, dtype=torch.float64)
    padded[:, :, :37, :70] = x
    assert torch.equal(network(x), network(padded)[:, :, :37, :70])


# --- gradients


def same_gradients(model, slow):
    pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), slow.parameters(), strict=True)]
    norm = torch.stack([b.norm() for _, b in pairs if b is not None]).norm()
    assert norm > 0
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).norm() <= 1e-10 * norm


def two_subnets(model):
    stages = unloaf.find_stages(model, torch.zeros(1, 3, 64, 64, dtype=torch.float64), within="backbone.body")
    return stages, [unloaf.Subnet.from_depths(stages, depths) for depths in ((2, 2, 1, 2), (1, 2, 2, 1))]


@pytest.mark.parametrize("side", [32, 23], ids=["same images", "smaller images"])
def test_gradients_of_st_star_are_those_of_separate_passes(side):
    model = segmenter().double().train()
    stages, subnets = two_subnets(model)
    x, y = batch()
    shrink = None if side == 32 else SmallerMasks(SmallerInputs(sides=(side,)))
    smaller = F.interpolate(x, size=(side, side), mode="bilinear"), y
    if side != 32:  # the pixel under the middle of each
        nearest = ((torch.arange(side) + 0.5) * 32 / side).long()
        smaller = smaller[0], y[:, nearest][:, :, nearest]

    slow = copy.deepcopy(model)
    for subnet, (inputs, ids) in ((unloaf.Subnet.full(stages), (x, y)), *((subnet, smaller) for subnet in subnets)):
        with unloaf.active_subnet(slow, stages, subnet):
            F.cross_entropy(slow(inputs), ids, ignore_index=255).backward()

    method = unloaf.GroundTruthTraining(model, stages, pixel_loss, num_subnets=2, shrink=shrink)
    method.backward((x, y), subnets=subnets)
    same_gradients(model, slow)


def options_of(folder, **settings):
    """What the task makes of a configuration, on the network of these tests."""
    training = prepare(config(folder, **settings))
    model = segmenter().double().train()
    stages, subnets = two_subnets(model)
    return training.task.method(training.config, model, stages), model, stages, subnets


@pytest.mark.parametrize("side", [32, 23], ids=["same images", "smaller images"])
@pytest.mark.parametrize("name", ["st", "st++"])
def test_gradients_of_st_are_those_of_separate_passes(tmp_path, name, side):
    """The subnet's prediction, at the main network's size, is drawn to the main network's, void left out."""
    files.masked(tmp_path, train=4, val=1)
    inputs = {"subnet_inputs": "same"} if side == 32 else {"subnet_inputs": "smaller", "sides": (side,)}
    method, model, stages, subnets = options_of(tmp_path, method=name, num_subnets=2, subnet_weight=0.5, **inputs)
    x, y = batch()
    counted = (y != 255)[:, None]

    def logits_of_loss(logits):
        if name == "st":
            return logits
        centred = logits - logits.mean(1, keepdim=True)
        scale = unloaf.losses.resolve_amplitude("auto", 4)
        return scale * centred / (centred.square().mean(1, keepdim=True) + 1e-7).sqrt()

    slow = copy.deepcopy(model)
    main = slow(x)
    F.cross_entropy(logits_of_loss(main), y, ignore_index=255).backward()
    teacher = logits_of_loss(main).detach().log_softmax(1)
    for subnet in subnets:
        with unloaf.active_subnet(slow, stages, subnet):
            found = slow(F.interpolate(x, size=(side, side), mode="bilinear"))
        student = logits_of_loss(F.interpolate(found, size=(32, 32), mode="bilinear")).log_softmax(1)
        divergence = (teacher.exp() * (teacher - student)).sum(1, keepdim=True)
        (0.5 * divergence[counted].mean()).backward()

    method.backward(x, y, subnets=subnets)
    same_gradients(model, slow)


def test_a_batch_of_void_alone_trains_nothing_and_breaks_nothing():
    network = nn.Conv2d(3, 4, 1)
    loss = pixel_loss(network, (torch.rand(1, 3, 4, 4), torch.full((1, 4, 4), 255)))
    loss.backward()
    assert (float(loss.detach()), float(network.weight.grad.abs().max())) == (0.0, 0.0)


def test_images_and_masks_of_a_pass_have_one_drawn_side():
    smaller, sides = SmallerMasks(SmallerInputs(min_ratio=0.43)), set()
    for seed in range(40):
        x, y = smaller(batch(64, dtype=torch.float32), torch.Generator().manual_seed(seed))
        assert x.shape[-2:] == y.shape[-2:]
        sides.add(x.shape[-1])
    assert (min(sides) >= int(0.43 * 64), max(sides) <= 64, len(sides) > 15) == (True, True, True)


@pytest.mark.parametrize("method", ["common", "st++", "gkt", "stochastic-depth"])
def test_every_method_makes_a_step(tmp_path, method):
    files.masked(tmp_path, train=4, val=1)
    training = prepare(config(tmp_path, method=method))
    before = tiny.weights(training.model)
    row = train_step(training, next(training.batches.epoch(1)))
    terms = {"common": 1, "st++": 7, "gkt": 7, "stochastic-depth": 1}
    assert (row.made, len(row.terms)) == (True, terms[method])
    assert not tiny.same(before, tiny.weights(training.model))


# --- figures


class Fixed(nn.Module):
    """Gives prepared logits for images, by the number that is in their first pixel."""

    def __init__(self, logits):
        super().__init__()
        self.weight, self.logits = nn.Parameter(torch.zeros(1)), logits

    def forward(self, images):
        return torch.stack([self.logits[int(image[0, 0, 0])] for image in images])


def guesses(classes=6):
    """Images of two sizes; class 4 is in no mask, 5 neither there nor predicted."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(6, 8), (5, 4), (6, 8), (7, 5)]
    logits = [torch.randn(classes, *size, generator=generator) for size in sizes]
    masks = [torch.randint(0, 4, size, generator=generator) for size in sizes]
    for at, (one, mask) in enumerate(zip(logits, masks, strict=True)):
        one[5] = -100.0
        one.scatter_add_(0, mask[None], torch.full((1, *mask.shape), 1.0))
        mask[0, at] = 255
    images = [torch.full((3, *size), float(at)) for at, size in enumerate(sizes)]
    return logits, images, masks


def test_figures_are_those_of_scikit_learn():
    from sklearn.metrics import accuracy_score, jaccard_score, log_loss, recall_score

    logits, images, masks = guesses()
    found = pixel_scores(Fixed(logits), [(images[:2], masks[:2]), (images[2:], masks[2:])], 6)
    truth = torch.cat([mask[mask != 255] for mask in masks]).numpy()
    rows = torch.cat([one.movedim(0, -1)[mask != 255] for one, mask in zip(logits, masks, strict=True)]).double()
    guess = rows.argmax(1).numpy()
    assert (4 in guess, 5 in guess) == (True, False)
    expected = [
        log_loss(truth, rows.softmax(1).numpy(), labels=range(6)),
        100 * jaccard_score(truth, guess, labels=range(5), average="macro"),
        100 * recall_score(truth, guess, labels=range(4), average="macro"),
        100 * accuracy_score(truth, guess),
    ]
    assert [found.loss, found.miou, found.macc, found.pixel] == pytest.approx(expected, abs=1e-6)


def test_figures_of_two_processes_are_those_of_one():
    logits, images, masks = guesses()
    alone, parts = pixel_scores(Fixed(logits), [(images, masks)], 6), []

    def keep(sums):
        parts.append(sums)
        return sums

    masks_of_rank = [[mask if at % 2 == rank else None for at, mask in enumerate(masks)] for rank in (0, 1)]
    for mine in masks_of_rank:
        pixel_scores(Fixed(logits), [(images, mine)], 6, reduce=keep)
    both = pixel_scores(Fixed(logits), [(images, masks_of_rank[0])], 6, reduce=lambda sums: sums + parts[1])
    assert (both.miou, both.macc, both.pixel) == (alone.miou, alone.macc, alone.pixel)
    assert both.loss == pytest.approx(alone.loss, abs=1e-9)


def test_a_network_that_gives_nan_has_no_figures():
    logits, images, masks = guesses()
    logits[0][2, 3, 3] = float("nan")
    found = pixel_scores(Fixed(logits), [(images, masks)], 6)
    assert np.isnan([found.loss, found.miou, found.macc, found.pixel]).all()


# --- runs


def test_a_run_that_is_stopped_continues_to_the_bit(tmp_path, monkeypatch):
    files.masked(tmp_path / "set", train=4, val=1, height=32, width=32)
    settings = config(tmp_path / "set", output=str(tmp_path), name="whole", checkpoint_interval=1, batch_size=2)
    settings = replace(settings, backbone=SMALL)
    assert tiny.ends_alike(*tiny.stopped_and_resumed(settings, monkeypatch))


def test_a_run_and_its_subnets_are_judged_and_reported(tmp_path, capsys):
    files.masked(tmp_path / "set", train=4, val=2, height=32, width=32)
    settings = config(tmp_path / "set", output=str(tmp_path), name="run", epochs=1, eval_subnets=1, backbone=SMALL)
    train(settings, console=tiny.quiet())
    heads = (tmp_path / "run" / "summary.csv").read_text().splitlines()[0]
    assert heads == (
        "epoch,time,train_loss,eval_loss,eval_miou,eval_macc,eval_pixel,lr,subnets_miou_mean,subnets_miou_min,"
        "main_miou_reestimated"
    )
    judged = judge_run(tmp_path / "run", subnets="1", device="cpu")
    assert [(row.metric is not None, row.statistics) for row in judged.subnets] == [(True, "re-estimated")] * 2
    assert judged.subnets[1].gmacs < judged.subnets[0].gmacs
    run, page = str(tmp_path / "run"), str(tmp_path / "page.html")
    assert main(["eval", run, "--device", "cpu", "--subnets", "1"]) == 0
    out = capsys.readouterr()
    assert "val mIoU" in out.err + out.out
    assert "mIoU %" in out.out
    assert main(["subnets", run, "--device", "cpu", "--subnets", "1"]) == 0
    assert "mIoU %" in capsys.readouterr().out
    assert main(["report", run, "--output", page]) == 0
    assert "mIoU, %" in (tmp_path / "page.html").read_text()
    for command, *more in (["export", "--elastic"], ["predict", str(tmp_path / "set" / "val")]):
        assert main([command, run, *more, "--device", "cpu"]) == 2
        assert "this run is of task semantic" in capsys.readouterr().err
    # A subnet leaves as an ordinary network: that of the checkpoint, run without its blocks and with its statistics.
    written = export_run(tmp_path / "run", depths=str(judged.subnets[1].subnet).replace("-", ","), device="cpu")
    small, x = unloaf.load_subnet(written.folder), torch.rand(1, 3, 40, 50)
    whole = build_segmenter("semantic-fpn", backbone=SMALL, num_classes=4)[0].eval()
    whole.load_state_dict(load_checkpoint(tmp_path / "run" / "last").weights["model"])
    stages = unloaf.find_stages(whole, x, within="backbone.body")
    statistics = {name: value for name, value in small.state_dict().items() if "running" in name}
    assert small.class_names == ("0", "1", "2", "3")
    assert "- image-segmentation" in (written.folder / "README.md").read_text()
    with torch.no_grad(), unloaf.active_subnet(whole, stages, judged.subnets[1].subnet):
        named = {name: whole.get_buffer(name) for name in statistics if name in dict(whole.named_buffers())}
        for name, buffer in named.items():
            buffer.copy_(statistics[name])
        assert len(named) > 20
        assert torch.equal(small(x), whole(x))


def test_batch_norm_statistics_come_from_images_as_they_are():
    """No zeros are put around the smaller one: mean 1 of two images and 4 of one."""
    images = [torch.full((3, 4, 4), 1.0), torch.full((3, 2, 6), 4.0), torch.full((3, 4, 4), 1.0)]
    norm = nn.BatchNorm2d(3)
    unloaf.recalibrate_bn(norm, Semantic().inputs_of(Batch(images, [None] * 3)))
    assert norm.running_mean.tolist() == pytest.approx([2.0] * 3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mixup": 0.2, "smoothing": 0.1}, "--mixup, --smoothing: without effect in task semantic; leave it out"),
        ({"dataset": "coco"}, "task semantic reads masks"),
        ({"pretrained": True, "backbone_weights": "x"}, "both say how the backbone begins"),
        ({"task": "classification"}, "--backbone: without effect in task classification|has classes of pixels"),
    ],
)
def test_settings_that_do_not_go_with_the_task_are_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "mask-rcnn"}, "task semantic trains semantic-fpn; give --model"),
        ({"backbone": "timm/vit_tiny_patch16_224"}, "a pyramid needs"),
        ({"method": "st++", "num_classes": 2}, "eps"),
        ({"mean": (0.5, 0.5)}, "give one number, or 3"),
    ],
)
def test_what_does_not_go_with_the_task_is_refused_before_the_first_step(tmp_path, settings, said):
    files.masked(tmp_path)
    with pytest.raises(ValueError, match=said):
        prepare(config(tmp_path, **settings))


def test_a_wrong_mask_ends_the_command_with_2(tmp_path, capsys):
    files.masked(tmp_path / "set")
    (tmp_path / "set" / "train" / "masks" / "0.png").unlink()
    words = [
        "train",
        "--task",
        "semantic",
        "--dataset",
        "masks",
        "--data-dir",
        str(tmp_path / "set"),
        "--device",
        "cpu",
    ]
    assert main([*words, "--model", "semantic-fpn", "--method", "st-star", "--output", str(tmp_path / "out")]) == 2
    assert "1 of the 8 images" in capsys.readouterr().err
