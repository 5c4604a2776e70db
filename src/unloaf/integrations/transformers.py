"""The methods in the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unloaf.errors import CheckpointError
from unloaf.files.writing import write_whole
from unloaf.integrations.steps import (
    criterion_of,
    inputs_and_labels,
    main_loss,
    network_of,
    not_installed,
    restore,
    step_of,
)
from unloaf.methods import TrainingMethod
from unloaf.methods.step import SinglePassTraining
from unloaf.stages import inner_module

try:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise not_installed("transformers", error, extra="transformers") from error

_STATE = "method_state.json"


class MethodTrainer(Trainer):
    """The Trainer of transformers whose training step is a step of a method; evaluation sees the main network alone.

    Any model whose output has logits (or a `readout` for others) and whose inputs have ``labels``; with
    `GroundTruthTraining` any model, whose loss gets the inputs with their labels. The loss of each batch is a mean, and
    batches that are accumulated count alike: ``num_items_in_batch`` is not used. ``eval_loss`` is the criterion of the
    main network alone. Checkpoints hold the method's seed and step in ``method_state.json``, and resuming restores
    them; models are saved as the Trainer saves them.

    Args:
        model: that of the method; may be left out.
        args: as for the Trainer.
        *others: as for the Trainer.
        method: built with the model.
        shift_labels: the labels are the tokens of the inputs, as data collators for causal models give them, and the
            one that follows is to be predicted: they are moved one place to the left. False takes labels as they are.
        **options: as for the Trainer.

    Raises:
        ValueError: settings that the method would ignore or that would change what it trains
            (``label_smoothing_factor``, ``compute_loss_func``, ``torch_compile``, ``model_init``, FSDP, DeepSpeed,
            several GPUs in one process); the message has what to do instead.
        CheckpointError: resuming from a checkpoint without the method's state.

    >>> import torch, unloaf
    >>> from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
    >>> model = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...     intermediate_size=8, image_size=8, patch_size=4, num_labels=3))
    >>> method = unloaf.StimulativeTraining(model, unloaf.find_stages(model, torch.zeros(1, 3, 8, 8)))
    >>> trainer = MethodTrainer(method=method, args=TrainingArguments("output", report_to="none"))
    >>> trainer.model is model
    True
    """

    # Of all models: whether a model divides by the items of all accumulated batches itself makes no difference here.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *others: Any,
        method: TrainingMethod,
        shift_labels: bool = False,
        **options: Any,
    ) -> None:
        network = network_of(method, model)
        args = TrainingArguments("tmp_trainer") if args is None else copy.copy(args)
        _check(args, options)
        if not isinstance(method, SinglePassTraining):
            _check_wrapper(args)
            args.ddp_find_unused_parameters = False  # the default of the Trainer looks for them in a graph that is gone
        self.method, self.shift_labels = method, shift_labels
        super().__init__(network, args, *others, **options)  # type: ignore[arg-type]
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func would not be called; give it to the method: criterion=...")
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("methods are trained on one device or by DDP; leave out DeepSpeed and FSDP")
        self.label_names = self.label_names or ["labels"]
        criterion = criterion_of(method)
        if isinstance(criterion, nn.Module):
            criterion.to(args.device)  # weights of classes
        self._labels_seen = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a step of the method, which carries its gradients; in evaluation, of the main network."""
        if not (model.training and torch.is_grad_enabled()):
            return self._main_loss(model, inputs, return_outputs)
        x, labels = self._inputs_and_labels(inputs)
        out = step_of(self.method, model, x, labels, self.accelerator.scaler)
        return (out.loss, {"logits": out.logits}) if return_outputs else out.loss

    def _main_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if criterion_of(self.method) is None:
            return super().compute_loss(model, inputs, return_outputs)
        x, labels = self._inputs_and_labels(inputs)
        outputs = model(**x)
        loss = main_loss(self.method, outputs, labels)
        if not return_outputs:
            return loss
        if isinstance(outputs, Mapping):
            return loss, outputs
        # Of others the Trainer takes the first for the loss.
        return loss, (loss, outputs) if isinstance(outputs, Tensor) else (loss, *outputs)

    def _inputs_and_labels(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        x, labels = inputs_and_labels(self.method, inputs, name=self.label_names[0])
        if labels is None:
            return x, None
        network: Any = inner_module(self.method.model)
        prepare = getattr(network, "prepare_decoder_input_ids_from_labels", None)
        if prepare is not None and "decoder_input_ids" not in x:  # the model does so where it gets labels
            x["decoder_input_ids"] = prepare(labels=labels)
        if self.shift_labels:
            return x, F.pad(labels[..., 1:], (0, 1), value=-100)
        if getattr(self, "_loss_shifts_labels", False) and not self._labels_seen:
            self._labels_seen = True
            _tell_of_labels_that_repeat(x.get("input_ids"), labels)
        return x, labels

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / _STATE, json.dumps(self.method.state_dict()))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = Path(resume_from_checkpoint) / _STATE
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be read, so the draws cannot go on: a MethodTrainer writes it with each checkpoint. To "
                "begin anew from these weights, load them into the model and leave out resume_from_checkpoint"
            ) from error
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore(self.method, state)


def _check(args: TrainingArguments, options: Mapping[str, Any]) -> None:
    """Raise ValueError for settings that a step would ignore, or that change what it computes."""
    refused = {
        "label_smoothing_factor": (args.label_smoothing_factor, "criterion=nn.CrossEntropyLoss(label_smoothing=...)"),
        "torch_compile": (
            args.torch_compile,
            "unloaf.compile_blocks(model, stages), since steps run different blocks",
        ),
        "model_init": (options.get("model_init"), "the model that the method was built with"),
    }
    for name, (value, instead) in refused.items():
        if value:
            raise ValueError(f"{name} is {value!r}, which no step of a method takes; give {instead}")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process are not supported; start a process for each: "
            f"torchrun --nproc-per-node {args.n_gpu}, or set CUDA_VISIBLE_DEVICES"
        )


def _check_wrapper(args: TrainingArguments) -> None:
    for name in ("ddp_find_unused_parameters", "ddp_static_graph"):
        if getattr(args, name):
            raise ValueError(
                f"{name} is True, and DistributedDataParallel would look for the parameters in a graph that is gone "
                "when the loss goes backward; leave it out, and freeze parameters that no loss reaches: "
                "parameter.requires_grad_(False)"
            )


def _tell_of_labels_that_repeat(tokens: Any, labels: Tensor) -> None:
    """Warn where a causal model would be taught to repeat the token that it sees."""
    if isinstance(tokens, Tensor) and tokens.shape == labels.shape:
        counted = labels != -100
        if counted.any() and torch.equal(tokens[counted], labels[counted]):
            warnings.warn(
                "the labels are the input tokens themselves, so the model learns to repeat its input; to predict the "
                "token that follows give MethodTrainer(..., shift_labels=True)",
                stacklevel=2,
            )
