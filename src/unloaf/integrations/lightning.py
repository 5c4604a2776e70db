"""The methods as a module of Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.errors import CheckpointError
from unloaf.inputs import batch_size
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
from unloaf.stages import call_model

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ImportError as error:
    raise not_installed("lightning", error, extra="lightning") from error

_STATE = "method_state"


class MethodModule(LightningModule):
    """A LightningModule whose training step is a step of a method, by automatic optimisation.

    Batches are pairs of inputs and labels, or mappings with "labels"; ST* gets them whole. The returned loss carries
    the gradients of a lean step, so accumulation, clipping, mixed precision and DDP are Lightning's. Logged are
    ``train_loss``, all terms, ``train_main``, that of the main network, and ``val_loss``, the method's criterion of the
    main network alone. Checkpoints hold the method's seed and step; the network's keys begin with ``model.``.

    Args:
        method: built with the model.
        model: that of the method; may be left out.
        optimizer: from parameters to an optimizer; or override ``configure_optimizers``.

    Raises:
        ValueError: when training begins: manual optimisation in several processes, a strategy that shards the model,
            or a module that torch.compile has changed.

    >>> import lightning, torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(num_classes=5), torch.randn(2, 3, 64, 64)
    >>> method = unloaf.StimulativeTraining(model, unloaf.find_stages(model, x))
    >>> module = MethodModule(method, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    >>> module.model is model
    True
    """

    def __init__(
        self,
        method: TrainingMethod,
        model: nn.Module | None = None,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.method = network_of(method, model), method
        criterion = criterion_of(method)
        if isinstance(criterion, nn.Module):  # to the device with the model, and what it learns into the optimizer
            self.criterion = criterion
        self._make_optimizer = optimizer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the main network returns."""
        return self.model(*args, **kwargs)

    def on_fit_start(self) -> None:
        """Refuses what would train something else than the method, before the first step."""
        strategy, processes = self.trainer.strategy, self.trainer.world_size
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"the strategy is {type(strategy).__name__}; methods are trained on one device or by DDP: "
                "Trainer(strategy='ddp')"
            )
        if processes > 1 and not self.automatic_optimization:
            raise ValueError(
                f"manual optimisation in {processes} processes: Lightning would not average the gradients of a lean "
                "step over them, and their weights would drift apart; leave automatic_optimization = True, and return "
                "the loss of the step"
            )
        if getattr(self, "_compiler_ctx", None) is not None:
            raise ValueError(
                "torch.compile has compiled the module as a whole, but each step runs other blocks; compile these: "
                "unloaf.compile_blocks(model, stages), and give Lightning the module itself"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """A step of the method: its loss, all terms together."""
        inputs, labels = inputs_and_labels(self.method, batch)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        out = step_of(self.method, self.model, inputs, labels, scaler)
        self.log("train_loss", out.loss.detach(), prog_bar=True)
        self.log("train_main", out.terms["main"])
        return out.loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The method's criterion of the main network.

        Raises:
            ValueError: ST*, whose losses a model may compute in training mode alone; override this there.
        """
        if criterion_of(self.method) is None:
            raise ValueError("GroundTruthTraining has no criterion of logits; override validation_step for its metric")
        inputs, labels = inputs_and_labels(self.method, batch)
        loss = main_loss(self.method, call_model(self.model, inputs), labels)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=batch_size(inputs))
        return loss

    def configure_optimizers(self) -> Any:
        """What `optimizer` makes of the parameters."""
        if self._make_optimizer is None:
            raise ValueError(
                "no optimizer; give optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), or override "
                "configure_optimizers"
            )
        return self._make_optimizer(self.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the method's state."""
        checkpoint[_STATE] = self.method.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continues the draws.

        Raises:
            CheckpointError: another module wrote the checkpoint.
        """
        if _STATE not in checkpoint:
            raise CheckpointError(
                "no method's state in the checkpoint, which another module has written; load its weights into the "
                "model before the method is built"
            )
        restore(self.method, checkpoint[_STATE])
