"""Texts packed into sequences of tokens, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unloaf.data.batches import IGNORED, Batch, EvalBatches, TrainBatches
from unloaf.data.images import BadImageError
from unloaf.data.reading import Chunk, Keys


@dataclass(frozen=True, eq=False)
class TokenSequences:
    """Sequences of tokens, int32 (N, L) each.

    Attributes:
        inputs: what the network sees.
        labels: the token that comes next in the same text, -100 where sequences are filled up.
        positions: of a token in its text or, where a sequence begins within one, in the sequence: a token attends to
            those before it down to position 0.
        place: where the texts are from.
    """

    inputs: Tensor
    labels: Tensor
    positions: Tensor
    place: str = ""

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def tokens(self) -> int:
        """Positions that have a label."""
        return int((self.labels != IGNORED).sum())

    def subset(self, index: Tensor) -> TokenSequences:
        """The sequences at these places."""
        return TokenSequences(self.inputs[index], self.labels[index], self.positions[index], self.place)

    def name(self, index: int) -> str:
        """For messages."""
        return f"sequence {index}"

    def open(self, index: int) -> Any:
        """There is no image to decode."""
        raise BadImageError(self.name(index), "it is text")


def packed(texts: Sequence[Tensor], length: int, *, pad: int, place: str = "") -> TokenSequences:
    """Texts one behind the other, cut into sequences; no token predicts one of another text.

    Of a text that is cut, the last token of a sequence predicts the first one of the next: nothing is lost.

    Args:
        texts: tokens of each, int32, the one that ends it included.
        length: tokens of a sequence.
        pad: the token that fills the last one, without a label.
        place: where they are from.

    >>> found = packed([torch.tensor([1, 2, 3, 0]), torch.tensor([4, 5, 0])], 4, pad=9)
    >>> found.inputs.tolist(), found.labels.tolist(), found.positions.tolist()
    ([[1, 2, 3, 4], [5, 9, 9, 9]], [[2, 3, 0, 5], [0, -100, -100, -100]], [[0, 1, 2, 0], [0, 0, 1, 2]])
    """
    pieces = [text.to(torch.int32) for text in texts if len(text) > 1]
    empty = torch.empty(0, dtype=torch.int32)
    inputs = torch.cat([empty, *(piece[:-1] for piece in pieces)])
    labels = torch.cat([empty, *(piece[1:] for piece in pieces)])
    begins = torch.zeros(len(inputs), dtype=torch.bool)
    lengths = torch.tensor([0, *(len(piece) - 1 for piece in pieces)])
    begins[lengths.cumsum(0)[:-1].clamp(max=max(0, len(inputs) - 1))[: len(pieces)]] = True
    missing = -len(inputs) % length
    inputs = torch.cat([inputs, torch.full((missing,), pad, dtype=torch.int32)])
    labels = torch.cat([labels, torch.full((missing,), IGNORED, dtype=torch.int32)])
    filled = torch.zeros(missing, dtype=torch.bool)
    filled[:1] = True
    begins = torch.cat([begins, filled]).view(-1, length)
    at = torch.arange(length, dtype=torch.int32).expand(begins.shape)
    latest = torch.where(begins, at, 0).cummax(1).values if len(begins) else at
    return TokenSequences(inputs.view(-1, length), labels.view(-1, length), at - latest, place)


class TokenReader:
    """Sequences by key."""

    def __init__(self, sequences: TokenSequences) -> None:
        self._sequences = sequences

    def __getitems__(self, keys: Keys) -> Chunk:
        """Those of a batch."""
        some = self._sequences.subset(torch.tensor(keys.images))
        inputs = {"input_ids": some.inputs.long(), "position_ids": some.positions.long()}
        return Chunk(inputs, some.labels.long(), torch.zeros(len(some), dtype=torch.bool), ())


def _on_device(chunk: Chunk, labels: Tensor, device: torch.device) -> Batch:
    inputs: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in chunk.images.items()}
    # A cache is of no use here, and with one transformers does not see that texts are packed.
    return Batch(inputs | {"use_cache": False}, labels.to(device, non_blocking=True))


class TokenTrainBatches(TrainBatches):
    """The training batches of one process: x are keyword arguments of a network of transformers, tensors int64 (B, L);
    y is the token that comes next, int64 (B, L), -100 where there is none.
    """

    def _reader(self, images: Any) -> TokenReader:
        return TokenReader(images)

    def _placed(self, chunk: Chunk) -> Batch:
        return _on_device(chunk, chunk.labels, self._device)


class TokenEvalBatches(EvalBatches):
    """The same of evaluation, in the order of the texts."""

    def _reader(self, images: Any) -> TokenReader:
        return TokenReader(images)

    def _placed(self, chunk: Chunk, left_out: Tensor) -> Batch:
        return _on_device(chunk, chunk.labels.masked_fill(left_out[:, None], IGNORED), self._device)
