"""What is checked before a model decodes: prompts, the draft, the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.stages import Stage
from unloaf.subnet import Subnet, check_subnet

_NEEDED = ("input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep")
_ATTENTION = ("sdpa", "eager")


def check_model(model: nn.Module) -> None:
    """Raises ValueError if this is no decoder of transformers that can start at a layer in the middle."""
    name, config = type(model).__name__, getattr(model, "config", None)
    takes = inspect.signature(model.forward).parameters
    missing = [one for one in _NEEDED if one not in takes]
    if config is None or missing or getattr(config, "is_encoder_decoder", False):
        lacks = f"its forward takes no {', '.join(missing)}" if missing else "it is no decoder of transformers"
        raise ValueError(f"{name} cannot be decoded by a draft of its own: {lacks}; give a causal language model")
    attention = getattr(config, "_attn_implementation", "sdpa")
    if attention not in _ATTENTION:
        raise ValueError(
            f"{name} uses attention {attention!r}, which takes no mask of its own for each token; load the model with "
            'attn_implementation="sdpa" or "eager"'
        )
    if getattr(config, "alibi", False):
        raise ValueError(f"{name} has ALiBi, which takes positions from the mask of the prompt; decode without a draft")


def layers_of_draft(stages: Sequence[Stage], draft: Subnet | None) -> int | None:
    """How many of the first layers the draft has.

    Raises:
        ValueError: it is no ordered subnet, or all of the main network.

    >>> stage = Stage("layers", ("layers.0", "layers.1", "layers.2"), (True, True, True))
    >>> layers_of_draft([stage], Subnet.from_depths([stage], (2,)))
    2
    """
    if draft is None:
        return None
    check_subnet(stages, draft)
    kept = [one for stage in draft.keep for one in stage]
    depth = sum(kept)
    if draft.shortcut is not None or not all(kept[:depth]):
        raise ValueError(
            f"draft {draft} is not the first blocks of the network; give Subnet.from_depths(stages, ...), whose last "
            "blocks alone are left out"
        )
    if depth == len(kept):
        raise ValueError(
            f"draft {draft} is the main network itself; give one of 1 to {len(kept) - 1} blocks, or None to decode "
            "without a draft"
        )
    return depth


def checked_mask(input_ids: Tensor, attention_mask: Tensor | None, pad: int | None) -> Tensor:
    """(rows, length) of bool: where a prompt has tokens.

    Raises:
        ValueError: no tokens, another shape, padding on the right or within, or padding that no mask shows.
    """
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids of shape {tuple(input_ids.shape)}: give (rows, length) of token numbers, 1 at least"
        )
    if attention_mask is None:
        if len(input_ids) > 1 and pad is not None and bool((input_ids[:, 0] == pad).any()):
            raise ValueError(f"a prompt begins with the pad token {pad}: give attention_mask, 0 there and 1 elsewhere")
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)}: give that of input_ids, {tuple(input_ids.shape)}"
        )
    mask = attention_mask.bool()
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError("prompts are padded on the right or have gaps, or one is empty; pad them on the left")
    return mask


def context_of(model: nn.Module, lengths: Tensor, new: int) -> int | None:
    """How many tokens the model was made for, if it says so.

    Raises:
        ValueError: a prompt and what is to follow it have more.
    """
    config: Any = model.config
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = int(lengths.max())
    if context is not None and longest + new > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones are {longest + new}; {type(model).__name__} was made for "
            f"{context}: give a shorter prompt, or max_new_tokens of {context - longest} at most"
            if longest < context
            else f"a prompt has {longest} tokens; {type(model).__name__} was made for {context}, new ones included"
        )
    return context


def stops_and_pad(
    model: nn.Module, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None, rows: int
) -> tuple[frozenset[int], int | None]:
    """At which tokens a row ends, and with which it is filled; by default as the model's generation_config says.

    Raises:
        ValueError: rows may end at different times, and there is no token to fill them with.
    """
    settings: Any = getattr(model, "generation_config", None)
    eos = getattr(settings, "eos_token_id", None) if eos_token_id is None else eos_token_id
    stops = frozenset([eos] if isinstance(eos, int) else eos or ())
    pad = getattr(settings, "pad_token_id", None) if pad_token_id is None else pad_token_id
    if pad is None and stops:
        pad = min(stops)  # as transformers does, behind the end it can be told from no other token
    if pad is None and rows > 1 and stops:
        raise ValueError("rows end at different tokens, and the model names no pad token; give pad_token_id")
    return stops, pad
