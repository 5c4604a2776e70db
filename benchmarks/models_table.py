"""The table of supported models, docs/models.md, from the golden lists in tests/golden.

    python benchmarks/models_table.py [--golden]

FLOPs and input sizes are those of the model as published (a golden list is of a narrow form of it, with all its
blocks); both are found on torch's meta device, which has shapes and no arithmetic. How an exported subnet is read back
is found by doing it. With --golden the lists themselves are written anew: look at every changed line,
tests/test_supported_models.py holds the published depths.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from safetensors.torch import save_file
from torch import nn

import unloaf
from unloaf.inputs import legal_sides
from unloaf.measure.costs import subnet_cost
from unloaf.models.build import build_model
from unloaf.models.hf import transformers_config
from unloaf.passes import logits_of
from unloaf.release.libraries import aligned, built_by_timm
from unloaf.release.subnet_files import save_subnet
from unloaf.stages import call_model

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
LIBRARIES = ("timm", "torchvision", "transformers")
CLASSES = 5
TOKENS = 8
VOCABULARY = 50
# Options that make a golden list's model narrow or its input small; the published model is built without them.
HF_KEPT = {"num_labels", "patch_size", "is_decoder"}


def golden(library: str) -> dict[str, dict[str, Any]]:
    """Name of the model -> its configuration, its input and its stages."""
    return json.loads((GOLDEN / f"{library}.json").read_text(encoding="utf-8"))


def build(library: str, name: str, entry: Mapping[str, Any], *, published: bool = False) -> nn.Module:
    """The model in the narrow form of the golden lists, or as published."""
    options = {} if published else dict(entry["options"])
    if library == "timm":
        return timm.create_model(name, num_classes=CLASSES, **options)
    if library == "torchvision":
        return torchvision.models.get_model(name, num_classes=CLASSES, **options)
    if published:
        options = {key: value for key, value in entry["options"].items() if key in HF_KEPT}
    config = getattr(transformers, f"{entry['model']}Config")(**options)
    return getattr(transformers, entry["class"])(config)


def example(entry: Mapping[str, Any], *, batch: int = 1) -> Any:
    """An input: images of the given side, or tokens, the last two of one text padding."""
    if entry["input"] != "tokens":
        side = entry["input"]
        return torch.randn(batch, 3, side, side)
    mask = torch.ones(batch, TOKENS, dtype=torch.long)
    mask[0, -2:] = 0
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, TOKENS)), "attention_mask": mask}


def listed(stages: Sequence[unloaf.Stage]) -> list[dict[str, Any]]:
    """Stages as the golden lists write them; ``s`` marks a block that can be skipped."""
    return [
        {"name": s.name, "blocks": list(s.blocks), "skippable": "".join("-s"[flag] for flag in s.skippable)}
        for s in stages
    ]


def stages_of(entry: Mapping[str, Any]) -> tuple[unloaf.Stage, ...]:
    """The golden stages as values, without what the lists do not say."""
    return tuple(
        unloaf.Stage(s["name"], tuple(s["blocks"]), tuple(flag == "s" for flag in s["skippable"]))
        for s in entry["stages"]
    )


def write_golden(library: str) -> None:
    """Find the stages of a library's models again."""
    entries = golden(library)
    for name, entry in entries.items():
        torch.manual_seed(0)
        entry["stages"] = listed(unloaf.find_stages(build(library, name, entry), example(entry)))
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    (GOLDEN / f"{library}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def published_input(library: str, name: str, model: nn.Module, entry: Mapping[str, Any]) -> Any:
    """An input of the size the published model is for, on the meta device."""
    if entry["input"] == "tokens":
        return {"input_ids": torch.zeros(1, 128, dtype=torch.long, device="meta")}
    if library == "timm":
        pretrained = timm.get_pretrained_cfg(name)
        assert pretrained is not None
        side = pretrained.input_size[-1]
    else:
        side = getattr(getattr(model, "config", None), "image_size", 224)
        side = side[-1] if isinstance(side, (tuple, list)) else side
    return torch.empty(1, 3, side, side, device="meta")


def sizes(model: nn.Module, x: Any) -> str:
    """Which sides the model takes, in words, by trying some up to its own."""
    if not isinstance(x, torch.Tensor):
        return "any length"
    side = x.shape[-1]
    if len(legal_sides(model, x, [side - 1, side - 15, side - 31])) == 3:
        return "any"
    for step in (2, 4, 8, 14, 16, 32, 64):
        tried = [s for s in (side // step * step - step, side // step * step - 3 * step) if s > 0]
        if side % step == 0 and tried and legal_sides(model, x, tried) == tried:
            return f"multiples of {step}"
    return f"{side} only"


class DiffersError(Exception):
    """What was read back is not what was written."""


def export_form(library: str, name: str, entry: Mapping[str, Any]) -> str:
    """By what two ordered subnets of the model are read back equal to the last bit: timm, transformers, JSON or "-"."""
    tries = {"timm": [_by_timm, _by_json], "torchvision": [_by_json], "transformers": [_by_transformers, _by_json]}
    for attempt in tries[library]:
        try:
            with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
                warnings.simplefilter("ignore")
                attempt(Path(folder), library, name, entry)
            return {_by_timm: "timm", _by_transformers: "transformers", _by_json: "JSON"}[attempt]
        except (DiffersError, ValueError, unloaf.CheckpointError):
            continue
    return "-"


def _by_timm(folder: Path, library: str, name: str, entry: Mapping[str, Any]) -> None:
    """timm.create_model with a keyword, and the file loaded strictly."""
    model = settled(build(library, name, entry))
    arguments = {"num_classes": CLASSES, **entry["options"]}
    for small, _, found, x in subnets_of(model, entry):
        kinds = {type(model.get_submodule(path)) for stage in found for path in stage.blocks}
        rebuilt, depths = built_by_timm(small, kinds, name, arguments, same=lambda _: None)
        save_file(rebuilt.state_dict(), folder / "model.safetensors")
        path = str(folder / "model.safetensors")
        _compare(small, timm.create_model(name, **arguments, **depths, checkpoint_path=path), x)


def _by_transformers(folder: Path, library: str, name: str, entry: Mapping[str, Any]) -> None:
    """save_pretrained and from_pretrained."""
    for number, (small, _, _, x) in enumerate(subnets_of(settled(build(library, name, entry)), entry)):
        small.save_pretrained(folder / str(number))
        again, report = type(small).from_pretrained(folder / str(number), output_loading_info=True)
        if any(report.values()):
            raise DiffersError(f"from_pretrained reports {report}")
        _compare(small, aligned(again), x)


def _by_json(folder: Path, library: str, name: str, entry: Mapping[str, Any]) -> None:
    """unloaf.load_subnet, which builds the model by its name: not narrow, except by a configuration."""
    architecture: dict[str, Any] = {"num_classes": CLASSES}
    if library == "transformers":
        model = build(library, name, entry)
        architecture |= {"name": f"hf/{type(model).__name__}", "config": transformers_config(model)}
    else:
        architecture["name"] = f"{'tv' if library == 'torchvision' else library}/{name}"
        architecture["img_size"] = entry["input"] if "img_size" in entry["options"] else None
        model = build_model(**architecture)
    side = 224 if "image_size" in entry["options"] and library == "torchvision" else entry["input"]
    for small, subnet, found, x in subnets_of(settled(model), {**entry, "input": side}):
        save_subnet(folder, small, architecture, found, subnet)
        _compare(small, unloaf.load_subnet(folder), x)


def subnets_of(
    model: nn.Module, entry: Mapping[str, Any]
) -> Iterator[tuple[Any, unloaf.Subnet, tuple[unloaf.Stage, ...], Any]]:
    """The smallest ordered subnet and one of middle depths: exported, which it is, the stages and an input."""
    x = example(entry, batch=2)
    found = tuple(unloaf.find_stages(model, x))
    depths = [stage.legal_depths for stage in found]
    for chosen in ([min(legal) for legal in depths], [legal[len(legal) // 2] for legal in depths]):
        subnet = unloaf.Subnet.from_depths(found, chosen)
        yield unloaf.export_subnet(model, found, subnet, example=x), subnet, found, x


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, without the zeros of fresh models: a norm or scale of zero hides the block that it closes."""
    for parameter in model.eval().requires_grad_(False).parameters():
        if parameter.ndim <= 1 and not parameter.any():
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def _compare(small: nn.Module, again: nn.Module, x: Any) -> None:
    with torch.no_grad():
        ours, theirs = (logits_of(call_model(model.eval(), x)) for model in (small, again))
    if not torch.isfinite(ours).all() or not torch.equal(ours, theirs):
        raise DiffersError(f"{type(small).__name__}: the logits differ, or are not finite")


def row(library: str, name: str, entry: Mapping[str, Any]) -> str:
    """One line of the table."""
    found = unloaf.find_stages(build(library, name, entry), example(entry))
    # Language models of a golden list keep its depth and width: their defaults have billions of parameters.
    published = "num_hidden_layers" not in entry["options"]
    with torch.device("meta" if library == "transformers" else "cpu"):  # timm's constructors compute
        model = build(library, name, entry, published=published)
    model = model.eval().requires_grad_(False).to("meta")
    x = published_input(library, name, model, entry)
    subnets = math.prod(len(stage.legal_depths) for stage in found)
    small = unloaf.Subnet.from_depths(found, [min(stage.legal_depths) for stage in found])
    whole, least = (subnet_cost(model, found, x, subnet)[1] for subnet in (unloaf.Subnet.full(found), small))
    cells = (
        name,
        "-".join(str(stage.depth) for stage in found),
        str(sum(map(sum, (stage.skippable for stage in found)))),
        f"{subnets:,}",
        f"{100 * least / whole:.0f} %",
        sizes(model, x),
        export_form(library, name, entry),
    )
    return "| " + " | ".join(cells) + " |"


TITLES = {"timm": "timm", "torchvision": "torchvision", "transformers": "Hugging Face transformers"}
HEAD = """| model | blocks per stage | skippable | ordered subnets | smallest subnet | input sides | export |
|---|---|---|---|---|---|---|"""


def main() -> None:
    """Writes the lists or the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", action="store_true", help="write tests/golden anew instead of the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.golden:
        for library in LIBRARIES:
            write_golden(library)
        return
    path = ROOT / "docs" / "models.md"
    tables = []
    for library in LIBRARIES:
        rows = []
        for name, entry in golden(library).items():
            rows.append(row(library, name, entry))
            print(rows[-1], flush=True)
        tables.append("\n".join([f"## {TITLES[library]}", "", HEAD, *rows]))
    text = path.read_text(encoding="utf-8")
    text = re.sub(
        r"(?s)(<!-- table -->\n).*(<!-- end of table -->)", lambda m: m[1] + "\n\n".join(tables) + "\n" + m[2], text
    )
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
