"""What is refused, and with which advice. None of it is needed to understand a step."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unloaf.inputs import first_tensor, rows_of
from unloaf.stages import inner_module

_AUXILIARY = re.compile(r"aux\w*_(logits|outputs)")


def check_batch(model: nn.Module, x: Any, y: Any) -> None:
    """All that can be told before a pass is: a batch refused here has changed nothing."""
    batch = first_tensor(x)
    first = next(inner_module(model).parameters(), None)
    if first is not None and (batch.device != first.device or (isinstance(y, Tensor) and y.device != first.device)):
        _check_devices(model, batch, y)
    if batch is x and not len(batch):
        raise ValueError(f"x has shape {tuple(batch.shape)}, no example; leave such a batch out")
    # A mapping may hold anything: there the criterion tells whether y fits the logits.
    if batch is x and isinstance(y, Tensor) and y.ndim and len(y) != len(batch):
        raise ValueError(f"x has {len(batch)} examples, y has {len(y)}; give one target for each")


def _check_devices(model: nn.Module, x: Tensor, y: Any) -> None:
    """Raise ValueError unless the batch is on one of the model's devices."""
    devices = {parameter.device for parameter in model.parameters()}
    if x.device not in devices:
        where = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the batch is on {x.device}, the model on {where}; move the batch: x.to({where!r})")
    if isinstance(y, Tensor) and y.device not in devices:
        raise ValueError(f"y is on {y.device}, the model elsewhere; move the targets: y.to({str(x.device)!r})")


@contextmanager
def advice_on_small_batches(x: Any) -> Iterator[None]:
    """What to do where torch's batch norm refuses a single value per channel; one image often has more."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        size = rows_of(x)  # None of a batch in containers, as a loss of the caller's own takes it
        has = "" if size is None else f" The batch has {size} example{'s' if size > 1 else ''};"
        raise ValueError(
            f"batch norm: {error}.{has} give at least 2 examples "
            "(DataLoader(..., drop_last=True) for the last batch), larger inputs, or put the norms in eval mode"
        ) from error


def check_gradient(has_one: bool) -> None:
    """Raise ValueError unless a loss of the step has a gradient."""
    if not has_one:
        raise ValueError(
            "no loss of this step has a gradient: all parameters are frozen, or the losses are cut off from them; "
            "set requires_grad_(True) for those to train"
        )


def refuse_inference_mode() -> None:
    """Raise ValueError where torch does not tell which outputs are changed in place."""
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() hides which outputs are changed in place; use torch.no_grad()")


def run_backward(roots: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """A backward, if it has roots, with advice where it meets the graph of another one of the step."""
    if not roots:
        return
    try:
        # It runs in the types of its forward; autocast around it is not supported by torch.
        with torch.autocast(roots[0].device.type, enabled=False):
            torch.autograd.backward(roots, grads)
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise ValueError(
            "a subnet's loss reaches into the graph of another pass in a way that no module returned: a feature that a "
            "hook or an attribute hands over, or parametrize.cached(); use method(x, y).loss.backward()"
        ) from error


class CheckpointGuard:
    """Refuses a model that recomputes blocks in the backward pass by itself: it would not compute the subnet's.

    In one graph each block may be recomputed alone: there, the forward that is called again is the right one.
    """

    def __init__(self, name: str, *, separate_graphs: bool) -> None:
        self.name, self.separate_graphs, self.with_gradients = name, separate_graphs, torch.is_grad_enabled()
        self.pack: Any = None  # the checkpoint that the last call of a pass was in; None before the first

    def check(self, module: nn.Module) -> None:
        """Before a call of a block, or of a module between blocks."""
        # Torch has no public way to ask whether a call is checkpointed.
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
        pack = hooks[0] if hooks is not None and hooks[0].__module__ == checkpoint.__module__ else None
        found = pack is not None and (self.separate_graphs or pack is self.pack)
        if self.with_gradients and not torch.is_grad_enabled():  # so are the first passes of reentrant checkpoints
            found = any(parameter.requires_grad for parameter in module.parameters())
        if found:
            raise ValueError(
                f"{self.name} checkpoints activations itself, which does not go with shared passes; "
                "switch it off (timm: set_grad_checkpointing(False), transformers: gradient_checkpointing_disable()) "
                "and call unloaf.checkpoint_blocks(model, stages). If it runs modules under no_grad instead, freeze "
                "them: requires_grad_(False)"
            )
        self.pack = pack


def tell_what_is_not_compiled(model: nn.Module) -> None:
    """Warn that steps bypass torch.compile of more than a block: such a graph holds the blocks of one subnet."""
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()):
        warnings.warn(
            "what torch.compile made of the model is not used: steps run subnets as they are, without compilation; "
            "compile the blocks of the model itself instead: unloaf.compile_blocks(model, stages)",
            stacklevel=4,
        )


def uncompiled(model: nn.Module) -> nn.Module:
    """The model below a wrapper of torch.compile, which holds the sequence of blocks of one subnet."""
    model = getattr(model, "_orig_mod", model)
    wrapped = getattr(model, "module", None)
    if hasattr(wrapped, "_orig_mod"):
        raise ValueError(
            f"{type(model).__name__} holds a compiled model, whose passes cannot share blocks; "
            "wrap the model itself, and compile its blocks: unloaf.compile_blocks(model, stages)"
        )
    return model


@contextmanager
def not_compiled(model: nn.Module) -> Iterator[None]:
    """Without what ``module.compile()`` made of the model or of parts of it."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def refuse_auxiliary(output: Any, logits: Tensor) -> None:
    """Raise ValueError for outputs of further heads, which no loss of the logits reaches.

    They have parameters that the logits do not come from (boxes of a detector), or are named as torchvision's GoogLeNet
    and Inception name them, whose heads would also be missed without gradients.
    """
    fields = output._asdict() if hasattr(output, "_asdict") else getattr(output, "__dict__", {})
    entries = output if isinstance(output, Mapping) else fields
    found = [str(name) for name, value in entries.items() if value is not None and _AUXILIARY.match(str(name))]
    others = {
        str(name): value
        for name, value in entries.items()
        if isinstance(value, Tensor) and value.grad_fn is not None and value is not logits and name != "loss"
    }
    reached = _parameters_of(logits) if others else set()
    found += [name for name, value in others.items() if name not in found and not _parameters_of(value) <= reached]
    if found:
        raise ValueError(
            f"the model returned {', '.join(found)} beside its logits, and no loss reaches them: those heads would "
            "never be trained; build it without them (torchvision: aux_logits=False), train them by a loss of your own "
            "(unloaf.GroundTruthTraining, or a readout that joins them), or give readout=lambda output: output.logits "
            "to leave them as they are"
        )


def _parameters_of(tensor: Tensor) -> set[nn.Parameter]:
    """The parameters that a tensor was made by."""
    found: set[nn.Parameter] = set()
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            variable = getattr(node, "variable", None)
            if isinstance(variable, nn.Parameter):
                found.add(variable)
    return found
