"""The methods as a training task of timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unloaf.compilation import compile_blocks
from unloaf.errors import CheckpointError
from unloaf.integrations.steps import criterion_of, main_loss, network_of, not_installed, restore, step_of
from unloaf.methods import TrainingMethod

try:
    from timm.task import ClassificationTask
except ImportError as error:
    raise not_installed("timm", error, extra="engine") from error


class MethodTask(ClassificationTask):
    """A task of timm whose forward is a step of a method; `prepare_distributed`, `no_sync`, EMA are timm's.

    In training mode the loss carries the gradients of a lean step: ``result["loss"].backward()``, once. In evaluation
    mode, and without gradients, only the main network runs, and the loss is that of the method's criterion.
    `get_checkpoint_state` holds the method's seed and step beside the weights, which have the model's plain keys.

    Args:
        method: built with the model; its criterion is the task's.
        model: that of the method; may be left out.
        scaler: timm's ``NativeScaler`` or a ``torch.amp.GradScaler``, where the loop has one: gradients are then
            computed times its factor.
        device: of the task.
        dtype: of the task.
        verbose: log what it trains.

    >>> import timm, torch, unloaf
    >>> model, x = timm.create_model("resnet18", num_classes=5), torch.randn(2, 3, 64, 64)
    >>> task = MethodTask(unloaf.StimulativeTraining(model, unloaf.find_stages(model, x)))
    >>> result = task(x, torch.tensor([1, 4]))
    >>> result["loss"].backward()
    >>> result["output"].shape, sorted(task.get_checkpoint_state())
    (torch.Size([2, 5]), ['state_dict', 'task_state'])
    """

    def __init__(
        self,
        method: TrainingMethod,
        model: nn.Module | None = None,
        *,
        scaler: Any = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        network = network_of(method, model)
        # What has no criterion has a loss of its own; timm's is then for evaluation alone.
        super().__init__(network, criterion_of(method), device=device, dtype=dtype, verbose=verbose)
        self.method = method
        self.scaler = getattr(scaler, "_scaler", scaler)

    def forward(self, input: Tensor, target: Any) -> dict[str, Any]:
        """A step.

        Args:
            input: images, (N, C, H, W).
            target: class indices or soft labels, as the method's criterion takes them.

        Returns:
            "loss", the sum of all terms, and "output", the main network's logits, detached; None for ST*.
        """
        if self.training and torch.is_grad_enabled():
            model: Any = self.trainable_module  # timm's types count what torch.compile returns as a function
            out = step_of(self.method, model, input, target, self.scaler)
            return {"loss": out.loss, "output": out.logits}
        if criterion_of(self.method) is None:
            return super().forward(input, target)
        output = self.trainable_module(input)
        return {"loss": main_loss(self.method, output, target), "output": output}

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile block by block (`compile_blocks`); as a whole, a model is compiled anew for each subnet.

        Raises:
            ValueError: other arguments of torch.compile.
        """
        if not self.method.stages:
            return super().compile(backend, mode, **compile_kwargs)
        if compile_kwargs:
            raise ValueError(f"{', '.join(compile_kwargs)}: blocks are compiled with backend and mode alone")
        model: Any = self.trainable_module
        compile_blocks(model, self.method.stages, backend=backend, mode=mode)
        return model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The method's state; none of its own has the moving average."""
        return {} if ema else {"method": self.method.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Continue the draws.

        Raises:
            CheckpointError: with `strict`, a checkpoint that another task wrote.
        """
        if ema:
            return
        if state and "method" in state:
            restore(self.method, state["method"])
        elif strict:
            raise CheckpointError("no method's state in the checkpoint; strict=False begins the draws anew")
