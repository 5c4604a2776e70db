"""Detectors and what goes wrong: losses that are no numbers, several processes, images that cannot be read."""

import pytest
import torch

import annotated_files as files
from unloaf.config import Config
from unloaf.data.annotated.batches import AnnotatedEvalBatches
from unloaf.data.annotated_sets import load_annotated
from unloaf.engine.loop import prepare, train_epoch
from unloaf.errors import NonFiniteLossError
from unloaf.tasks import detection


def config(folder, **settings):
    usual = {"task": "detection", "dataset": "coco", "data_dir": str(folder), "model": "retinanet", "device": "cpu"}
    usual |= {"backbone": "timm/resnet18", "method": "st-star", "img_size": 48, "batch_size": 2, "epochs": 1}
    return Config(**usual | {"opt": "adamw", "lr": 1e-4, "log_interval": 1} | settings)


@pytest.mark.parametrize(
    ("method", "call", "term", "rule"),
    [("common", 2, "main", "stop"), ("st-star", 3, "main", "skip"), ("st-star", 4, "subnet0", "stop")],
)
def test_a_step_whose_loss_is_no_number_is_not_made(tmp_path, monkeypatch, method, call, term, rule):
    files.write_coco(tmp_path, "train", files.drawn(4, 0))
    measured, calls = detection.losses, 0

    def spoil(model, batch):
        nonlocal calls
        calls += 1
        found = dict(measured(model, batch))
        return found | {"classification": found["classification"] * (float("nan") if calls == call else 1)}

    monkeypatch.setattr(detection, "losses", spoil)
    training = prepare(config(tmp_path, method=method, on_nan=rule, val_fraction=0.0))
    rows = []
    if rule == "stop":
        with pytest.raises(NonFiniteLossError, match=f"{term} is not finite in step 2 "):
            train_epoch(training, on_step=rows.append)
    else:
        train_epoch(training, on_step=rows.append)
    assert [row.made for row in rows] == ([True] if rule == "stop" else [True, False])
    assert training.position.updates == 1
    assert all(bool(torch.isfinite(weight).all()) for weight in training.model.parameters())


# --- several processes


class Found(torch.nn.Module):
    """Finds in each image a number of boxes that depends on the image, from none to four."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return [self.found(image) for image in images]

    def found(self, image):
        generator = torch.Generator().manual_seed(int(image.sum() * 100))
        count = int(torch.randint(0, 5, (1,), generator=generator))
        coloured = image.sum(0).nonzero()
        corners = (
            torch.cat([coloured.amin(0).flip(0), coloured.amax(0).flip(0) + 1]) if len(coloured) else torch.ones(4)
        )
        boxes = corners.float().repeat(count, 1) + torch.rand(count, 4, generator=generator) * 4
        boxes[:, 2:] += 1
        labels = torch.randint(1, 3, (count,), generator=generator)
        masks = torch.zeros(count, 1, *image.shape[-2:])
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[0, top:bottom, left:right] = 1
        scores = torch.full((count,), 0.5)  # ties: the order of the images decides
        return {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
@pytest.mark.parametrize("world", [2, 3])
def test_precision_of_several_processes_is_that_of_one(tmp_path, monkeypatch, masks, world):
    """7 images, so that one of the processes has fewer than the first; their exchange is played one after another."""
    from types import SimpleNamespace

    files.write_coco(tmp_path, "train", [[(1 + at % 2, [at, 2 * at, 20 + at, 15])] for at in range(6)] + [[]])
    kind = {"task": "instance", "model": "mask-rcnn"} if masks else {}
    settings = config(tmp_path, method="common", val_fraction=0.0, **kind)
    data = load_annotated(settings, masks=masks)

    def judged(rank, world):
        place = {"device": torch.device("cpu"), "rank": rank, "world": world}
        batches = AnnotatedEvalBatches(data.train, data, settings, masks=masks, **place)
        return detection.precision(Found(), batches, masks=masks)

    alone, seen = judged(0, 1), []

    def exchange(states, own):
        seen.append(own)
        states[:] = ([None] * world + seen[::-1])[-world:] if len(seen) == world else [own] * world

    played = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: world,
        all_gather_object=exchange,
    )  # fmt: skip
    monkeypatch.setattr(detection, "dist", played)
    last = [judged(rank, world) for rank in reversed(range(world))][-1]
    assert last == alone
    assert 1 < detection.Detection.figures.decide(alone) < 99 if not masks else 1 < alone.mask_map < 99
