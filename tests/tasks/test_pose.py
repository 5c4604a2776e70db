"""Pose: the network, heatmaps, gradients of every method, OKS and PCK, and runs that are resumed."""

import contextlib
import copy
import io
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import people_files as files
import tiny
import unloaf
from annotated_files import changed as rewritten
from unloaf.commands.main import main
from unloaf.config import Config
from unloaf.data.annotated_sets import load_people
from unloaf.data.people.batches import PeopleEvalBatches
from unloaf.engine.checkpoint import load_checkpoint
from unloaf.engine.loop import prepare, train_epoch, train_step
from unloaf.engine.run import train
from unloaf.errors import NonFiniteLossError
from unloaf.inputs import SmallerInputs
from unloaf.models.pose import build_pose
from unloaf.release.exports import export_run
from unloaf.runs.judge import judge_run
from unloaf.tasks import pose
from unloaf.tasks.heatmaps import gaussian_heatmaps, heatmap_loss, joint_loss, points_of
from unloaf.tasks.pose import Pose, SmallerPeople, pose_scores

SMALL = "timm/mobilenetv3_small_050"  # for runs, whose checkpoints take most of the time
CPU = torch.device("cpu")


def config(folder, **settings):
    usual = {"task": "pose", "dataset": "coco", "data_dir": str(folder), "model": "simple-baseline", "device": "cpu"}
    usual |= {"backbone": SMALL, "method": "st-star", "img_size": 64, "batch_size": 4, "epochs": 1}
    usual |= {"opt": "adamw", "lr": 1e-3, "log_interval": 1, "recalibrate": 4}
    return Config(**usual | settings)


def network(joints=5, **settings):
    torch.manual_seed(0)
    narrow = {"backbone_kwargs": {"channels": [16, 16, 32, 32]}}
    model = build_pose("simple-baseline", backbone="timm/resnet18", num_classes=joints, **narrow | settings)[0]
    for name, weight in model.named_parameters():
        if name.endswith("bn2.weight"):  # zero in timm, which makes every subnet the main network
            nn.init.uniform_(weight, 0.5, 1)
        elif name.startswith(("head.0", "head.3", "head.6", "classifier.weight")):  # near zero
            nn.init.normal_(weight, std=0.05)
    return model


def batch(dtype=torch.float64):
    """Two crops of 64 x 48 pixels, one joint without a mark."""
    generator = torch.Generator().manual_seed(1)
    joints = torch.rand(2, 5, 3, generator=generator, dtype=torch.float64) * torch.tensor([48.0, 64, 0]).double()
    joints[..., 2] = 1
    joints[1, 3] = 0
    return torch.rand(2, 3, 64, 48, generator=generator, dtype=dtype), joints.to(dtype)


@pytest.fixture
def narrow(monkeypatch):
    """A head of 32 channels: most of the time and of the bytes of a checkpoint are the head's."""
    monkeypatch.setattr("unloaf.models.pose._CHANNELS", 32)


# --- the network


def test_heatmaps_are_those_of_the_paper_written_out():
    """Xiao et al. 2018: three 4x4 deconvolutions of stride 2 with batch norm and ReLU, and a 1x1 convolution."""
    model = network().double().eval()
    x, weights = torch.rand(1, 3, 64, 96, dtype=torch.float64), dict(network().double().named_parameters())
    level = model.body(x)[-1]
    assert level.shape == (1, 32, 2, 3)
    for at in (0, 3, 6):
        level = F.conv_transpose2d(level, weights[f"head.{at}.weight"], stride=2, padding=1)
        assert level.shape[1] == 256
        norm = weights[f"head.{at + 1}.weight"], weights[f"head.{at + 1}.bias"]
        level = F.relu(F.batch_norm(level, torch.zeros(256).double(), torch.ones(256).double(), *norm))
    expected = F.conv2d(level, weights["classifier.weight"], weights["classifier.bias"])
    assert expected.shape == (1, 5, 16, 24)
    assert torch.allclose(model(x), expected, atol=1e-12)


def test_any_side_is_padded_to_a_multiple_of_32_and_cut_again():
    model = network().double().eval()
    x = torch.rand(1, 3, 48, 36, dtype=torch.float64)
    padded = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    padded[:, :, :48, :36] = x
    assert torch.equal(model(x), model(padded)[:, :, :12, :9])


@pytest.mark.parametrize("backbone", ["timm/convnext_atto", "timm/swin_tiny_patch4_window7_224"])
def test_other_backbones_have_heatmaps_at_a_quarter_of_the_side(backbone):
    kwargs = {"img_size": 64, "window_size": 2, "depths": [1, 1, 1, 1]} if "swin" in backbone else {}
    model, _ = build_pose("simple-baseline", backbone=backbone, num_classes=3, backbone_kwargs=kwargs)
    with torch.no_grad():
        assert model.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 3, 16, 16)


# --- heatmaps


def test_gaussians_are_those_of_the_formula():
    """Cell by cell: exp(-d^2 / 2 s^2), s of 2 cells in 64 and of one below 32; their middles are 4 pixels apart."""
    joints = torch.tensor([[[30.0, 50.5, 1], [100.0, 7.0, 1]]], dtype=torch.float64)
    for height, width, spread in ((64, 48, 2.0), (96, 72, 3.0), (24, 18, 1.0)):
        found = gaussian_heatmaps(joints, (height, width))[0]
        for joint, (x, y, _) in enumerate(joints[0].tolist()):
            for row, column in ((0, 0), (12, 7), (5, height // 4), (height - 1, width - 1)):
                far = (column + 0.5 - x / 4) ** 2 + (row + 0.5 - y / 4) ** 2
                assert float(found[joint, row, column]) == pytest.approx(math.exp(-far / (2 * spread**2)), abs=1e-12)


def test_joints_without_a_mark_have_no_loss_and_no_gradient():
    """By hand: the mean over all cells of all joints, those of unmarked ones as 0."""
    joints = batch()[1]
    heatmaps = torch.rand(2, 5, 16, 12, dtype=torch.float64, requires_grad=True)
    loss = heatmap_loss(heatmaps, joints)
    wanted, total = gaussian_heatmaps(joints, (16, 12)), 0.0
    for at in range(2):
        for joint in range(5):
            if (at, joint) != (1, 3):
                total += float((heatmaps[at, joint] - wanted[at, joint]).detach().pow(2).sum())
    assert loss.item() == pytest.approx(total / (2 * 5 * 16 * 12), rel=1e-12)
    loss.backward()
    empty = heatmaps.grad.abs().sum((2, 3)) == 0
    assert empty.nonzero().tolist() == [[1, 3]]


def slow_points(heatmap):
    """Xiao et al. 2018: the highest cell, a quarter of a cell towards the higher neighbour in each direction."""
    height, width = heatmap.shape
    row, column = divmod(int(heatmap.argmax()), width)
    x, y = column + 0.5, row + 0.5
    if 0 < column < width - 1:
        x += 0.25 * np.sign(heatmap[row, column + 1] - heatmap[row, column - 1])
    if 0 < row < height - 1:
        y += 0.25 * np.sign(heatmap[row + 1, column] - heatmap[row - 1, column])
    return 4 * x, 4 * y, heatmap.max()


def test_points_are_those_of_a_slow_reference():
    heatmaps = torch.rand(30, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    points, highest = points_of(heatmaps)
    for heatmap, point, value in zip(heatmaps.flatten(0, 1), points.flatten(0, 1), highest.flatten(), strict=True):
        assert [*point.tolist(), float(value)] == pytest.approx(slow_points(heatmap.numpy()), abs=1e-6)


def test_the_points_of_gaussians_are_within_a_quarter_of_a_cell():
    joints = torch.rand(1, 200, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([172.0, 236]) + 10
    points, _ = points_of(gaussian_heatmaps(joints, (64, 48)))
    assert float((points - joints).abs().max()) <= 1.0 + 1e-4


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
    stages = unloaf.find_stages(model, torch.zeros(1, 3, 64, 48, dtype=torch.float64), within="body")
    return stages, [unloaf.Subnet.from_depths(stages, depths) for depths in ((2, 2, 1, 2), (1, 2, 2, 1))]


def shrunk(x, joints, side):
    """By hand: x and y by the same share as the sides."""
    smaller = F.interpolate(x, size=(side * 4 // 3, side), mode="bilinear")
    return smaller, joints * torch.tensor([side / 48, side / 48, 1.0], dtype=joints.dtype)


@pytest.mark.parametrize("sides", [(48, 48), (36, 36), (36, 24)], ids=["same crops", "smaller crops", "a side each"])
@pytest.mark.usefixtures("narrow")
def test_gradients_of_st_star_are_those_of_separate_passes(sides):
    model = network().double().train()
    stages, subnets = two_subnets(model)
    x, joints = batch()
    drawn = iter(sides)

    def shrink(given, generator):
        return SmallerPeople(SmallerInputs(sides=(next(drawn),)))(given, generator)

    slow = copy.deepcopy(model)
    passes = [(unloaf.Subnet.full(stages), (x, joints))]
    passes += [(subnet, shrunk(x, joints, side)) for subnet, side in zip(subnets, sides, strict=True)]
    for subnet, (crops, points) in passes:
        with unloaf.active_subnet(slow, stages, subnet):
            found = slow(crops)
        wanted = gaussian_heatmaps(points, found.shape[-2:])
        ((found - wanted).square() * points[..., 2][..., None, None]).mean().backward()

    method = unloaf.GroundTruthTraining(
        model, stages, joint_loss, num_subnets=2, shrink=None if sides == (48, 48) else shrink
    )
    method.backward((x, joints), subnets=subnets)
    same_gradients(model, slow)


@pytest.mark.parametrize("side", [48, 36], ids=["same crops", "smaller crops"])
@pytest.mark.parametrize("name", ["st", "st++"])
@pytest.mark.usefixtures("narrow")
def test_gradients_of_st_are_those_of_separate_passes(name, side):
    """A subnet's heatmaps, at the main network's size, are drawn to the main network's, of all joints."""
    inputs = {"subnet_inputs": "same"} if side == 48 else {"subnet_inputs": "smaller", "sides": (side,)}
    settings = config("x", method=name, num_subnets=2, subnet_weight=0.5, **inputs)
    model = network().double().train()
    stages, subnets = two_subnets(model)
    method = Pose().method(settings, model, stages)
    x, joints = batch()
    slow = copy.deepcopy(model)
    main = slow(x)
    ((main - gaussian_heatmaps(joints, (16, 12))).square() * joints[..., 2][..., None, None]).mean().backward()
    for subnet in subnets:
        with unloaf.active_subnet(slow, stages, subnet):
            found = slow(shrunk(x, joints, side)[0])
        found = F.interpolate(found, size=(16, 12), mode="bilinear")
        (0.5 * (found - main.detach()).square().mean()).backward()
    method.backward(x, joints, subnets=subnets)
    same_gradients(model, slow)


def test_crops_and_joints_of_a_pass_have_one_drawn_side():
    x, joints = batch(dtype=torch.float32)
    smaller, seen = SmallerPeople(pose.smaller_crops(config("x", img_size=64))), set()
    for seed in range(40):
        crops, points = smaller((x, joints), torch.Generator().manual_seed(seed))
        height, width = crops.shape[-2:]
        assert torch.allclose(points, joints * torch.tensor([width / 48, height / 64, 1]))
        seen.add((height, width))
    assert seen == {(32, 24), (48, 36), (64, 48)}


@pytest.mark.parametrize("method", ["common", "st", "st++", "gkt", "stochastic-depth", "st-star"])
@pytest.mark.usefixtures("narrow")
def test_every_method_makes_a_step(tmp_path, method):
    files.people(tmp_path)
    training = prepare(config(tmp_path, method=method))
    before = tiny.weights(training.model)
    row = train_step(training, next(training.batches.epoch(1)))
    terms = {"common": 1, "st": 2, "st++": 7, "gkt": 7, "stochastic-depth": 1, "st-star": 2}
    assert (row.made, len(row.terms)) == (True, terms[method])
    assert not tiny.same(before, tiny.weights(training.model))


# --- figures


class Prepared(nn.Module):
    """Gives prepared heatmaps, crop by crop, in the order in which it is asked."""

    def __init__(self, heatmaps):
        super().__init__()
        self.weight, self.heatmaps, self.at = nn.Parameter(torch.zeros(1)), heatmaps, 0

    def forward(self, crops):
        found = self.heatmaps[self.at : self.at + len(crops)]
        self.at += len(crops)
        return found


def crowded(folder):
    """12 images: 18 people, joints without a mark, two groups and one person without any."""
    images = files.drawn(12, 5)
    for at, people in enumerate(images):
        people[0]["keypoints"][3 * (at % 5) + 2] = at % 3
        people[0]["area"] = 900.0 + 1200 * at  # medium and large
    images[1].append(files.person(90, 2, [50, 10, 30, 40], iscrowd=1))
    images[4].append(files.person(91, 5, [3, 10, 30, 40], iscrowd=1, marks=(0,) * 5))
    images[5].append(files.person(92, 6, [50, 10, 30, 40], marks=(0,) * 5))
    return files.write(folder, "train", images)


def predicted(folder):
    """Heatmaps near the truth, some joints far off, and what reads them."""
    settings = config(folder, val_fraction=0.0, img_size=128, hflip=0.0)
    data, generator = load_people(settings), torch.Generator().manual_seed(3)
    heatmaps = []
    for _, people in PeopleEvalBatches(data.train, data, settings, device=CPU):
        for at, judged in enumerate(people):
            noise = torch.randn(5, 2, generator=generator) * (1 + 3 * at)
            noise[judged.person.number % 5] *= 8
            wanted = judged.joints[:, :2] + noise
            height = torch.rand(5, 1, 1, generator=generator) + 0.5
            heatmaps.append(height * gaussian_heatmaps(wanted[None], (32, 24))[0])
    read = PeopleEvalBatches(data.train, data, settings, device=CPU)
    return torch.stack(heatmaps), read, data


def by_pycocotools(file, entries, names):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        judge = COCOeval(truth, truth.loadRes(entries), "keypoints")
        judge.params.kpt_oks_sigmas = np.array(names)
        judge.evaluate(), judge.accumulate(), judge.summarize()
    return judge.stats * 100


def test_figures_are_those_of_pycocotools_and_of_loops(tmp_path):
    """On the set's own JSON, with groups, people without a mark and several people in an image."""
    file = crowded(tmp_path)
    heatmaps, read, data = predicted(tmp_path)
    found = pose_scores(Prepared(heatmaps), read, data.class_names)

    entries, near, total = [], np.zeros(2), 0
    annotations = json.loads(file.read_text())["annotations"]
    targets = [one for one in annotations if not one["iscrowd"] and one["num_keypoints"]]
    for one, heatmap in zip(targets, heatmaps.numpy(), strict=True):
        left, top, width, height = one["bbox"]  # by hand: to 3 : 4, and 1.25 times, into 96 x 128 pixels
        tall = 1.25 * max(height, width * 4 / 3)
        points = [slow_points(joint) for joint in heatmap]
        places = [
            (left + width / 2 + (x - 48) * tall / 128, top + height / 2 + (y - 64) * tall / 128) for x, y, _ in points
        ]
        score = float(np.mean([value for *_, value in points]))
        joints = [number for x, y in places for number in (float(x), float(y), 1)]
        entries.append({"image_id": one["image_id"], "category_id": 1, "keypoints": joints, "score": score})
        marked = np.array(one["keypoints"]).reshape(5, 3)
        ends = marked[[1, 4]] if min(marked[[1, 4], 2]) > 0 else marked[[2, 3]]
        torso = np.hypot(*(ends[0] - ends[1])[:2])
        for (x, y), (truth_x, truth_y, mark) in zip(places, marked, strict=True):
            if mark:
                far, total = np.hypot(x - truth_x, y - truth_y), total + 1
                near += [far <= 0.2 * torso, far <= 0.5 * torso]

    expected = by_pycocotools(file, entries, [0.026, 0.079, 0.079, 0.107, 0.107])
    assert 20 < expected[0] < 90
    assert [found.ap, found.ap50, found.ap75, found.ar] == pytest.approx(expected[[0, 1, 2, 5]].tolist(), abs=1e-6)
    assert [found.pck20, found.pck50] == pytest.approx((100 * near / total).tolist(), abs=1e-6)
    assert 20 < found.pck20 < found.pck50 < 100


def test_the_loss_is_the_mean_over_all_joints_of_all_people(tmp_path):
    crowded(tmp_path)
    heatmaps, read, data = predicted(tmp_path)
    joints = torch.stack([one.joints for _, people in read for one in people])
    wanted = gaussian_heatmaps(joints, (32, 24))
    expected = ((heatmaps - wanted).square().mean((2, 3)) * joints[..., 2]).mean()
    found = pose_scores(Prepared(heatmaps), read, data.class_names)
    assert found.loss == pytest.approx(float(expected), rel=1e-6)


def test_figures_of_two_gloo_ranks_are_those_of_one(tmp_path):
    """18 people over batches of 4: both ranks have nine, in batches whose last one is part filled."""
    import torch.distributed as dist

    crowded(tmp_path)
    heatmaps, read, data = predicted(tmp_path)
    alone = pose_scores(Prepared(heatmaps), read, data.class_names)

    def rank(number):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=number, world_size=2)
        settings = config(tmp_path, val_fraction=0.0, img_size=128, hflip=0.0)
        mine = PeopleEvalBatches(data.train, data, settings, device=CPU, rank=number, world=2)

        def add(sums):
            dist.all_reduce(sums)
            return sums

        found = pose_scores(Prepared(heatmaps[number::2]), mine, data.class_names, reduce=add)
        (tmp_path / f"rank{number}").write_text(repr(found))
        dist.destroy_process_group()

    children = [tiny.fork(lambda number=number: rank(number), errors=tmp_path / f"errors{number}") for number in (0, 1)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], [file.read_text() for file in tmp_path.glob("errors*")]
    of_ranks = [(tmp_path / f"rank{number}").read_text() for number in (0, 1)]
    assert of_ranks[0] == of_ranks[1]
    exact, loss = repr(alone).split(", ")[1:], float(of_ranks[0].split(", ")[0].partition("=")[2])
    assert of_ranks[0].split(", ")[1:] == exact
    assert loss == pytest.approx(alone.loss, rel=1e-9)


def test_a_network_that_gives_nan_has_no_figures(tmp_path):
    crowded(tmp_path)
    heatmaps, read, data = predicted(tmp_path)
    heatmaps[3, 2, 5, 5] = float("nan")
    found = pose_scores(Prepared(heatmaps), read, data.class_names)
    assert np.isnan([getattr(found, name) for name in ("loss", "ap", "ap50", "ap75", "ar", "pck20", "pck50")]).all()


# --- runs


@pytest.mark.usefixtures("narrow")
def test_a_run_that_is_stopped_continues_to_the_bit(tmp_path, monkeypatch):
    files.people(tmp_path / "set", train=4, val=1)
    settings = config(tmp_path / "set", output=str(tmp_path), name="run", checkpoint_interval=1, batch_size=2)
    assert tiny.ends_alike(*tiny.stopped_and_resumed(settings, monkeypatch))


@pytest.mark.usefixtures("narrow")
def test_the_same_seed_gives_the_same_run_whoever_reads_the_images(tmp_path):
    files.people(tmp_path / "set")
    ends = [
        train(config(tmp_path / "set", output=str(tmp_path), name=str(workers), workers=workers),
              console=tiny.quiet())
        for workers in (0, 2)
    ]  # fmt: skip
    assert tiny.ends_alike(*ends)


@pytest.mark.parametrize(("call", "term", "rule"), [(3, "main", "stop"), (3, "main", "skip"), (4, "subnet0", "stop")])
@pytest.mark.usefixtures("narrow")
def test_a_step_whose_loss_is_no_number_is_not_made(tmp_path, monkeypatch, call, term, rule):
    files.people(tmp_path)
    measured, calls = pose.joint_loss, 0

    def spoil(model, given):
        nonlocal calls
        calls += 1
        return measured(model, given) * (float("nan") if calls == call else 1)

    monkeypatch.setattr(pose, "joint_loss", spoil)
    training, rows = prepare(config(tmp_path, on_nan=rule)), []
    if rule == "stop":
        with pytest.raises(NonFiniteLossError, match=f"{term} is not finite in step 2 "):
            train_epoch(training, on_step=rows.append)
    else:
        train_epoch(training, on_step=rows.append)
    assert [row.made for row in rows] == ([True] if rule == "stop" else [True, False])
    assert training.position.updates == 1
    assert all(bool(torch.isfinite(weight).all()) for weight in training.model.parameters())


@pytest.mark.usefixtures("narrow")
def test_a_run_and_its_subnets_are_judged_and_reported(tmp_path, capsys):
    files.people(tmp_path / "set")
    train(config(tmp_path / "set", output=str(tmp_path), name="run", eval_subnets=1), console=tiny.quiet())
    heads = (tmp_path / "run" / "summary.csv").read_text().splitlines()[0]
    assert heads == (
        "epoch,time,train_loss,eval_loss,eval_ap,eval_ap50,eval_ap75,eval_ar,eval_pck20,eval_pck50,lr,subnets_ap_mean,"
        "subnets_ap_min,main_ap_reestimated"
    )
    judged = judge_run(tmp_path / "run", subnets="1", device="cpu")
    assert [(row.metric is not None, row.statistics) for row in judged.subnets] == [(True, "re-estimated")] * 2
    assert judged.subnets[1].gmacs < judged.subnets[0].gmacs
    run, page = str(tmp_path / "run"), str(tmp_path / "page.html")
    assert main(["eval", run, "--device", "cpu", "--subnets", "1"]) == 0
    out = capsys.readouterr()
    assert "val AP" in out.err + out.out
    assert main(["report", run, "--output", page]) == 0
    assert "AP, %" in (tmp_path / "page.html").read_text()
    for command, *more in (["export", "--elastic"], ["predict", str(tmp_path / "set" / "val")]):
        assert main([command, run, *more, "--device", "cpu"]) == 2
        assert "this run is of task pose" in capsys.readouterr().err
    # A subnet leaves as an ordinary network: that of the checkpoint, run without its blocks and with its statistics.
    written = export_run(tmp_path / "run", depths=str(judged.subnets[1].subnet).replace("-", ","), device="cpu")
    small, x = unloaf.load_subnet(written.folder), torch.rand(1, 3, 64, 48)
    whole = build_pose("simple-baseline", backbone=SMALL, num_classes=5)[0].eval()
    whole.load_state_dict(load_checkpoint(tmp_path / "run" / "last").weights["model"])
    stages = unloaf.find_stages(whole, x, within="body")
    statistics = {name: value for name, value in small.state_dict().items() if "running" in name}
    assert small.class_names == files.JOINTS
    assert "- keypoint-detection" in (written.folder / "README.md").read_text()
    with torch.no_grad(), unloaf.active_subnet(whole, stages, judged.subnets[1].subnet):
        named = {name: whole.get_buffer(name) for name in statistics if name in dict(whole.named_buffers())}
        for name, buffer in named.items():
            buffer.copy_(statistics[name])
        assert len(named) > 20
        assert torch.equal(small(x), whole(x))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mixup": 0.2, "smoothing": 0.1}, "--mixup, --smoothing: without effect in task pose; leave it out"),
        ({"method": "st", "subnet_loss": "kl-"}, "--subnet-loss: without effect in task pose"),
        ({"dataset": "voc"}, "task pose reads coco"),
        ({"model": "semantic-fpn"}, "task pose trains simple-baseline; give --model"),
        ({"img_size": 100}, "img_size 100: task pose takes heights that are multiples of 16"),
        ({"train_img_size": 90}, "train_img_size 90: task pose takes heights"),
        ({"sides": (36, 50)}, "sides 50: task pose takes widths up to that of its crops that are multiples of 12"),
        ({"sides": (60,)}, "sides 60: task pose takes widths up to"),
        ({"pretrained": True, "backbone_weights": "x"}, "both say how the backbone begins"),
    ],
)
def test_settings_that_do_not_go_with_the_task_are_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"backbone": "timm/vit_tiny_patch16_224"}, "a pyramid needs"),
        ({"num_classes": 17}, "num_classes 17: the set has 5; leave it out"),
        ({"train_split": "other"}, "expected annotations/person_keypoints_other.json"),
        ({"train_images": 10}, "give from 1 to 9"),
    ],
)
@pytest.mark.usefixtures("narrow")
def test_what_does_not_go_with_the_task_is_refused_before_the_first_step(tmp_path, settings, said):
    files.people(tmp_path)
    with pytest.raises(ValueError, match=said):
        prepare(config(tmp_path, **settings))


def test_a_wrong_annotation_ends_the_command_with_2(tmp_path, capsys):
    files.people(tmp_path / "set")
    rewritten(tmp_path / "set" / "person_keypoints_train.json", {"annotations": lambda entries: [
        entries[0] | {"keypoints": entries[0]["keypoints"][:-2]}, *entries[1:]]})  # fmt: skip
    words = ["train", "--task", "pose", "--dataset", "coco", "--data-dir", str(tmp_path / "set"), "--device", "cpu"]
    assert main([*words, "--model", "simple-baseline", "--method", "st-star", "--output", str(tmp_path / "out")]) == 2
    assert "annotation 1: keypoints has 13 numbers; give 15" in capsys.readouterr().err
