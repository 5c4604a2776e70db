"""Detection and instance segmentation: targets, gradients of ST*, COCO's precision, and runs that are resumed."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

import annotated_files as files
import tiny
import unloaf
from unloaf.commands.main import main
from unloaf.config import Config
from unloaf.data.annotated.batches import AnnotatedEvalBatches, AnnotatedTrainBatches
from unloaf.data.annotated.targets import mirrored, resized
from unloaf.data.annotated_sets import load_annotated
from unloaf.data.sets import IMAGENET_MEAN, IMAGENET_STD
from unloaf.engine.checkpoint import load_checkpoint
from unloaf.engine.loop import prepare, train_step
from unloaf.engine.run import train
from unloaf.inputs import SmallerInputs
from unloaf.models.backbones import build_body, described_backbone, freeze_norms
from unloaf.models.detectors import build_detector
from unloaf.release.exports import export_run
from unloaf.runs.judge import judge_run
from unloaf.tasks.detection import SmallerImages, losses, precision

DETECTORS = ("faster-rcnn", "cascade-rcnn", "mask-rcnn", "fcos", "atss", "retinanet")


def config(folder, **settings):
    usual = {"task": "detection", "dataset": "coco", "data_dir": str(folder), "model": "retinanet", "device": "cpu"}
    usual |= {"backbone": "timm/resnet18", "method": "st-star", "img_size": 48, "batch_size": 4, "epochs": 2}
    usual |= {"opt": "adamw", "lr": 1e-4, "log_interval": 1, "recalibrate": 4}
    return Config(**usual | settings)


def detector(name, **settings):
    torch.manual_seed(0)
    usual = {"backbone": "timm/resnet18", "num_classes": 2, "img_size": 48, "longest": 80}
    return build_detector(name, **usual, mean=(0.5,) * 3, std=(0.25,) * 3, **settings)[0]


def batch(*, masks=False, dtype=torch.float64):
    images = [torch.rand(3, 48, 64, dtype=dtype), torch.rand(3, 56, 48, dtype=dtype)]
    targets = [
        {"boxes": torch.tensor([[4.0, 6, 30, 40], [20, 2, 60, 20]], dtype=dtype), "labels": torch.tensor([1, 2])},
        {"boxes": torch.zeros(0, 4, dtype=dtype), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    if masks:
        for image, target in zip(images, targets, strict=True):
            target["masks"] = torch.zeros(len(target["boxes"]), *image.shape[-2:], dtype=torch.uint8)
            for mask, (left, top, right, bottom) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
                mask[top:bottom, left:right] = 1
    return images, targets


# --- targets follow the image


def test_a_mirrored_object_is_where_its_pixels_are():
    image, target = batch(masks=True)[0][0], batch(masks=True)[1][0]
    flipped, changed = mirrored(image, target)
    for box, mask in zip(changed["boxes"].tolist(), changed["masks"], strict=True):
        rows, columns = mask.nonzero().unbind(1)
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box
    assert torch.equal(flipped, image.flip(2))


def test_a_resized_object_is_where_its_pixels_are():
    image, target = batch(masks=True)[0][0], batch(masks=True)[1][0]
    smaller, changed = resized(image, target, (24, 32))
    assert smaller.shape == (3, 24, 32)
    assert changed["boxes"].tolist() == [[2, 3, 15, 20], [10, 1, 30, 10]]
    for box, mask in zip(changed["boxes"].tolist(), changed["masks"], strict=True):
        rows, columns = mask.nonzero().unbind(1)
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box


def test_all_objects_of_a_pass_see_one_share_of_the_side():
    smaller = SmallerImages(SmallerInputs(min_ratio=0.43), side=48)
    shares = set()
    for seed in range(40):
        images, targets = smaller(batch(), torch.Generator().manual_seed(seed))
        share = images[0].shape[1] / 48
        shares.add(images[0].shape[1])
        assert images[1].shape[1] == round(56 * share)
        assert targets[0]["boxes"][0, 2] == pytest.approx(30 * images[0].shape[2] / 64)
    assert (min(shares) >= int(0.43 * 48), max(shares) <= 48, len(shares) > 15) == (True, True, True)


# --- batches


def batches(folder, *, rank=0, world=1, masks=False, **settings):
    settings = config(folder, **settings)
    data = load_annotated(settings, masks=masks)
    where = {"device": torch.device("cpu"), "rank": rank, "world": world}
    return AnnotatedTrainBatches(data, settings, masks=masks, **where)


def test_images_come_at_the_side_with_their_objects(tmp_path):
    files.write_coco(tmp_path, "train", [[(1, [8, 16, 24, 32])]] * 4)
    [[(images, targets)]] = batches(tmp_path, img_size=32, hflip=1.0, val_fraction=0.0).epoch(1)
    assert {tuple(image.shape) for image in images} == {(3, 32, 40)}
    # Half of 80 x 64 pixels, mirrored: from 40 - 16 to 40 - 4.
    assert [target["boxes"].tolist() for target in targets] == [[[24, 8, 36, 24]]] * 4
    assert [target["labels"].tolist() for target in targets] == [[1]] * 4
    inside = images[0][0, 10:22, 26:34]  # red, 230 of 255
    assert torch.allclose(inside, torch.full_like(inside, 230 / 255))


def test_batches_of_a_resumed_epoch_are_those_of_the_whole(tmp_path):
    files.coco(tmp_path)
    whole = list(batches(tmp_path).epoch(3))
    [rest] = batches(tmp_path).epoch(3, start=1)
    assert tiny.same([list(part) for part in whole[1]], [list(part) for part in rest])


def test_two_processes_share_the_images_of_one(tmp_path):
    files.coco(tmp_path)
    [[alone]] = list(batches(tmp_path, batch_size=8).epoch(1))
    parts = [next(batches(tmp_path, rank=rank, world=2).epoch(1))[0] for rank in (0, 1)]
    turns = [image for pair in zip(parts[0].x, parts[1].x, strict=True) for image in pair]
    assert tiny.same(alone.x, turns)


def test_images_that_two_processes_both_have_count_once(tmp_path):
    files.coco(tmp_path, val=3)
    settings = config(tmp_path)
    data = load_annotated(settings, masks=False)
    counted = 0
    for rank in (0, 1):
        where = {"device": torch.device("cpu"), "rank": rank, "world": 2}
        for _, targets in AnnotatedEvalBatches(data.val, data, settings, masks=False, **where):
            counted += sum(target is not None for target in targets)
    assert counted == 3


def test_crowds_are_judged_but_not_learned(tmp_path):
    file = files.write_coco(tmp_path, "train", [[(1, [8, 16, 24, 32]), (2, [40, 8, 24, 32])]] * 4)
    files.changed(file, {"annotations": lambda entries: [one | {"iscrowd": one["category_id"] - 1} for one in entries]})
    [[(_, targets)]] = batches(tmp_path, val_fraction=0.0).epoch(1)
    assert [target["labels"].tolist() for target in targets] == [[1]] * 4
    settings = config(tmp_path, val_fraction=0.0)
    data = load_annotated(settings, masks=False)
    where = {"device": torch.device("cpu"), "rank": 0, "world": 1}
    [(_, judged)] = AnnotatedEvalBatches(data.train, data, settings, masks=False, **where)
    assert [target["crowd"].tolist() for target in judged] == [[False, True]] * 4


# --- gradients


def narrow(model):
    """Makes a detector's heads small and its proposals few enough for a test; the loss's own draws stay."""
    if not hasattr(model, "rpn"):
        for head in (model.head.classification_head, model.head.regression_head):
            head.conv = head.conv[:3]
        return
    model.rpn._post_nms_top_n = {"training": 40, "testing": 4}
    for heads in getattr(model.roi_heads, "stages", [model.roi_heads]):
        heads.fg_bg_sampler.batch_size_per_image = 32
        heads.detections_per_img = 2
        heads.box_head = TwoMLPHead(256 * 7 * 7, 16).double()
        for name, layer in heads.box_predictor.named_children():
            setattr(heads.box_predictor, name, nn.Linear(16, layer.out_features).double())


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("smaller", [False, True], ids=["same images", "smaller images"])
def test_gradients_of_st_star_are_those_of_separate_passes(name, smaller):
    """By hand: each loss by itself, the subnet's with its blocks away, on its own images and from the same seed."""
    model = detector(name, frozen_norms=True).double().train()
    narrow(model)
    stages = unloaf.find_stages(model, [torch.zeros(3, 64, 64, dtype=torch.float64)], within="backbone.body")
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in ((2, 2, 1, 2), (1, 2, 2, 1))]
    shrink = SmallerImages(SmallerInputs(sides=(32,)), side=48) if smaller else None
    x, y = batch(masks=name == "mask-rcnn")

    slow, state = copy.deepcopy(model), torch.random.get_rng_state()
    seen = (x, y) if shrink is None else shrink((x, y), torch.Generator())
    for subnet, given in ((None, (x, y)), *((subnet, seen) for subnet in subnets)):
        torch.random.set_rng_state(state)
        with unloaf.active_subnet(slow, stages, subnet or unloaf.Subnet.full(stages)):
            sum(losses(slow, copy.deepcopy(given)).values()).backward()

    torch.random.set_rng_state(state)
    method = unloaf.GroundTruthTraining(model, stages, losses, num_subnets=2, shrink=shrink)
    method.backward(x, y, subnets=subnets)
    pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), slow.parameters(), strict=True)]
    norm = torch.stack([b.norm() for _, b in pairs if b is not None]).norm()
    assert norm > 0
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).norm() <= 1e-10 * norm


def test_an_image_without_objects_trains(tmp_path):
    files.write_coco(tmp_path, "train", [[(1, [8, 16, 24, 32])], [], [], []])
    training = prepare(config(tmp_path, val_fraction=0.0))
    before = tiny.weights(training.model)
    [part] = next(training.batches.epoch(1))
    row = train_step(training, [part._replace(x=part.x[:2], y=part.y[:2])])
    assert (row.made, set(row.terms)) == (True, {"main", "subnet0"})
    assert not tiny.same(before, tiny.weights(training.model))


# --- precision


class Fixed(nn.Module):
    """Gives prepared detections, batch by batch."""

    def __init__(self, found):
        super().__init__()
        self.weight, self.found, self.at = nn.Parameter(torch.zeros(1)), found, 0

    def forward(self, images):
        part = self.found[self.at : self.at + len(images)]
        self.at += len(images)
        return part


def noisy(boxes, generator, count):
    """Boxes near the given ones, and some elsewhere."""
    near = boxes.repeat(2, 1) + torch.randn(2 * len(boxes), 4, generator=generator) * 3
    other = torch.rand(count, 4, generator=generator) * 30
    other[:, 2:] += other[:, :2] + 1
    return torch.cat([near, other])


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_precision_is_that_of_pycocotools(tmp_path, masks, capsys):
    """On the same fixed detections, with a crowd, an image without objects and one whose objects were all missed."""
    from pycocotools import mask as coder
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    file = files.write_coco(tmp_path, "train", [*files.drawn(6, 3), [], files.drawn(1, 4)[0]])
    files.changed(file, {"annotations": lambda entries: [entries[0] | {"iscrowd": 1}, *entries[1:]]})
    if masks:  # pycocotools reads a crowd's mask as RLE alone

        def as_rle(one):
            rle = coder.merge(coder.frPyObjects(one["segmentation"], 64, 80))
            return one | {"segmentation": {"size": [64, 80], "counts": rle["counts"].decode()}}

        files.changed(file, {"annotations": lambda entries: [as_rle(one) for one in entries]})
    settings = config(tmp_path, val_fraction=0.0, **({"task": "instance", "model": "mask-rcnn"} if masks else {}))
    data = load_annotated(settings, masks=masks)
    read = AnnotatedEvalBatches(data.train, data, settings, masks=masks, device=torch.device("cpu"), rank=0, world=1)

    generator, found, results = torch.Generator().manual_seed(0), [], []
    for image in range(8):
        boxes = noisy(data.train.target(image)["boxes"], generator, 4) if image != 7 else torch.zeros(0, 4)
        if masks:  # whole pixels, inside
            boxes = boxes.round().clamp(min=0, max=63)
            boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = torch.randint(1, 3, (len(boxes),), generator=generator)
        scores = torch.rand(len(boxes), generator=generator)
        one = {"boxes": boxes, "labels": labels, "scores": scores}
        if masks:
            one["masks"] = torch.zeros(len(boxes), 1, 64, 80)
            for mask, (left, top, right, bottom) in zip(one["masks"], boxes.int().tolist(), strict=True):
                mask[0, top:bottom, left:right] = 1.0
        found.append(one)
        for at in range(len(boxes)):
            left, top, right, bottom = boxes[at].double().tolist()
            entry = {"image_id": image + 1, "category_id": int(labels[at]), "score": float(scores[at])}
            entry["bbox"] = [left, top, right - left, bottom - top]
            if masks:
                entry["segmentation"] = coder.encode(one["masks"][at, 0].byte().numpy().copy(order="F"))
            results.append(entry)

    ours = precision(Fixed(found), read, masks=masks)
    truth = COCO(str(file))

    def theirs(kind):
        judge = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), kind)
        judge.evaluate(), judge.accumulate(), judge.summarize()
        return judge.stats[:3] * 100

    expected = theirs("segm" if masks else "bbox")
    assert 1 < expected[0] < 99
    got = [ours.mask_map, ours.mask_map50, ours.mask_map75] if masks else [ours.map, ours.map50, ours.map75]
    assert got == pytest.approx(expected.tolist(), abs=1e-6 * 100)
    if masks:
        assert ours.box_map == pytest.approx(theirs("bbox")[0], abs=1e-6 * 100)


# --- runs


def test_a_run_that_is_stopped_continues_to_the_bit(tmp_path, monkeypatch):
    files.coco(tmp_path / "set")
    settings = config(tmp_path / "set", output=str(tmp_path), name="whole", checkpoint_interval=1)
    assert tiny.ends_alike(*tiny.stopped_and_resumed(settings, monkeypatch))


def test_a_resumed_run_needs_no_weights_to_start_from(tmp_path):
    """Its norms stay frozen, as they were since it began from trained weights."""
    import timm
    from safetensors.torch import save_file

    files.coco(tmp_path / "set")
    start = tmp_path / "start.safetensors"
    save_file(timm.create_model("resnet18").state_dict(), start)
    settings = config(tmp_path / "set", output=str(tmp_path), name="run", epochs=1, backbone_weights=str(start))
    before = train(settings, console=tiny.quiet())
    start.unlink()
    again = train(replace(settings, epochs=2), console=tiny.quiet(), resume="auto")
    names = load_checkpoint(again.path / "last").weights["model"].keys()
    assert not [name for name in names if "num_batches_tracked" in name]  # FrozenBatchNorm2d has none
    assert judge_run(before.path, device="cpu").main["val"] == again.test


def test_a_run_and_its_subnets_are_judged_and_reported(tmp_path, capsys):
    files.coco(tmp_path / "set")
    settings = config(tmp_path / "set", output=str(tmp_path), name="run", epochs=1, eval_subnets=1)
    train(settings, console=tiny.quiet())
    heads = (tmp_path / "run" / "summary.csv").read_text().splitlines()[0]
    assert heads == (
        "epoch,time,train_loss,eval_map,eval_map50,eval_map75,lr,subnets_map_mean,subnets_map_min,main_map_reestimated"
    )
    judged = judge_run(tmp_path / "run", subnets="1", device="cpu")
    assert [row.metric is not None for row in judged.subnets] == [True, True]
    assert judged.subnets[1].gmacs < judged.subnets[0].gmacs
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu", "--subnets", "1"]) == 0
    out = capsys.readouterr()
    assert "val mAP" in out.err + out.out
    assert "mAP %" in out.out
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")]) == 0
    assert "mAP, %" in (tmp_path / "page.html").read_text()
    for words in (["export", "--format", "onnx"], ["export", "--elastic"], ["predict", str(tmp_path / "set" / "val")]):
        command, *more = words
        assert main([command, str(tmp_path / "run"), *more, "--device", "cpu"]) == 2
        assert "this run is of task detection" in capsys.readouterr().err


def test_a_subnet_of_a_detector_leaves_as_an_ordinary_detector(tmp_path):
    files.coco(tmp_path / "set")
    settings = config(tmp_path / "set", output=str(tmp_path), name="run", epochs=1, model="fcos")
    train(settings, console=tiny.quiet())
    written = export_run(tmp_path / "run", depths="2,1,2,1", recalibrate=4, device="cpu")
    small = unloaf.load_subnet(written.folder)
    assert type(small).__module__.startswith("torchvision.")
    assert small.class_names == ("red", "green")
    assert [len(getattr(small.backbone.body, f"layer{at}")) for at in (1, 2, 3, 4)] == [2, 1, 2, 1]
    card = (written.folder / "README.md").read_text()
    assert "- object-detection" in card
    assert "| subnet | val mAP | val AP50 | val AP75 | parameters | GMACs |" in card
    # By hand: blocks away from the network of the checkpoint, with the statistics of the small one.
    whole = build_detector("fcos", backbone="timm/resnet18", num_classes=2, img_size=48, longest=80,
                           mean=IMAGENET_MEAN, std=IMAGENET_STD)[0]  # fmt: skip
    whole.load_state_dict(load_checkpoint(tmp_path / "run" / "last").weights["model"])
    for at in (2, 4):
        del getattr(whole.backbone.body, f"layer{at}")[1]
    statistics = {name: value for name, value in small.state_dict().items() if "running" in name}
    whole.load_state_dict({**whole.state_dict(), **statistics})
    images = [torch.rand(3, 60, 80)]
    with torch.no_grad():
        assert tiny.same(small.eval()(images), whole.eval()(images))


def test_runs_of_two_tasks_are_not_compared(tmp_path, capsys):
    for name, task in (("a", "classification"), ("b", "detection")):
        (tmp_path / name).mkdir()
        text = (
            "task: detection\ndataset: coco\ndata_dir: x\nmodel: fcos\nmethod: common\n" if task == "detection" else ""
        )
        (tmp_path / name / "args.yaml").write_text(text or "task: classification\n")
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "p.html")]) == 2
    assert "of several tasks, whose figures cannot be compared" in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


def test_detectors_are_trained_with_one_image_a_batch(tmp_path):
    files.coco(tmp_path)
    training = prepare(config(tmp_path, batch_size=1))
    assert train_step(training, next(training.batches.epoch(1))).made
    with pytest.raises(ValueError, match="batch_size 1: give at least 2; batch norm has no statistics"):
        Config(batch_size=1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "st"}, "has no logits of classes that it could teach; give --method common or st-star"),
        ({"mixup": 0.2, "smoothing": 0.1}, "--mixup, --smoothing: without effect in task detection; leave it out"),
        ({"dataset": "imagefolder"}, "task detection reads coco and voc"),
        ({"task": "instance", "dataset": "voc"}, "task instance reads coco"),
        ({"pretrained": True, "backbone_weights": "x"}, "both say how the backbone begins"),
        (
            {"task": "classification"},
            "--backbone: without effect in task classification|has boxes, no classes of images",
        ),
    ],
)
def test_settings_that_do_not_go_with_the_task_are_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **settings)


def test_a_task_alone_is_told_all_that_it_needs():
    with pytest.raises(
        ValueError, match=r"reads coco and voc; model .* give --model; method st: .* give --method common"
    ):
        Config(task="detection")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"model": "cifar/resnet20"},
            "task detection trains faster-rcnn, cascade-rcnn, fcos, atss, retinanet; give --model",
        ),
        ({"model": "mask-rcnn"}, "task detection trains faster-rcnn, cascade-rcnn, fcos, atss, retinanet"),
        ({"backbone": "timm/nothing"}, "nothing"),
        ({"backbone": "cifar/resnet20"}, "give a network of timm"),
        ({"backbone": "timm/vit_tiny_patch16_224"}, "a pyramid needs"),
        ({"backbone_weights": "nowhere"}, "nowhere"),
    ],
)
def test_models_that_do_not_go_with_the_task_are_refused(tmp_path, settings, said):
    files.coco(tmp_path)
    with pytest.raises(ValueError, match=said):
        prepare(config(tmp_path, **settings))


# --- backbones


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "regnety_002"])
def test_a_backbone_starts_from_a_classifier(tmp_path, name):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(1)
    whole, x = timm.create_model(name, num_classes=7).eval(), torch.rand(1, 3, 64, 64)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    body, lines = build_body(f"timm/{name}", weights=str(tmp_path / "model.safetensors"), pretrained=False)
    assert re.match(r"backbone_weights .*: loaded \d+ of \d+ tensors", lines[0])
    expected = whole.forward_intermediates(x, intermediates_only=True, norm=False)[-1]
    assert torch.equal(body.eval()(x)[-1], expected)


def test_an_exported_subnet_is_a_backbone(tmp_path):
    """As timm's own functions write and read it; the whole network has two blocks in each stage."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(1)
    subnet, x = timm.create_model("resnet18", layers=(2, 1, 2, 1), num_classes=7).eval(), torch.rand(1, 3, 64, 64)
    described = {"pretrained_cfg": {"tag": "unloaf"}}
    arguments = {"layers": [2, 1, 2, 1], "num_classes": 7}
    save_for_hf(subnet, tmp_path, model_config=described, model_args=arguments, safe_serialization=True)
    body, lines = build_body(str(tmp_path), weights=None, pretrained=False)
    assert torch.equal(body.eval()(x)[-1], subnet.forward_features(x))
    assert lines == (f"backbone {tmp_path}: its network and its weights",)
    again, _ = build_body("timm/resnet18", weights=None, pretrained=False, arguments={"layers": [2, 1, 2, 1]})
    again.load_state_dict(body.state_dict())
    assert described_backbone(str(tmp_path)) == ("timm/resnet18", {"layers": [2, 1, 2, 1]})
    with pytest.raises(ValueError, match="give no others beside it"):
        build_body(str(tmp_path), weights="other.safetensors", pretrained=False)


def test_weights_of_another_network_are_refused(tmp_path):
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"backbone_weights .*missing there"):
        build_body("timm/resnet18", weights=str(tmp_path / "model.safetensors"), pretrained=False)


def test_frozen_norms_compute_what_they_computed_in_evaluation():
    import timm

    torch.manual_seed(0)
    body, x = timm.create_model("resnet18", features_only=True), torch.rand(2, 3, 64, 64)
    body(x)  # statistics of its own
    expected = body.eval()(x)[-1]
    assert freeze_norms(body) == 20
    body.train()
    assert torch.allclose(body(x)[-1], expected, atol=1e-5)
    assert not [name for name, _ in body.named_parameters() if "bn" in name]
