"""One KV cache of rows that may hold different numbers of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def sliding_windows(model: nn.Module) -> tuple[int | None, ...]:
    """For each layer how many tokens it attends to, or None for all.

    Raises:
        ValueError: a layer keeps something else than the keys and values of its own tokens.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    config: Any = model.config
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ()
    found: list[int | None] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        kind = kinds[index] if index < len(kinds) else type(layer).__name__
        if type(layer) is DynamicLayer:
            found.append(None)
        elif type(layer) is DynamicSlidingWindowLayer and kind != "chunked_attention":
            found.append(layer.sliding_window)
        else:
            raise ValueError(
                f"layer {index} of {type(model).__name__} ({kind}) keeps a state that cannot be cut where drafted "
                "tokens are rejected; only a cache of a key and a value for each token can be"
            )
    return tuple(found)


class Slots:
    """Keys and values of all layers, and which token of its row is in which slot.

    Slots hold the tokens of a row in order; rows with fewer tokens begin with empty ones. Layers keep all tokens, also
    those with a sliding window: it is a matter of the mask.

    Attributes:
        cache: transformers' own; layers append to it.
        positions: (rows, slots), the number of the token within its row, or -1.
        last_sees_all: whether the last token of every row may attend to all slots, so that it needs no mask.

    >>> slots = Slots(torch.tensor([[0, 1, 1], [1, 1, 1]]), (None, 2), torch.float32)
    >>> slots.positions
    tensor([[-1,  0,  1],
            [ 0,  1,  2]])
    >>> slots.lengths
    tensor([2, 3])
    """

    def __init__(self, mask: Tensor, windows: tuple[int | None, ...], dtype: torch.dtype) -> None:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache()
        self.positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, -1)
        self._windows, self._dtype = windows, dtype
        self._note_gaps()

    @property
    def lengths(self) -> Tensor:
        """(rows,), the tokens of each."""
        return self.positions[:, -1] + 1

    def append(self, count: int) -> Tensor:
        """Reserves slots for the next tokens of every row; returns their positions, (rows, count)."""
        new = self.lengths[:, None] + torch.arange(count, device=self.positions.device)
        self.positions = torch.cat([self.positions, new], dim=1)
        return new

    def _note_gaps(self) -> None:
        self.last_sees_all = not any(self._windows) and bool((self.positions >= 0).all())

    def mask(self, count: int) -> Tensor | Mapping[str, Tensor]:
        """What the last ``count`` tokens may attend to: 0, or the lowest number where they may not.

        (rows, 1, count, slots), or two of them by transformers' names where layers differ in their windows.
        """
        kinds = dict.fromkeys(self._windows)
        made = {window: self._mask_of(count, window) for window in kinds}
        if len(made) == 1:
            return next(iter(made.values()))
        return {"full_attention" if window is None else "sliding_attention": mask for window, mask in made.items()}

    def _mask_of(self, count: int, window: int | None) -> Tensor:
        keys, queries = self.positions[:, None, :], self.positions[:, -count:, None]
        hidden = (keys < 0) | (keys > queries)
        if window is not None:
            hidden |= keys <= queries - window
        blank = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device)
        return blank.masked_fill_(hidden, torch.finfo(self._dtype).min)[:, None]

    def check(self, model: nn.Module, depth: int) -> None:
        """Raises ValueError if the layers have not all written one key for each slot."""
        lengths = [layer.get_seq_length() for layer in self.cache.layers]
        if lengths != [self.positions.shape[1]] * depth:
            raise ValueError(
                f"{type(model).__name__} has {depth} blocks in its stages, and its cache has {len(lengths)} layers "
                f"with {sorted(set(lengths))} tokens each, for {self.positions.shape[1]} tokens; its cache cannot be "
                "cut block by block"
            )

    def drop(self, counts: list[int]) -> None:
        """Removes as many of each row's last tokens."""
        least = min(counts)
        if least:
            self.cache.crop(-least)
            self.positions = self.positions[:, :-least]
        shifts = torch.tensor(counts, device=self.positions.device) - least
        if bool((shifts > 0).any()):
            self._shift(shifts)

    def _shift(self, shifts: Tensor) -> None:
        """Moves rows to the right, over their last tokens, so that all end in the last slot."""
        sources = torch.arange(self.positions.shape[1], device=shifts.device) - shifts[:, None]
        positions = self.positions.gather(1, sources.clamp(min=0)).masked_fill(sources < 0, -1)
        used = int((positions >= 0).any(0).int().argmax())  # slots before are empty in all rows
        sources, self.positions = sources[:, used:].clamp(min=0), positions[:, used:]
        self._note_gaps()
        index = sources[:, None, :, None]
        for layer in self.cache.layers:
            layer.keys, layer.values = (
                tensor.gather(2, index.to(tensor.device).expand(-1, tensor.shape[1], -1, tensor.shape[3]))
                for tensor in (layer.keys, layer.values)
            )

    def keep(self, rows: Tensor) -> None:
        """Forgets all rows but these."""
        self.cache.batch_select_indices(rows)
        self.positions = self.positions[rows]
        self._note_gaps()
