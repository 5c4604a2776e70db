"""A run opened again, to be evaluated or exported: its network with the weights of a checkpoint. Never trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from unloaf.batchnorm import recalibrate_bn
from unloaf.config import Config, load_config
from unloaf.config.task_checks import COLUMNS
from unloaf.data.changed_images import check_judged
from unloaf.data.fingerprint import read_listing
from unloaf.engine.changed_settings import check_settings
from unloaf.engine.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint
from unloaf.engine.run_folder import checkpoints_in_sight, run_of
from unloaf.engine.setup import Training, prepare
from unloaf.errors import CheckpointError
from unloaf.export import export_subnet
from unloaf.files.tensors import load_strictly
from unloaf.inputs import to_device
from unloaf.measure.costs import gmacs
from unloaf.models.hf import transformers_config
from unloaf.own_code import changed_code, check_allowed, code_record, is_own, own_settings
from unloaf.printable import printable
from unloaf.stages import inner_module
from unloaf.subnet import Subnet


@dataclass(frozen=True)
class OpenedRun:
    """A run at one of its checkpoints."""

    run: Path  # its folder
    config: Config  # its settings, as it was trained; of a model's folder the last part alone
    training: Training  # its data, its network with the checkpoint's weights, its stages
    checkpoint: str  # name of the checkpoint's folder
    epoch: int  # whole epochs that were trained by then
    weights: str  # "model", or "model_ema" for the moving average
    recalibrate: int  # training images for the statistics of a subnet; 0 leaves them as they are
    notes: tuple[str, ...]  # what a reader has to know of the checkpoint

    @property
    def network(self) -> nn.Module:
        """The main network."""
        return inner_module(self.training.model)

    def check_classifier(self, what: str, *tasks: str) -> None:
        """Raises ValueError unless the run is one of classification, or one of these tasks, which alone have that."""
        if self.config.task not in ("classification", *tasks):
            fitting = " and ".join(("classification", *tasks))
            raise ValueError(f"{self.run}: {what} is for {fitting}; this run is of task {self.config.task}")

    @property
    def architecture(self) -> dict[str, Any]:
        """Arguments of `build_model` for the main network, without what only training needs.

        A network of transformers has its whole configuration among them, as ``config``: the folder that it was built
        from may be gone, and default values change from version to version.
        """
        config, data = self.config, self.training.data
        own = self.training.task.architecture(config, data)
        if own is not None:
            described = {"config": transformers_config(self.network)} if config.model.startswith("hf/") else {}
            return own | described
        if is_own(config.model):
            raise ValueError(
                f"{self.run}: its network is made by {config.model}, which no other file holds; give --format pt2 or "
                "onnx, which need no code"
            )
        if config.depths is not None:
            raise ValueError(
                f"{self.run}: its network is the subnet {config.depths} of {config.model}, which no library builds by "
                "name; give --format pt2 or onnx, which need no code"
            )
        settings = {"name": config.model, "num_classes": data.num_classes, "in_chans": data.in_chans}
        settings |= {"img_size": data.img_size, "width": config.width}
        if config.model_kwargs and not config.model.startswith("hf/"):
            settings["model_kwargs"] = config.model_arguments
        if config.model.startswith("hf/"):
            settings["config"] = transformers_config(self.network)
        return settings

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the outputs stand for, in their order; numbers where the classes of the run have no names."""
        return tuple(printable(name) for name in self.training.data.class_names)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes an input: mean and std are in units of the pixel range [0, 1].

        Files are resized to input_size / crop_pct and cut out in the centre; they alone have a ``crop_mode``.
        """
        data = self.training.data
        own = self.training.task.preprocessing(data)
        if own is not None:
            return own
        crop: dict[str, Any] = {"crop_pct": 1.0}
        if data.cuts_out:
            crop = {"crop_pct": data.crop_pct, "crop_mode": "center"}
        return {
            "input_size": [data.in_chans, data.img_size, data.img_size],
            "mean": [value / 255 for value in data.mean],
            "std": [value / 255 for value in data.std],
            "interpolation": data.resize_mode,
            **crop,
        }

    def noise(self, batch: int, seed: int) -> Any:
        """Inputs on which two forms of the network are compared, on the CPU."""
        return self.training.task.noise(self.training.data, batch, seed)

    def calibration(self) -> Iterator[tuple[Any]]:
        """Inputs of training images from which the statistics of a subnet are estimated, on the run's device."""
        device = self.training.device
        parts = self.training.task.inputs_of
        return ((to_device(x, device),) for batch in self.training.calibration_batches() for x in parts(batch))

    def subnet(self, subnet: Subnet) -> nn.Module:
        """A subnet as a network of its own; all but the main network have their statistics re-estimated."""
        stages = self.training.stages
        # Of a detector the stages do not know what it takes.
        tensors = self.config.task in ("classification", *COLUMNS)
        example = None if tensors else to_device(self.noise(1, 0), self.training.device)
        network = self.training.task.finished(export_subnet(self.network.eval(), stages, subnet, example=example))
        if self.recalibrate and subnet != Subnet.full(stages):
            recalibrate_bn(network, self.calibration())
        return network

    def measure(self, network: nn.Module) -> dict[str, Any]:
        """The task's figures of a network on the run's validation and test images, as far as there are any."""
        data = self.training.data
        splits = ["val"] if data.test is data.val else ["val", "test"]
        network.to(self.training.device)
        there = [name for name in splits if len(getattr(data, name))]
        task, batches = self.training.task, self.training.eval_batches
        return {name: task.evaluate(network, batches(name), data, reduce=None) for name in there}

    def cost(self, network: nn.Module) -> tuple[int, float]:
        """Parameters, and billions of multiply-adds for one image."""
        image = to_device(self.training.task.example(self.training.data, 1), next(network.parameters()).device)
        return sum(p.numel() for p in network.parameters()), gmacs(network, image)


class Opening(TypedDict, total=False):
    """Options of `open_trained`, which functions that open a run hand on."""

    checkpoint: str
    ema: bool
    recalibrate: int | None
    workers: int | None
    data_dir: str | None
    device: str
    run_own_code: bool


def open_trained(
    run: Path,
    *,
    checkpoint: str = "last",
    ema: bool = False,
    recalibrate: int | None = None,
    workers: int | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    run_own_code: bool = False,
    need_subnets: bool = True,
) -> OpenedRun:
    """Opens a run at a checkpoint; writes nothing, and the run may still be training.

    Args:
        run: a folder that `unloaf train` made.
        checkpoint: "last" for the newest that is not damaged, "best" for the best on the validation images.
        ema: take the moving average of the weights.
        recalibrate: training images that re-estimate a subnet's batch-norm statistics, 0 to leave them; default: as in
            the run.
        workers: processes that read images; default: as in the run.
        data_dir: where the images are now; default: as in the run.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        run_own_code: import and run the user's own functions that the run names as its model or data.
        need_subnets: refuse a network that has none.

    Raises:
        ValueError: the folder is not a run, has no such checkpoint or images, ``recalibrate`` is out of range, or the
            network has no subnets, though they are needed.
        CheckpointError: no checkpoint is intact.
    """
    if recalibrate is not None and recalibrate != 0 and recalibrate < 2:
        raise ValueError(f"recalibrate {recalibrate}: give at least 2 images, or 0 to leave the statistics as they are")
    config, found, weights, notes = _open_checkpoint(run, checkpoint, ema=ema)
    check_allowed(own_settings(config), allowed=run_own_code)
    code = code_record(own_settings(config))
    changed = changed_code(found.state.get("own_code"), code, since=found.path.name)
    notes += [f"{line}: what is found may not be what was trained" for line in changed]
    training = _prepare_for_one_process(
        config, found, recalibrate=recalibrate or None, workers=workers, data_dir=data_dir, device=device
    )
    listed = read_listing(run / "images.csv.gz")
    notes += check_judged(training.data, found.state.get("data"), listed, own=config.data_dir, place=data_dir)
    load_weights(inner_module(training.model), found, weights)
    if need_subnets and not training.stages:
        raise ValueError(f"{run}: its network has no residual blocks that could be skipped, so it has no subnets")
    position: Any = found.state["position"]
    return OpenedRun(
        run=run,
        config=dataclasses.replace(config, model=_without_place(config.model)),
        training=training,
        checkpoint=found.path.name,
        epoch=position["epoch"] - 1,
        weights=weights,
        recalibrate=config.recalibrate if recalibrate is None else recalibrate,
        notes=tuple(notes),
    )


def checkpoints_of(run: Path) -> list[Path]:
    """The folders of the checkpoints that a run kept, oldest first; `load_checkpoint` reads one.

    Raises:
        ValueError: there is none.
    """
    if not checkpoints_in_sight(run):
        raise ValueError(f"{run} has no checkpoint yet; the first is written at the end of an epoch")
    return sorted((run / "checkpoints").glob("step-*"))


def checkpoint_of(run: Path, which: str) -> tuple[Checkpoint, list[str]]:
    """The newest good checkpoint of a run ("last") or its best one, and what is to be said of damaged ones."""
    if not checkpoints_in_sight(run):
        raise ValueError(f"{run} has no checkpoint yet; the first is written at the end of an epoch")
    best = run / "model_best"
    if which == "best":
        if best.is_symlink() and not best.exists():
            raise ValueError(f"{best} leads to {best.readlink()}, which is not there; leave --checkpoint out")
        if not best.exists():
            raise ValueError(f"{run} has no model_best: no epoch was validated yet; leave --checkpoint out")
        return _patiently(lambda: load_checkpoint(best)), []
    found, notes = _patiently(lambda: newest_checkpoint(run / "checkpoints"))
    if found is None:
        raise ValueError(f"{run} has no checkpoint any more; look at {run / 'checkpoints'}")
    return found, notes


def _open_checkpoint(run: Path, which: str, *, ema: bool) -> tuple[Config, Checkpoint, str, list[str]]:
    """The settings of a run, one of its checkpoints, the name of the weights to take, and notes on what was found."""
    config = load_config(run_of(run) / "args.yaml")
    found, notes = checkpoint_of(run, which)
    check_settings(config, found)
    weights = "model_ema" if ema else "model"
    if weights not in found.weights:
        raise ValueError(f"{run} kept no moving average of its weights; leave --ema out")
    return config, found, weights, notes


def _patiently(read: Any) -> Any:
    """A run that trains on may replace a checkpoint while it is read: what fails is tried again."""
    for _ in range(2):
        try:
            return read()
        except CheckpointError:
            continue
    return read()


def _prepare_for_one_process(config: Config, checkpoint: Checkpoint, **given: Any) -> Training:
    """The run for weights of a checkpoint, without what only training needs: several devices, trackers, a second copy.

    What is given as None stays as in the run. Classes that are numbers are as many as in training: other images may
    lack the last ones.
    """
    record: Any = checkpoint.state.get("data")
    if record is not None and record["class_names"] is None:
        given["num_classes"] = record["num_classes"]
    alone = dataclasses.replace(
        config,
        amp=False,
        cutmix=0.0,
        fsdp=False,
        grad_checkpointing=False,
        mixup=0.0,
        model_ema=False,
        sync_bn=False,
        torchcompile=False,
        trackers=(),
        **{name: value for name, value in given.items() if value is not None},
    )
    return prepare(alone, resumed=True)


def load_weights(model: nn.Module, checkpoint: Checkpoint, weights: str) -> None:
    """Puts the weights of a checkpoint, "model" or "model_ema", into the network that its args.yaml describes."""
    # The weights alone: batch-norm statistics of several processes are merged in them, as they were when evaluated.
    try:
        load_strictly(model, checkpoint.weights[weights])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{checkpoint.path} does not fit its args.yaml: {reason}") from error


def _without_place(model: str) -> str:
    """hf/vit for hf/configurations/vit: files that are handed on do not tell where things lay."""
    return f"hf/{Path(model).name}" if model.startswith("hf/") else model
