"""A trained run in, files out that need no run folder: one subnet as a network, or all of them in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from unloaf.batchnorm import recalibrate_bn, tracking_norms
from unloaf.config.task_checks import COLUMNS
from unloaf.evaluation import choose_subnets
from unloaf.export import export_subnet, parse_subnet
from unloaf.files.writing import check_new, check_own, new_folder, write_whole
from unloaf.release.card import NetworkFacts, model_card
from unloaf.release.elastic import ElasticModel, load_elastic, save_elastic
from unloaf.release.formats import Format, Written, check_format, timm_config, write_format
from unloaf.release.predictions import Prediction, Predictions, predict_run
from unloaf.runs.opened import OpenedRun, Opening, open_trained
from unloaf.subnet import Subnet

__all__ = [
    "ElasticResult",
    "ExportResult",
    "Format",
    "Prediction",
    "Predictions",
    "export_elastic",
    "export_run",
    "predict_run",
]

_MOST_STORED = 64  # subnets of an elastic file that nobody asked to hold more


@dataclass(frozen=True)
class ExportResult:
    """A subnet that was exported."""

    folder: Path  # where its files are
    files: dict[str, int]  # their sizes in bytes, by name
    subnet: str  # its depths, "3-3-5-3"
    format: Format  # state_dict, timm, pt2 or onnx
    metrics: dict[str, Any]  # the task's figures by split, of the exported network
    params: int  # parameters
    gmacs: float  # billions of multiply-adds for one image
    difference: float  # largest absolute difference of the logits, read back against exported, on fresh inputs
    loading: str  # Python lines that load it
    notes: tuple[str, ...] = ()  # what a reader has to know of the checkpoint
    pushed: str | None = None  # the repository that it was uploaded to, with its owner, if it was


@dataclass(frozen=True)
class ElasticResult:
    """A network that was exported with the statistics of its subnets."""

    folder: Path  # where its files are
    files: dict[str, int]  # their sizes in bytes, by name
    networks: tuple[NetworkFacts, ...]  # the subnets, the main network first, evaluated
    statistics: int  # bytes of the stored statistics; the rest is one set of weights
    loading: str  # Python lines that load it
    notes: tuple[str, ...] = ()  # what a reader has to know of the checkpoint and the choice of subnets
    pushed: str | None = None  # the repository that it was uploaded to, with its owner, if it was


def export_run(
    run: str | Path,
    *,
    depths: str | None = None,
    output: str | Path | None = None,
    format: str = "state_dict",
    push_to_hub: str | None = None,
    **opening: Unpack[Opening],
) -> ExportResult:
    """Writes a subnet of a run as a network of its own, with a model card; the folder appears whole or not at all.

    Args:
        run: a folder that `unloaf train` made; it is not changed.
        depths: of the subnet, "3,3,5,3", or what ``str(subnet)`` gives, "3-2:101-5-3"; default: the main network.
        output: the new folder; default: RUN/export/SUBNET-FORMAT.
        format: state_dict (safetensors and a JSON for `load_subnet`; of a network of transformers, also what
            ``from_pretrained`` loads), timm, pt2 (torch.export) or onnx.
        push_to_hub: name of a repository on the Hugging Face hub that the folder is uploaded to.
        opening: see `open_trained`; the device is that of the estimate and the accuracy, files are made on the CPU.

    Raises:
        ValueError: no run, no such subnet or format, a package is missing, the form cannot hold the network, or the
            folder exists.
        CheckpointError: no checkpoint is intact.
    """
    kind = check_format(format)
    opened = open_trained(Path(run), **opening)
    if kind != "state_dict":
        opened.check_classifier(f"format {kind}", *COLUMNS)
    stages = opened.training.stages
    chosen = Subnet.full(stages) if depths is None else parse_subnet(stages, depths)
    place = _place(Path(run), f"{str(chosen).replace(':', '_')}-{kind}", output)
    network = opened.subnet(chosen)
    facts = _facts(opened, network, str(chosen))
    network.cpu().eval()
    with new_folder(place, need=_bytes(network)) as folder:
        written = write_format(kind, folder, opened, network, chosen)
        write_whole(folder / "README.md", _card(opened, chosen, facts, written))
    pushed = None if push_to_hub is None else _push(place, push_to_hub, opened, written)
    return ExportResult(
        folder=place,
        files=_sizes(place),
        subnet=str(chosen),
        format=kind,
        metrics=dict(facts.metrics),
        params=facts.params,
        gmacs=facts.gmacs,
        difference=written.difference,
        loading=written.loading.replace("FOLDER", str(place)),
        notes=opened.notes,
        pushed=pushed,
    )


def export_elastic(
    run: str | Path,
    *,
    output: str | Path | None = None,
    subnets: Sequence[str] | int | None = None,
    push_to_hub: str | None = None,
    **opening: Unpack[Opening],
) -> ElasticResult:
    """Writes a run's network once, with batch-norm statistics for some of its subnets, for `load_elastic`.

    Args:
        run: a folder that `unloaf train` made; it is not changed.
        output: the new folder; default: RUN/export/elastic.
        subnets: which ones, by name; a number draws so many ordered ones beside the main network; default: all
            ordered ones, or 64 of them where there are more.
        push_to_hub: as in `export_run`.
        opening: as in `export_run`.

    Raises:
        ValueError: see `export_run`; also ``recalibrate`` of 0 for a network with batch norm.
        CheckpointError: no checkpoint is intact.
    """
    place = _place(Path(run), "elastic", output)
    opened = open_trained(Path(run), **opening)
    opened.check_classifier("an elastic file", *COLUMNS)
    if not opened.recalibrate and tracking_norms(opened.network):
        raise ValueError("recalibrate 0: each subnet of an elastic file has statistics of its own; give 2 or more")
    chosen, notes = _chosen(opened, subnets)
    model = ElasticModel(opened.network.eval(), opened.training.stages, class_names=opened.class_names)
    networks = []
    for subnet in chosen:
        if subnet != Subnet.full(model.stages):
            model.recalibrate(subnet, opened.calibration())
        networks.append(_facts(opened, model.export(subnet), str(subnet)))
    said = [*notes, _judged_as_subnets(opened)] if tracking_norms(opened.network) else notes
    model.cpu()
    loading = f'import unloaf\n\nmodel = unloaf.load_elastic("FOLDER")\nlogits = model(images, subnet="{chosen[-1]}")'
    loading += ".logits" if hasattr(opened.network, "save_pretrained") else ""
    with new_folder(place, need=_bytes(model)) as folder:
        save_elastic(folder, model, opened.architecture, more={"preprocessing": opened.preprocessing})
        load_elastic(folder)
        write_whole(folder / "README.md", _elastic_card(opened, networks, loading, said))
    pushed = None if push_to_hub is None else _push(place, push_to_hub, opened, None)
    stored = [model.statistics(subnet) for subnet in chosen]
    return ElasticResult(
        folder=place,
        files=_sizes(place),
        networks=tuple(networks),
        statistics=sum(tensor.nbytes for values in stored for tensor in values.values()),
        loading=loading.replace("FOLDER", str(place)),
        notes=(*opened.notes, *notes),
        pushed=pushed,
    )


def _place(run: Path, name: str, output: str | Path | None) -> Path:
    """The folder that is to be, by default one in the run's own."""
    place = run / "export" / name if output is None else Path(output)
    if output is None:
        check_own(run / "export", folder=True)
    check_new(place)
    return place


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def _chosen(opened: OpenedRun, asked: Sequence[str] | int | None) -> tuple[list[Subnet], list[str]]:
    """The main network first, then those that were asked for."""
    stages, seed = opened.training.stages, opened.config.seed
    full = Subnet.full(stages)
    if asked is None:
        chosen = choose_subnets(stages, _MOST_STORED, seed=seed)
        count = prod(len(stage.legal_depths) for stage in stages)
        note = f"{len(chosen)} of {count} ordered subnets have statistics; --subnets chooses others."
        return chosen, [note] if len(chosen) < count else []
    if isinstance(asked, int):
        if asked < 1:
            raise ValueError(f"subnets {asked}: give at least 1")
        return choose_subnets(stages, asked + 1, seed=seed), []
    return list(dict.fromkeys([full, *(parse_subnet(stages, text) for text in asked)])), []


def _facts(opened: OpenedRun, network: nn.Module, name: str) -> NetworkFacts:
    return NetworkFacts(name, opened.measure(network), *opened.cost(network))


def _origin(opened: OpenedRun) -> str:
    average = " (moving average of the weights)" if opened.weights == "model_ema" else ""
    epochs = "1 epoch" if opened.epoch == 1 else f"{opened.epoch} epochs"
    return f"{opened.config.model}, trained on {opened.config.dataset} for {epochs}{average}"


def _card(opened: OpenedRun, subnet: Subnet, facts: NetworkFacts, written: Written) -> str:
    full = Subnet.full(opened.training.stages)
    origin = f"{_origin(opened)} by the method `{opened.config.method}`"
    if subnet == full:
        what = f"The main network, {full}, of {origin}."
    else:
        what = f"The subnet {subnet} of {origin}: an ordinary network without the other blocks of {full}."
    summary = [f"{what} The figures below are those of this network, measured after the export."]
    notes = []
    if tracking_norms(opened.network) and subnet != full:
        used = opened.training.calibration_images
        how = f"were re-estimated on {used:,} training images" if opened.recalibrate else "are the main network's"
        notes.append(f"Its batch-norm statistics {how}.")
    title, loading = f"{opened.config.model} {subnet}", written.loading
    return model_card(opened, title, summary, [facts], loading, notes=notes, library=written.library)


def _judged_as_subnets(opened: OpenedRun) -> str:
    """The main network with re-estimated statistics, so that the table compares what can be compared."""
    stages = opened.training.stages
    full = Subnet.full(stages)
    network = export_subnet(opened.network.eval(), stages, full)
    recalibrate_bn(network, opened.calibration())
    tops = ", ".join(f"{split} top-1 {found.top1:.2f} %" for split, found in opened.measure(network).items())
    return (
        f"{full} has the running statistics of its training here; with statistics re-estimated as its subnets': {tops}."
    )


def _elastic_card(opened: OpenedRun, networks: Sequence[NetworkFacts], loading: str, notes: Sequence[str]) -> str:
    summary = [
        f"{_origin(opened)}, by the method `{opened.config.method}`: one set of weights whose depth is "
        "chosen for each call, with batch-norm statistics for each of these subnets."
    ]
    return model_card(opened, f"{opened.config.model}, elastic", summary, networks, loading, notes=notes)


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _push(folder: Path, repository: str, opened: OpenedRun, written: Written | None) -> str:
    """Uploads by timm's or Hugging Face's own function; the files stay where they are in any case."""
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        name = hub.create_repo(repository, exist_ok=True).repo_id  # with its owner, if none was given
        if written is not None and written.rebuilt is not None:
            from timm.models import push_to_hf_hub

            config, arguments = timm_config(opened), dict(written.arguments)
            push_to_hf_hub(written.rebuilt, name, model_config=config, model_args=arguments, safe_serialization=True)
            hub.upload_file(repo_id=name, path_or_fileobj=str(folder / "README.md"), path_in_repo="README.md")
        else:
            hub.upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:  # network, token, name: whatever the hub answers
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} is written, but {repository} could not be uploaded: {text}") from error
    return name
