"""Causal language models: the token that comes next, evaluated in nats per token and by perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unloaf.config import Config
from unloaf.config.figures import FIGURES
from unloaf.data import Batch, Data
from unloaf.data.text.files import TextData, load_text
from unloaf.data.text.sequences import TokenEvalBatches, TokenTrainBatches
from unloaf.evaluation import Reduction
from unloaf.language.losses import (
    IGNORED,
    NextTokenDistance,
    NextTokenLoss,
    defer_head,
    deferred_head,
    giving_features,
)
from unloaf.methods.step import TrainingMethod
from unloaf.methods.table import METHODS
from unloaf.models.language import build_language_model, check_language_model, head_of, save_tokenizer, tokenizer_of
from unloaf.models.lora import add_lora, without_lora
from unloaf.passes import logits_of
from unloaf.stages import Stage, call_model, evaluating, inner_module
from unloaf.tasks.methods import method_options, stages_for, subnet_distance
from unloaf.tasks.task import Task, Where


@dataclass(frozen=True)
class TokenScores:
    """How well the token that comes next is told; NaN where a network gives NaN.

    Attributes:
        loss: mean cross-entropy, in nats per token.
        perplexity: its exponential.
    """

    loss: float
    perplexity: float

    @classmethod
    def of(cls, loss: float) -> TokenScores:
        """Both figures.

        >>> TokenScores.of(0.0)
        TokenScores(loss=0.0, perplexity=1.0)
        """
        return cls(loss, math.exp(loss) if loss < 700 else math.inf if loss == loss else loss)


class Language(Task):
    """The next token of a text, by a causal language model of transformers."""

    figures = FIGURES["language"]

    def load(self, config: Config, *, resumed: bool) -> tuple[Config, TextData, str]:
        """See `Task.load`."""
        data = load_text(config, tokenizer_of(config.model, config.tokenizer))
        return config, data, self.describe(data)

    def describe(self, data: Data) -> str:
        """Sequences, and what their tokens are."""
        text = _text(data)
        tokenizer = text.tokenizer
        return (
            f"inputs: {text.seq_len} tokens ({tokenizer.name}, {tokenizer.size} of them, {tokenizer.end} ends a text)"
        )

    def check(self, config: Config, data: Data) -> None:
        """Nothing is left to be checked: sizes were, when texts were packed, or are when the network is built."""

    def network(self, config: Config, data: Data, *, resumed: bool) -> tuple[nn.Module, tuple[str, ...]]:
        """A causal language model that reads these tokens; see `build_language_model`."""
        text = _text(data)
        model = build_language_model(
            config.model,
            text.tokenizer,
            seq_len=text.seq_len,
            arguments=config.model_arguments,
            pretrained=config.pretrained and not resumed,
        )
        check_language_model(model, config.model)
        lines = [f"of {config.model}: weights of its folder"] if config.pretrained and not resumed else []
        if config.lora_rank is not None:
            lines.append(add_lora(model, config.lora_rank, seed=config.seed))
        head = head_of(model)
        if head is None:
            lines.append("the logits are more than the output of the last layer: losses hold those of all positions")
        else:
            defer_head(head)
        return model, tuple(lines)

    def architecture(self, config: Config, data: Data) -> dict[str, Any]:
        """Its configuration is in the network itself; see `OpenedRun.architecture`."""
        return {"builder": "language", "num_classes": data.num_classes}

    def preprocessing(self, data: Data) -> dict[str, Any]:
        """What a token is."""
        text = _text(data)
        return {"tokenizer": text.tokenizer.name, "end": text.tokenizer.end, "seq_len": text.seq_len}

    def accompany(self, folder: Path, data: Data) -> tuple[str, ...]:
        """The tokenizer, as transformers reads it."""
        save_tokenizer(folder, _text(data).tokenizer)
        return ("tokenizer",)

    def usage(self, data: Data) -> tuple[str, ...]:
        """What goes in and out, for the model card."""
        tokenizer = _text(data).tokenizer
        what = "bytes of UTF-8" if tokenizer.name == "byte" else f"those of the tokenizer {tokenizer.name}"
        return (
            f"The model takes tokens, (batch, length), as `input_ids`: {what}; {tokenizer.end} ends a text. It was "
            f"trained on sequences of {_text(data).seq_len} and returns logits of the token that comes next, (batch, "
            f"length, {data.num_classes}).",
        )

    def example(self, data: Data, count: int) -> dict[str, Any]:
        """Sequences of one text each, (count, L)."""
        text = _text(data)
        positions = torch.arange(text.seq_len).expand(count, -1)
        inputs = positions.remainder(text.num_classes).clone()
        return {"input_ids": inputs, "position_ids": positions.clone(), "use_cache": False}

    def noise(self, data: Data, count: int, seed: int) -> dict[str, Any]:
        """Uniformly drawn tokens, (count, L)."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(data.num_classes, (count, _text(data).seq_len), generator=generator)
        return self.example(data, count) | {"input_ids": tokens}

    def find_stages(self, config: Config, model: nn.Module, data: Data) -> tuple[Stage, ...]:
        """See `Task.find_stages`."""
        return stages_for(config, model, self.example(data, 2))

    def train_batches(self, data: Data, config: Config, where: Where) -> TokenTrainBatches:
        """See `Task.train_batches`."""
        return TokenTrainBatches(data, config, **where._asdict())

    def eval_batches(self, images: Any, data: Data, config: Config, where: Where) -> TokenEvalBatches:
        """See `Task.eval_batches`."""
        return TokenEvalBatches(images, data, config, **where._asdict())

    def method(
        self,
        config: Config,
        model: nn.Module,
        stages: tuple[Stage, ...],
        *,
        steps_per_epoch: int | None = None,
        batches_per_step: int = 1,
    ) -> TrainingMethod:
        """Those of classification, token by token; losses make logits of the features of a few tokens at a time."""
        head = deferred_head(inner_module(model))
        criterion: Any = nn.CrossEntropyLoss() if head is None else NextTokenLoss(head)
        options = method_options(
            config, model, stages, criterion, steps_per_epoch=steps_per_epoch, batches_per_step=batches_per_step
        )
        options["criterion"] = criterion  # of logits as they are, of which the perplexity is, also with KL-
        if "main_logits" in options:
            options["main_logits"] = "raw"
        if head is not None and "subnet_loss" in options:
            options["subnet_loss"] = NextTokenDistance(head, subnet_distance(config))
        if config.method != "st-star":
            options["readout"] = logits_of
        return METHODS[config.method].factory(model, stages, **options)

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], data: Data, *, reduce: Reduction | None
    ) -> TokenScores:
        """See `token_scores`."""
        return token_scores(model, batches, reduce=reduce)

    def finished(self, network: nn.Module) -> nn.Module:
        """With low-rank changes added to the weights."""
        return without_lora(network)


def _text(data: Data) -> TextData:
    assert isinstance(data, TextData)
    return data


def token_scores(model: nn.Module, batches: Iterable[Batch], *, reduce: Reduction | None = None) -> TokenScores:
    """The figures of a language model; the modes of the modules are put back.

    Args:
        model: from keyword arguments to an output with ``logits``.
        batches: keyword arguments and the token that comes next, -100 where there is none.
        reduce: adds a tensor over processes.

    Raises:
        ValueError: no position has a label.
    """
    network = inner_module(model)
    head = deferred_head(network)
    loss = nn.CrossEntropyLoss(ignore_index=IGNORED, reduction="sum") if head is None else NextTokenLoss(head)
    device = next(network.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    with evaluating(network), giving_features(network):
        for x, y in batches:
            outputs = logits_of(call_model(network, x))
            if isinstance(loss, NextTokenLoss):
                total, count = loss.summed(outputs, y)
            else:
                total, count = loss(outputs.flatten(0, -2).float(), y.flatten()), (y != IGNORED).sum()
            sums += torch.stack([total, count.to(total)]).to(sums)
    total, count = (reduce(sums) if reduce else sums).tolist()
    if not count:
        raise ValueError("there is no token to evaluate on; give texts of two tokens at least")
    return TokenScores.of(total / count)
