"""A subnet as the libraries of its architecture build it: timm from a keyword, transformers from its configuration."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unloaf.export import block_counts, without_stand_ins
from unloaf.files.writing import write_whole
from unloaf.models.hf import transformers_config
from unloaf.models.offline import offline

Comparison = Callable[[nn.Module], Any]  # raises if the network that it is given is another


def built_by_timm(
    network: nn.Module, kinds: set[type[nn.Module]], name: str, arguments: Mapping[str, Any], same: Comparison
) -> tuple[nn.Module, dict[str, Any]]:
    """The same network built by timm alone: its keywords for depths are tried, and the result is compared.

    From what `export_subnet` returned, the classes of its blocks, the architecture's name and further arguments of
    ``timm.create_model`` to timm's network with these weights, in eval mode, and the keyword with the depths.

    Raises:
        ValueError: no keyword gives this network; the message has the reason for each.

    >>> import timm, unloaf
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=3).eval()
    >>> stages = unloaf.find_stages(model, torch.zeros(1, 3, 32, 32))
    >>> small = unloaf.export_subnet(model, stages, unloaf.Subnet.from_depths(stages, (2,)))
    >>> settings = {"img_size": 32, "embed_dim": 24, "num_heads": 3}
    >>> built_by_timm(small, {type(model.blocks[0])}, "vit_tiny_patch16_224", settings, lambda rebuilt: None)[1]
    {'depth': 2}
    """
    import timm

    dense = without_stand_ins(network, kinds)
    counts = block_counts(dense, kinds)
    single = counts[0] if len(counts) == 1 else counts
    reasons = []
    for keyword, depths in {"layers": counts, "depths": counts, "depth": single}.items():
        try:
            with torch.random.fork_rng(devices=[]), quiet(), offline():
                rebuilt: nn.Module = timm.create_model(name, **{**arguments, keyword: depths}).eval()
            rebuilt.load_state_dict(dense.state_dict())
            same(rebuilt)
            return rebuilt, {keyword: depths}
        except Exception as error:  # whatever a constructor that is not made for it raises
            reasons.append(f"{keyword}={depths}: {' '.join(str(error).split())[:80]}")
    raise ValueError(
        f"timm's {name} cannot be built with these blocks alone ({'; '.join(reasons)}); take --format state_dict"
    )


def describe_for_transformers(folder: Path, network: Any, same: Comparison, *, class_names: Sequence[str] = ()) -> bool:
    """Writes config.json beside model.safetensors, so that ``from_pretrained`` loads the folder, if it does.

    Class names are left out where two are the same, which transformers cannot hold. Returns whether from_pretrained
    gave the same network; if not, no file is left.
    """
    file = folder / "config.json"
    entries = transformers_config(network)
    if class_names and len(set(class_names)) == len(class_names):
        entries["id2label"] = {str(number): name for number, name in enumerate(class_names)}
        entries["label2id"] = {name: number for number, name in enumerate(class_names)}
    write_whole(file, json.dumps(entries, indent=2) + "\n")
    try:
        with torch.random.fork_rng(devices=[]), quiet(), offline():
            again, report = type(network).from_pretrained(folder, output_loading_info=True, local_files_only=True)
        same(aligned(again))
        complete = not any(report.values())
    except Exception:  # whatever a configuration that cannot describe the subnet leads to
        complete = False
    if not complete:
        file.unlink()
    return complete


def describe_images_for_transformers(folder: Path, preprocessing: Mapping[str, Any]) -> None:
    """Writes preprocessor_config.json, from which transformers' AutoImageProcessor makes this network's inputs."""
    channels, height, width = preprocessing["input_size"]
    entries = {
        "image_processor_type": "BitImageProcessor",  # resizes the shorter side, cuts out the centre, normalises
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": int(height / preprocessing["crop_pct"])},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocessing["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocessing["mean"],
        "image_std": preprocessing["std"],
    }
    write_whole(folder / "preprocessor_config.json", json.dumps(entries, indent=2) + "\n")


def aligned(network: nn.Module) -> nn.Module:
    """A copy in eval mode with weights in memory of its own.

    from_pretrained maps the file, and a tensor at an address that is no multiple of 64 can make a convolution add in
    another order (torch 2.15, CPU): the same weights, logits that differ in the last bit.
    """
    return copy.deepcopy(network).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and progress that exporters, timm and transformers print."""
    loggers = [logging.getLogger(name) for name in ("timm", "torch.onnx", "onnxscript", "onnx_ir", "transformers")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
