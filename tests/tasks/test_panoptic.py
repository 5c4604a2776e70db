"""Panoptic segmentation: the merge, its gradients by ST*, panoptic quality, and runs that are resumed."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

import panoptic_files as files
import tiny
import unloaf
from unloaf.commands.main import main
from unloaf.config import Config
from unloaf.engine.checkpoint import load_checkpoint
from unloaf.engine.loop import prepare, train_step
from unloaf.engine.run import train
from unloaf.inputs import SmallerInputs
from unloaf.models import panoptic
from unloaf.models.panoptic import build_panoptic, merged
from unloaf.release.exports import export_run
from unloaf.runs.judge import judge_run
from unloaf.tasks.detection import SmallerImages, losses
from unloaf.tasks.panoptic import panoptic_quality
from unloaf.tasks.panoptic_quality import matches, quality_of

THINGS = [False, True, False, True]
SMALL = "timm/mobilenetv3_small_050"  # for runs, whose checkpoints take most of the time


def config(folder, **settings):
    usual = {"task": "panoptic", "dataset": "coco", "data_dir": str(folder), "model": "panoptic-fpn", "device": "cpu"}
    usual |= {"backbone": SMALL, "method": "st-star", "img_size": 32, "batch_size": 2, "epochs": 2, "stuff_area": 16}
    usual |= {"opt": "adamw", "lr": 1e-4, "log_interval": 1, "recalibrate": 2}
    return Config(**usual | settings)


def network(**settings):
    torch.manual_seed(0)
    usual = {"backbone": "timm/resnet18", "num_classes": 4, "things": THINGS, "img_size": 48, "longest": 80}
    usual |= {"stuff_area": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return build_panoptic("panoptic-fpn", **usual | settings)[0]


def batch(*, dtype=torch.float64):
    """Sky over grass, with a box and a crowd of balls; and grass alone, half of it void."""
    torch.manual_seed(1)
    images = [torch.rand(3, 48, 64, dtype=dtype), torch.rand(3, 56, 48, dtype=dtype)]
    first, second = torch.zeros(48, 64, dtype=torch.int64), torch.zeros(56, 48, dtype=torch.int64)
    first[24:], second[28:] = 1, -1
    first[6:40, 4:30], first[2:20, 40:60] = 2, 3
    return images, [
        {
            "segments": first,
            "classes": torch.tensor([0, 2, 1, 3]),
            "crowd": torch.tensor([False, False, False, True]),
        },
        {"segments": second, "classes": torch.tensor([2]), "crowd": torch.tensor([False])},
    ]


# --- the network


def test_objects_are_the_things_without_crowds():
    [first, second] = [network().objects(target) for target in batch()[1]]
    assert first["boxes"].tolist() == [[4, 6, 30, 40]]
    assert first["labels"].tolist() == [1]  # box is the first thing, ball the second
    assert int(first["masks"].sum()) == 26 * 34
    assert (second["boxes"].shape, second["masks"].shape) == ((0, 4), (0, 56, 48))


def test_the_semantic_loss_is_the_mean_of_the_pixels_of_all_images_times_one_half():
    """Things and crowds are one class, 0; sky is 1, grass 2; void and what is beyond an image is not counted."""
    model, (images, targets) = network().double().train(), batch()
    found = model(images, targets)["loss_semantic"]
    whole = torch.zeros(2, 3, 64, 64, dtype=torch.float64)
    for part, image in zip(whole, images, strict=True):
        part[:, : image.shape[1], : image.shape[2]] = (image - 0.5) / 0.25
    levels = list(model.backbone(whole).values())[:4]
    logits = model.classifier(sum(branch(level) for branch, level in zip(model.branches, levels, strict=True)))
    logits = F.interpolate(logits, scale_factor=4, mode="bilinear").movedim(1, -1)
    first = torch.ones(48, 64, dtype=torch.int64)
    first[24:] = 2
    first[6:40, 4:30] = first[2:20, 40:60] = 0
    own = [logits[0, :48, :64].reshape(-1, 3), logits[1, :28, :48].reshape(-1, 3)]
    truth = torch.cat([first.flatten(), torch.full((28 * 48,), 2)])
    assert float(found.detach()) == pytest.approx(
        0.5 * float(F.cross_entropy(torch.cat(own), truth).detach()), rel=1e-9
    )


def masks_of(*columns):
    """Instances of one row of ten pixels, each from a column to another."""
    masks = torch.zeros(len(columns), 1, 10, dtype=torch.bool)
    for mask, (first, last) in zip(masks, columns, strict=True):
        mask[0, first:last] = True
    return masks


def test_the_merge_is_the_papers():
    """By hand: of 0.9, 0.8, 0.7 and 0.6 the second keeps what the first leaves, half of it; the third has more than
    half hidden; one of 0.4 is too unsure. Stuff takes the rest, where it is large enough.
    """
    masks = masks_of((0, 4), (2, 6), (1, 6), (6, 7), (7, 10))
    semantic = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1, 2]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.4])
    found = merged(masks, scores, [5, 5, 6, 6, 6], semantic, [3, 4], stuff_area=2)
    assert found["segments"].tolist() == [[0, 0, 0, 0, 1, 1, 2, 3, 3, -1]]
    assert found["labels"].tolist() == [5, 5, 6, 3]
    assert found["scores"][:3].tolist() == pytest.approx([0.9, 0.8, 0.6])
    assert math.isnan(found["scores"][3])
    small = merged(masks, scores, [5, 5, 6, 6, 6], semantic, [3, 4], stuff_area=1)
    assert small["segments"].tolist() == [[0, 0, 0, 0, 1, 1, 2, 3, 3, 4]]


def test_other_is_no_segment():
    found = merged(masks_of(), torch.zeros(0), [], torch.tensor([[0, 0, 1]]), [7], stuff_area=0)
    assert (found["segments"].tolist(), found["labels"].tolist()) == ([[-1, -1, 0]], [7])


def test_evaluated_it_gives_a_segment_or_none_for_each_pixel_of_the_image():
    with torch.no_grad():
        [found] = network().eval()([torch.rand(3, 50, 70)])
    assert found["segments"].shape == (50, 70)
    assert -1 <= int(found["segments"].min()) <= int(found["segments"].max()) < len(found["labels"])


# --- gradients


def narrow(model):
    """Small heads and few proposals; the loss's own draws stay."""
    model.rpn._post_nms_top_n = {"training": 20, "testing": 4}
    heads = model.roi_heads
    heads.fg_bg_sampler.batch_size_per_image = 16
    heads.detections_per_img = 2
    heads.box_head = TwoMLPHead(256 * 7 * 7, 16).double()
    for name, layer in heads.box_predictor.named_children():
        setattr(heads.box_predictor, name, nn.Linear(16, layer.out_features).double())
    heads.mask_head = nn.Sequential(*list(heads.mask_head)[:1])


@pytest.mark.parametrize("smaller", [False, True], ids=["same images", "smaller images"])
def test_gradients_of_st_star_are_those_of_separate_passes(smaller):
    """By hand: each loss by itself, the subnet's with its blocks away, on its own images and from the same seed."""
    model = network(frozen_norms=True).double().train()
    narrow(model)
    stages = unloaf.find_stages(model, [torch.zeros(3, 64, 64, dtype=torch.float64)], within="backbone.body")
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in ((2, 2, 1, 2), (1, 2, 2, 1))]
    shrink = SmallerImages(SmallerInputs(sides=(32,)), side=48) if smaller else None
    x, y = batch()
    slow, state = copy.deepcopy(model), torch.random.get_rng_state()
    seen = (x, y) if shrink is None else shrink((x, y), torch.Generator())
    for subnet, given in ((None, (x, y)), *((subnet, seen) for subnet in subnets)):
        torch.random.set_rng_state(state)
        with unloaf.active_subnet(slow, stages, subnet or unloaf.Subnet.full(stages)):
            sum(losses(slow, copy.deepcopy(given)).values()).backward()
    torch.random.set_rng_state(state)
    unloaf.GroundTruthTraining(model, stages, losses, num_subnets=2, shrink=shrink).backward(x, y, subnets=subnets)
    pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), slow.parameters(), strict=True)]
    norm = torch.stack([b.norm() for _, b in pairs if b is not None]).norm()
    assert norm > 0
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).norm() <= 1e-10 * norm


# --- panoptic quality


def truth_of(segments, classes, crowd=None):
    crowd = crowd or [False] * len(classes)
    return {"segments": torch.tensor(segments), "classes": torch.tensor(classes), "crowd": torch.tensor(crowd)}


def found_of(segments, labels):
    return {"segments": torch.tensor(segments), "labels": torch.tensor(labels, dtype=torch.int64)}


def test_quality_by_hand():
    """One row of 20 pixels; classes 0 and 2 are stuff, 1 and 3 things.

    Box 0-5 found as 0-3: IoU 4/6. Sky 6-8 found as 5-8: IoU 3/4.
    Ball 10-11 missed, a box guessed there in vain. A guessed ball on the crowd of balls, 12-15, is excused, a guessed
    box on it is not. One of void, 16-19, is excused.
    """
    true = [0] * 6 + [1] * 3 + [-1] + [2] * 2 + [3] * 4 + [-1] * 4
    guess = [0] * 4 + [-1] + [1] * 4 + [-1] + [2] * 2 + [3] * 3 + [4] + [5] * 4
    counts = matches(
        found_of([guess], [1, 0, 1, 3, 1, 3]), truth_of([true], [1, 0, 3, 3], [False, False, False, True]), 4
    )
    expected = [[3 / 4, 1, 0, 0], [4 / 6, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert counts.tolist() == pytest.approx([pytest.approx(row) for row in expected])
    found = quality_of(counts, THINGS)
    box, sky = 4 / 6 / 2, 3 / 4
    assert found.pq == pytest.approx(100 * (sky + box + 0) / 3)
    assert found.sq == pytest.approx(100 * (sky + 4 / 6 + 0) / 3)
    assert found.rq == pytest.approx(100 * (1 + 1 / 2 + 0) / 3)
    assert (found.pq_things, found.pq_stuff) == (pytest.approx(100 * box / 2), pytest.approx(100 * sky))


def slowly(found, truth, classes):
    """The definition, pair by pair."""
    guess, true = found["segments"], truth["segments"]
    counts = [[0.0, 0, 0, 0] for _ in range(classes)]
    taken, matched = set(), set()
    for i, label in enumerate(found["labels"].tolist()):
        mine = guess == i
        for j, own in enumerate(truth["classes"].tolist()):
            theirs = true == j
            if own != label or truth["crowd"][j]:
                continue
            union = int(((mine & (true != -1)) | theirs).sum())
            value = int((mine & theirs).sum()) / max(1, union)
            if value > 0.5:
                counts[label][0] += value
                counts[label][1] += 1
                matched.add(i)
                taken.add(j)
        if i not in matched and bool(mine.any()):
            excused = mine & (true == -1)
            for j, own in enumerate(truth["classes"].tolist()):
                if own == label and truth["crowd"][j]:
                    excused |= mine & (true == j)
            counts[label][2] += int(excused.sum()) <= 0.5 * int(mine.sum())
    for j, own in enumerate(truth["classes"].tolist()):
        counts[own][3] += j not in taken and not bool(truth["crowd"][j]) and bool((true == j).any())
    return counts


def guessed(seed, *, crowds):
    """Blocks of segments, and a guess that agrees with most of them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *size):
        return torch.randint(low, high, size, generator=generator)

    true = draw(-1, 6, 6, 8).repeat_interleave(3, 0).repeat_interleave(3, 1)
    guess = torch.where(torch.rand(true.shape, generator=generator) < 0.75, true, draw(-1, 6, *true.shape))
    classes = draw(0, 4, 6)
    labels = torch.where(torch.rand(6, generator=generator) < 0.8, classes, draw(0, 4, 6))
    crowd = torch.rand(6, generator=generator) < (0.3 if crowds else 0)
    return {"segments": guess, "labels": labels}, {"segments": true, "classes": classes, "crowd": crowd}


def test_counts_are_those_of_the_definition():
    for seed in range(30):
        found, truth = guessed(seed, crowds=True)
        ours = matches(found, truth, 4).tolist()
        assert ours == pytest.approx([pytest.approx(row) for row in slowly(found, truth, 4)]), seed


def test_quality_without_crowds_is_that_of_torchmetrics():
    """It knows no crowds, and does not count a segment as missed where most of it is predicted as void: unlike
    panopticapi, so that here nothing is.
    """
    from torchmetrics.detection import PanopticQuality

    metric = PanopticQuality({0, 1, 2, 3}, {9}, allow_unknown_preds_category=True, return_per_class=True)
    counts = torch.zeros(4, 4, dtype=torch.float64)
    for seed in range(6):
        found, truth = guessed(seed, crowds=False)
        found["segments"] = found["segments"].clamp(min=0)
        counts += matches(found, truth, 4)
        named = torch.cat([truth["classes"], torch.tensor([77])])  # an unknown class is void
        own, true = found["segments"], truth["segments"]
        metric.update(
            torch.stack([found["labels"][own], own], -1)[None], torch.stack([named[true], true + 1], -1)[None]
        )
    ours = [quality_of(counts[at : at + 1], [True]).pq / 100 for at in range(4)]
    assert ours == pytest.approx(metric.compute().flatten()[:4].tolist(), abs=1e-6)
    assert 0.05 < min(ours) < max(ours) < 0.95


class Fixed(nn.Module):
    """Gives prepared segments, image by image."""

    def __init__(self, found):
        super().__init__()
        self.weight, self.found = nn.Parameter(torch.zeros(1)), found

    def forward(self, images):
        return [self.found[int(image[0, 0, 0])] for image in images]


def test_quality_of_two_processes_is_that_of_one():
    pairs = [guessed(seed, crowds=True) for seed in range(3)]
    model = Fixed([found for found, _ in pairs])
    images = [torch.full((3, 1, 1), float(at)) for at in range(3)]
    alone = panoptic_quality(model, [(images, [truth for _, truth in pairs])], tuple(THINGS))
    parts = []

    def keep(counts):
        parts.append(counts.clone())
        return counts

    shares = [[truth if at % 2 == rank else None for at, (_, truth) in enumerate(pairs)] for rank in (0, 1)]
    panoptic_quality(model, [(images, shares[1])], tuple(THINGS), reduce=keep)
    both = panoptic_quality(model, [(images, shares[0])], tuple(THINGS), reduce=lambda counts: counts + parts[0])
    assert vars(both) == pytest.approx(vars(alone), abs=1e-9)


# --- runs


@pytest.fixture
def thin(monkeypatch):
    """A pyramid of 32 channels: most of a run's time here is that of its checkpoints."""
    monkeypatch.setattr(panoptic, "_CHANNELS", 32)


def test_a_run_that_is_stopped_continues_to_the_bit(tmp_path, monkeypatch, thin):
    files.panoptic(tmp_path / "set", train=4, val=1)
    settings = config(tmp_path / "set", output=str(tmp_path), name="whole", checkpoint_interval=1)
    whole = train(settings, console=tiny.quiet())
    other = replace(settings, name="stopped")
    from unloaf.engine import loop

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
    assert vars(again.test) == pytest.approx(vars(whole.test), abs=0, nan_ok=True)


def test_a_run_is_trained_judged_and_exported(tmp_path, capsys, thin):
    files.panoptic(tmp_path / "set", train=2, val=1)
    words = ["train", "--task", "panoptic", "--dataset", "coco", "--data-dir", str(tmp_path / "set"), "--model"]
    words += [
        "panoptic-fpn",
        "--backbone",
        SMALL,
        "--method",
        "st-star",
        "--img-size",
        "32",
        "-b",
        "2",
        "--epochs",
        "1",
    ]
    words += ["--opt", "adamw", "--lr", "0.0001", "--stuff-area", "16", "--device", "cpu", "--log-interval", "1"]
    assert main([*words, "--output", str(tmp_path), "--name", "run", "--recalibrate", "2"]) == 0
    heads = (tmp_path / "run" / "summary.csv").read_text().splitlines()[0]
    assert heads.startswith("epoch,time,train_loss,eval_pq,eval_sq,eval_rq,eval_pq_things,eval_sq_things,")
    assert "PQ" in capsys.readouterr().err
    judged = judge_run(tmp_path / "run", subnets="1", device="cpu")
    assert [row.metric is not None for row in judged.subnets] == [True, True]
    written = export_run(tmp_path / "run", depths=str(judged.subnets[1].subnet).replace("-", ","), device="cpu")
    small, images = unloaf.load_subnet(written.folder), [torch.rand(3, 40, 50)]
    assert small.class_names == ("sky", "box", "grass", "ball")
    # By hand: the checkpoint's network without those blocks, with the statistics of the small one.
    whole = network(backbone=SMALL, img_size=32, longest=53, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    whole.load_state_dict(load_checkpoint(tmp_path / "run" / "last").weights["model"])
    stages = unloaf.find_stages(whole, [torch.zeros(3, 64, 64)], within="backbone.body")
    with torch.no_grad(), unloaf.active_subnet(whole.eval(), stages, judged.subnets[1].subnet):
        for name, buffer in small.named_buffers():
            if "running" in name and name in dict(whole.named_buffers()):
                whole.get_buffer(name).copy_(buffer)
        [ours], [theirs] = small(images), whole(images)
    assert torch.equal(ours["segments"], theirs["segments"])


def test_an_image_of_void_alone_trains(tmp_path, thin):
    ids, kinds = files.drawn(0)
    files.write(tmp_path, "train", [(ids, kinds), (ids * 0, {})])
    training = prepare(config(tmp_path, val_fraction=0.0))
    row = train_step(training, next(training.batches.epoch(1)))
    assert (row.made, set(row.terms)) == (True, {"main", "subnet0"})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "st"}, "has no logits of classes that it could teach"),
        ({"dataset": "voc"}, "task panoptic reads coco"),
        ({"model": "mask-rcnn"}, "task panoptic trains panoptic-fpn"),
        ({"task": "instance", "model": "mask-rcnn"}, "--stuff-area: without effect in task instance"),
    ],
)
def test_settings_that_do_not_go_with_the_task_are_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **settings)


def test_a_set_without_panoptic_annotations_ends_the_command_with_2(tmp_path, capsys):
    words = ["train", "--task", "panoptic", "--dataset", "coco", "--data-dir", str(tmp_path), "--device", "cpu"]
    assert main([*words, "--model", "panoptic-fpn", "--method", "common", "--output", str(tmp_path / "out")]) == 2
    assert "expected panoptic_train.json" in capsys.readouterr().err
