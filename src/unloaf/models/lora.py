"""Low-rank changes of the linear layers, trained instead of the weights (Hu et al. 2021); the layers are peft's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def add_lora(model: nn.Module, rank: int, *, seed: int) -> str:
    """Puts a low-rank change beside each linear layer but the last, and freezes everything else.

    Paths and keys of modules between the linear layers stay, so that stages are found as before.

    Args:
        model: a language model of transformers.
        rank: of the changes.
        seed: of their first weights; a change is zero at first.

    Returns:
        a line that says what is trained.

    Raises:
        ValueError: peft is not installed, or knows no linear layers of this model.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"lora_rank {rank} needs peft, which is not installed; pip install 'unloaf[language]'"
        ) from error
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    whole = sum(p.numel() for p in model.parameters())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise ValueError(f"lora_rank {rank}: {' '.join(str(error).split())[:200]}") from error
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"LoRA of rank {rank}: {count:,} weights are trained beside {whole:,} that stay as they are"


def without_lora(network: nn.Module) -> nn.Module:
    """The network with the changes added to its weights, a copy; itself where there are none."""
    if not any(_is_lora(module) for module in network.modules()):
        return network
    network = copy.deepcopy(network)
    for path, module in list(network.named_modules()):
        if _is_lora(module):
            layer: Any = module
            layer.merge(safe_merge=True)
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, layer.get_base_layer())
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    vars(network).pop("peft_config", None)
    return network


def _is_lora(module: nn.Module) -> bool:
    """Found by what the layer has, without importing peft."""
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")
