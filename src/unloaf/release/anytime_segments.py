"""A cascade as ONNX: a file for each exit, which computes what earlier ones have not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from unloaf.anytime import Anytime
from unloaf.files.writing import new_folder, write_whole
from unloaf.passes.segments import Segment
from unloaf.release.formats import add_description, check_format, quiet, refusals
from unloaf.runs.opened import OpenedRun

_ROUNDING = 1e-5  # of the largest logit, as for whole networks
_COMPARED = ((1, 1), (5, 2))  # images and seed


def export_segments(anytime: Anytime, opened: OpenedRun, place: Path) -> None:
    """Writes ``exit-0.onnx``, ... and ``anytime.json`` into a new folder, whole or not at all.

    The JSON lists for each exit its file, what it takes (images, or what earlier exits made, by name), what it makes
    beside the logits, and along which axis of that the images lie; and the thresholds, by which confidence.

    Raises:
        ValueError: a package is missing, the folder exists, the exporter refuses the network, or the files do not give
            the logits of the exits.
    """
    check_format("onnx")
    anytime.cpu()
    example = opened.noise(2, 0)
    need = len(anytime.subnets) * sum(tensor.nbytes for tensor in anytime.state_dict().values())
    with new_folder(place, need=need) as folder:
        segments = [anytime.segment(index, example) for index in range(len(anytime.subnets))]
        described = []
        for index, segment in enumerate(segments):
            file = folder / f"exit-{index}.onnx"
            _write(segment, file, opened)
            entry = {"file": file.name, "subnet": str(anytime.subnets[index]), "takes": segment.takes}
            described.append(entry | {"makes": segment.makes, "axes": segment.axes})
        worst = max(_difference(anytime, opened, folder, segments, batch, seed) for batch, seed in _COMPARED)
        if not worst <= _ROUNDING:
            raise ValueError(
                f"format onnx: the logits that came back differ by {worst:.1e} of the largest; take --format state_dict"
            )
        fields = {
            "kind": "unloaf cascade",
            "exits": described,
            "thresholds": anytime.thresholds,
            "confidence": anytime.confidence,
            "class_names": opened.class_names,
            "preprocessing": opened.preprocessing,
        }
        write_whole(folder / "anytime.json", json.dumps(fields, indent=2) + "\n")


def _write(segment: Segment, file: Path, opened: OpenedRun) -> None:
    batch = torch.export.Dim("batch")
    made = segment.examples
    shapes = tuple({axis: batch} for axis in segment.taken_axes)
    with refusals("the ONNX exporter"), quiet(), torch.no_grad():
        torch.onnx.export(
            segment,
            made,
            file,
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=segment.takes,
            output_names=["logits", *segment.makes],
            external_data=False,
            verbose=False,
        )
        add_description(file, opened)


def _difference(
    anytime: Anytime, opened: OpenedRun, folder: Path, segments: list[Segment], batch: int, seed: int
) -> float:
    """The largest difference of an exit's logits, relative to the largest logit if that is above 1."""
    import onnxruntime

    x = opened.noise(batch, seed)
    held, worst = {"images": x.numpy()}, 0.0
    for index, expected in enumerate(anytime.all_exits(x)):
        session = onnxruntime.InferenceSession(folder / f"exit-{index}.onnx", providers=["CPUExecutionProvider"])
        segment = segments[index]
        logits, *made = session.run(None, {name: held[name] for name in segment.takes})
        held |= dict(zip(segment.makes, made, strict=True))
        scale = max(1.0, float(expected.abs().max()))
        worst = max(worst, float(np.abs(np.asarray(logits) - expected.numpy()).max()) / scale)
    return worst
