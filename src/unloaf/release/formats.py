"""The forms in which a subnet leaves: each is written, read back and compared before it counts."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unloaf.config.task_checks import COLUMNS
from unloaf.export import tensors_in
from unloaf.files.writing import write_whole
from unloaf.models.offline import offline
from unloaf.passes import logits_of
from unloaf.release.libraries import built_by_timm, describe_for_transformers, describe_images_for_transformers, quiet
from unloaf.release.subnet_files import load_subnet, save_subnet
from unloaf.runs.opened import OpenedRun
from unloaf.stages import call_model, evaluating
from unloaf.subnet import Subnet

Format = Literal["state_dict", "timm", "pt2", "onnx"]
# Of the largest logit. Other kernels add in another order; float32 has 24 bits, deep networks lose a few more.
_ROUNDING = {"state_dict": 0.0, "timm": 0.0, "pt2": 1e-5, "onnx": 1e-5}
LOGITS_OF_TRANSFORMERS = "logits = model(images).logits"
# Of model.pt2: torch.export.load(file, extra_files=found := {this: ""}).
_PREPROCESSING, _CLASS_NAMES = "preprocessing.json", "class_names.json"
_COMPARED = ((2, 11), (3, 12))  # batch size and seed of the inputs


@dataclass(frozen=True)
class Written:
    """What was written."""

    loading: str  # Python lines that load it from the folder
    difference: float  # largest absolute difference of the logits, reloaded against exported
    rebuilt: nn.Module | None = None  # of timm's form, the network that timm built
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of timm's form, those that build it
    library: str | None = None  # timm or transformers, if it loads the folder without unloaf


def write_format(kind: Format, folder: Path, opened: OpenedRun, network: nn.Module, subnet: Subnet) -> Written:
    """Writes a network, in eval mode and on the CPU, in one of the forms.

    Raises:
        ValueError: the form cannot hold this network, a package is missing, or what was read back is not the same.
    """
    return _WRITERS[kind](folder, opened, network, subnet)


def check_format(kind: str) -> Format:
    """The form by its name; ValueError if there is none, or if a package for it is missing."""
    if kind not in _WRITERS:
        raise ValueError(f"format {kind!r}: give {', '.join(_WRITERS)}")
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if kind == "onnx" and missing:
        raise ValueError(f"format onnx needs {', '.join(missing)}; install the extra onnx: pip install 'unloaf[onnx]'")
    return kind  # type: ignore[return-value]


def _write_state_dict(folder: Path, opened: OpenedRun, network: nn.Module, subnet: Subnet) -> Written:
    more = {"class_names": opened.class_names, "preprocessing": opened.preprocessing}
    save_subnet(folder, network, opened.architecture, opened.training.stages, subnet, more=more)
    difference = _difference("state_dict", opened, network, load_subnet(folder))
    loading = 'import unloaf\n\nmodel = unloaf.load_subnet("FOLDER")'
    if not hasattr(network, "save_pretrained"):
        return Written(loading, difference)
    images = opened.training.task.preprocessing(opened.training.data) is None
    logits = LOGITS_OF_TRANSFORMERS if images else "logits = model(tokens).logits"
    loading += f"\n{logits}"
    if not describe_for_transformers(
        folder,
        network,
        same=lambda rebuilt: _difference("state_dict", opened, network, rebuilt),
        class_names=opened.class_names,
    ):
        return Written(loading, difference)
    name = type(network).__name__
    if images:
        describe_images_for_transformers(folder, opened.preprocessing)
    opened.training.task.accompany(folder, opened.training.data)
    alone = f'import transformers\n\nmodel = transformers.{name}.from_pretrained("FOLDER").eval()'
    return Written(f"{alone}\n{logits}\n# or\n{loading}", difference, library="transformers")


def _write_timm(folder: Path, opened: OpenedRun, network: nn.Module, subnet: Subnet) -> Written:
    import timm
    from timm.models import save_for_hf

    rebuilt, name, arguments = _in_timm(opened, network)
    save_for_hf(rebuilt, str(folder), model_config=timm_config(opened), model_args=arguments, safe_serialization=True)
    with quiet(), offline():
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    difference = _difference("timm", opened, network, again)
    words = "".join(f", {key}={value!r}" for key, value in arguments.items())
    loading = (
        'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
        "# or, for other uses of the weights:\n"
        f'model = timm.create_model("{name}"{words}, checkpoint_path="FOLDER/model.safetensors").eval()'
    )
    return Written(loading, difference, rebuilt, arguments, library="timm")


def timm_config(opened: OpenedRun) -> dict[str, Any]:
    """What timm's configuration says beside the architecture: classes and preprocessing of this run."""
    ours = opened.preprocessing
    # Whatever the published model of this name does otherwise in a test has to be named, or it stays.
    test = {"test_input_size": ours["input_size"], "test_crop_pct": ours["crop_pct"], "crop_mode": "center"}
    described = {"tag": "unloaf", **ours, **test}
    if not opened.config.pretrained:  # timm would fill in where its own weights of this name come from
        described |= {"license": None, "origin_url": None, "paper_ids": None}
    return {"pretrained_cfg": described, "label_names": list(opened.class_names)}


def _in_timm(opened: OpenedRun, network: Any) -> tuple[nn.Module, str, dict[str, Any]]:
    """The same network built by timm alone, and how: compared bit for bit."""
    published = getattr(network, "pretrained_cfg", None)
    if published is None or not type(network).__module__.startswith("timm."):
        raise ValueError(f"model {opened.config.model} is not timm's; take --format state_dict")
    name, settings = published["architecture"], opened.architecture
    arguments: dict[str, Any] = {key: settings[key] for key in ("num_classes", "in_chans")}
    if published.get("fixed_input_size"):
        arguments["img_size"] = settings["img_size"]
    arguments |= opened.config.model_arguments
    kinds = {type(opened.network.get_submodule(path)) for s in opened.training.stages for path in s.blocks}
    rebuilt, depths = built_by_timm(
        network, kinds, name, arguments, same=lambda rebuilt: _difference("timm", opened, network, rebuilt)
    )
    return rebuilt, name, arguments | depths


class _Logits(nn.Module):
    """A network whose output is its logits: exporters write the output, and transformers' is an object."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.network(images))


def _write_pt2(folder: Path, opened: OpenedRun, network: nn.Module, subnet: Subnet) -> Written:
    file = folder / "model.pt2"
    with refusals("torch.export"):
        batch = ({0: torch.export.Dim("batch", min=1, max=2**20)},)
        program = torch.export.export(_Logits(network), (opened.noise(2, 0),), dynamic_shapes=batch)
        more = {_PREPROCESSING: json.dumps(opened.preprocessing), _CLASS_NAMES: json.dumps(opened.class_names)}
        written = io.BytesIO()
        torch.export.save(program, written, extra_files=more)  # into a file on a full disk, torch 2.15 ends the process
        write_whole(file, written.getvalue())
        again = torch.export.load(file).module()
    difference = _difference("pt2", opened, network, again)
    return Written('import torch\n\nmodel = torch.export.load("FOLDER/model.pt2").module()', difference)


def _write_onnx(folder: Path, opened: OpenedRun, network: nn.Module, subnet: Subnet) -> Written:
    import onnxruntime

    file = folder / "model.onnx"
    with refusals("the ONNX exporter"), quiet():
        torch.onnx.export(
            _Logits(network),
            (opened.noise(2, 0),),
            file,
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
        add_description(file, opened)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def again(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])

    difference = _difference("onnx", opened, network, again)
    loading = (
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
        'logits = session.run(["logits"], {"images": images})[0]  # float32, (batch, channels, height, width)'
    )
    return Written(loading, difference)


def add_description(file: Path, opened: OpenedRun) -> None:
    """Into the metadata of a model of ONNX, which `session.get_modelmeta().custom_metadata_map` gives."""
    import onnx

    model = onnx.load(file)
    entries = {"class_names": opened.class_names, "preprocessing": opened.preprocessing}
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in entries.items()})
    onnx.save(model, file)


_WRITERS: dict[str, Callable[[Path, OpenedRun, nn.Module, Subnet], Written]] = {
    "state_dict": _write_state_dict,
    "timm": _write_timm,
    "pt2": _write_pt2,
    "onnx": _write_onnx,
}


def _difference(kind: Format, opened: OpenedRun, network: nn.Module, again: Any) -> float:
    """Largest absolute difference on fresh inputs of two batch sizes; ValueError where it is more than rounding."""
    worst, largest = 0.0, 1.0
    with evaluating(network):
        for batch, seed in _COMPARED:
            x = opened.noise(batch, seed)
            pairs = zip(_answers(opened, call_model(network, x)), _answers(opened, call_model(again, x)), strict=True)
            for ours, theirs in pairs:
                if ours.shape != theirs.shape:
                    raise ValueError(f"logits of shape {tuple(theirs.shape)} came back instead of {tuple(ours.shape)}")
                if ours.numel():  # a detector may have found nothing
                    worst = max(worst, float((ours.double() - theirs.double()).abs().max()))
                    largest = max(largest, float(ours.abs().max()))
    if not worst <= _ROUNDING[kind] * largest:
        raise ValueError(
            f"format {kind}: the logits that came back differ by up to {worst:.1e} (of up to {largest:.1e}), more than "
            f"{_ROUNDING[kind]:.0e} of them; take another --format"
        )
    return worst


def _answers(opened: OpenedRun, output: Any) -> list[Tensor]:
    """The logits, or all tensors that a network of another task returns."""
    logits = opened.config.task in ("classification", "language", *COLUMNS)
    return [logits_of(output)] if logits else list(tensors_in(output))


@contextmanager
def refusals(exporter: str) -> Iterator[None]:
    """Turns what an exporter raises, whole pages, into its first cause."""
    try:
        yield
    except Exception as error:  # exporters have errors of many kinds
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = " ".join(str(cause).split())[:300]
        raise ValueError(
            f"{exporter} refuses this network ({type(cause).__name__}: {text}); take another --format"
        ) from error
