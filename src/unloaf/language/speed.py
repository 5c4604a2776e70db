"""Decoding without a draft, with one, and with transformers' early exit, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unloaf.language.decoding import Round, generate
from unloaf.stages import Stage, evaluating, inner_module
from unloaf.stages.stage import stream_of
from unloaf.subnet import Subnet, check_stages


class DecodingRow(NamedTuple):
    """One way to decode, in the mean over all prompts.

    Attributes:
        decoder: "plain" (transformers' greedy decoding), "unloaf", or "transformers" (its ``assistant_early_exit``).
        depth: layers of the draft; None without one.
        acceptance: share of the drafted tokens that are taken; None where it is not told.
        layer_calls: calls of layers per new token, over the main network's layers: 1 without a draft.
        layer_tokens: the same where a call counts for each of the tokens that it gets.
        tokens_per_second: new ones, the prompts' time included; median over rounds. None where nothing was timed.
        speed: over plain.
        same: the share of the prompts whose new tokens are those of plain decoding.
        note: why it does not run here.
    """

    decoder: str
    depth: int | None
    acceptance: float | None = None
    layer_calls: float | None = None
    layer_tokens: float | None = None
    tokens_per_second: float | None = None
    speed: float | None = None
    same: float | None = None
    note: str = ""


class _Way:
    """A way to decode, and what was seen of it."""

    def __init__(self, decoder: str, depth: int | None, call: Callable[[Tensor], Tensor]) -> None:
        self.decoder, self.depth, self.call = decoder, depth, call
        self.rounds: list[Round] = []
        self.texts: list[Tensor] = []
        self.calls = self.tokens = 0
        self.seconds: list[float] = []
        self.note = ""

    def count(self, blocks: Sequence[nn.Module], prompts: Sequence[Tensor]) -> None:
        """Decodes once, counting layers; transformers knows models that it cannot leave early by failing."""
        try:
            with _counted(blocks) as counts:
                self.texts = [self.call(prompt) for prompt in prompts]
            self.calls, self.tokens = counts
        except Exception as error:  # whatever a model raises whose layers are cut off
            if self.decoder != "transformers":
                raise
            first = next(iter(str(error).splitlines()), "")
            self.note = f"transformers cannot: {type(error).__name__}: {first[:120]}"

    def new_tokens(self, prompts: Sequence[Tensor]) -> int:
        """Of all texts."""
        return sum(text.shape[1] - prompt.shape[1] for text, prompt in zip(self.texts, prompts, strict=True))

    def time(self, prompts: Sequence[Tensor]) -> None:
        """Decodes once more."""
        start = time.perf_counter()
        for prompt in prompts:
            self.call(prompt)
        _wait_for(prompts[0].device)
        self.seconds.append(time.perf_counter() - start)


def measure_decoding(
    model: nn.Module,
    stages: Sequence[Stage],
    prompts: Sequence[Tensor],
    drafts: Sequence[Subnet],
    *,
    max_new_tokens: int = 64,
    draft_tokens: Any = "auto",
    repeats: int = 3,
    early_exit: bool = True,
) -> list[DecodingRow]:
    """What greedy decoding costs by layers and by the clock, with each draft here and in transformers.

    All ways decode one prompt after another in this process, in turns, so that a machine which slows down slows all.

    Args:
        model: a causal language model of transformers; it is put into eval mode for the time of the call.
        stages: they hold all its layers.
        prompts: (1, length) each, on the model's device.
        drafts: ordered subnets.
        max_new_tokens: for each prompt, at most.
        draft_tokens: of `generate`; transformers adapts by rules of its own.
        repeats: rounds that are timed; 0 measures no time.
        early_exit: decode with transformers' ``assistant_early_exit`` too.

    Raises:
        ValueError: no prompt, or as `generate`.

    >>> import torch, transformers, unloaf
    >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=4,
    ...     num_attention_heads=2, eos_token_id=None, bos_token_id=None)
    >>> model, prompt = transformers.LlamaForCausalLM(config).eval(), torch.tensor([[3, 4, 5]])
    >>> stages = unloaf.find_stages(model, {"input_ids": prompt})
    >>> draft = unloaf.Subnet.from_depths(stages, (1,))
    >>> rows = unloaf.language.measure_decoding(model, stages, [prompt], [draft], max_new_tokens=8, repeats=0)
    >>> [(row.decoder, row.layer_calls) for row in rows[:1]], [row.same for row in rows]
    ([('plain', 1.0)], [1.0, 1.0, 1.0])
    """
    if not prompts:
        raise ValueError("no prompts: give at least one")
    inner: Any = inner_module(model)
    blocks = list(check_stages(inner, stages).values())
    ways = _ways(inner, stages, drafts, max_new_tokens, draft_tokens)
    ways = [way for way in ways if early_exit or way.decoder != "transformers"]
    with evaluating(inner):  # transformers decodes in the mode that the model is in, with dropout while it is trained
        for way in ways:
            way.count(blocks, prompts)
        running = [way for way in ways if not way.note]
        for _ in range(repeats):
            for way in running:
                way.time(prompts)
    return [_row(way, ways[0], prompts, len(blocks)) for way in ways]


def _ways(inner: Any, stages: Sequence[Stage], drafts: Sequence[Subnet], new: int, draft_tokens: Any) -> list[_Way]:
    pad = inner.generation_config.pad_token_id

    def theirs(prompt: Tensor, **options: Any) -> Tensor:
        mask = torch.ones_like(prompt)
        settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0 if pad is None else pad}
        return inner.generate(prompt, attention_mask=mask, **settings, **options)

    def own(draft: Subnet) -> _Way:
        way = _Way("unloaf", sum(map(sum, draft.keep)), lambda prompt: prompt)
        options = {"draft": draft, "max_new_tokens": new, "draft_tokens": draft_tokens}
        way.call = lambda prompt: generate(inner, stages, prompt, on_round=way.rounds.append, **options)
        return way

    ways = [_Way("plain", None, theirs)]
    for draft in drafts:
        mine = own(draft)
        depth = mine.depth
        ways += [
            mine,
            _Way("transformers", depth, lambda prompt, depth=depth: theirs(prompt, assistant_early_exit=depth)),
        ]
    return ways


@contextmanager
def _counted(blocks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Calls of layers, and their tokens; of the first module in each, which a layer that is skipped does not call."""
    counts = [0, 0]

    def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = stream_of(args, kwargs)
        counts[0] += 1
        counts[1] += 0 if stream is None else stream.shape[0] * stream.shape[1]

    inside = [next(block.children()) for block in blocks]
    handles = [module.register_forward_pre_hook(seen, with_kwargs=True) for module in inside]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(way: _Way, plain: _Way, prompts: Sequence[Tensor], depth: int) -> DecodingRow:
    if way.note:
        return DecodingRow(way.decoder, way.depth, note=way.note)
    new = way.new_tokens(prompts)
    read = sum(prompt.shape[1] for prompt in prompts)
    drafted = sum(one.drafted * len(one.accepted) for one in way.rounds)
    same = sum(torch.equal(a, b) for a, b in zip(way.texts, plain.texts, strict=True))
    seconds = median(way.seconds) if way.seconds else None
    return DecodingRow(
        way.decoder,
        way.depth,
        acceptance=sum(sum(one.accepted) for one in way.rounds) / drafted if drafted else None,
        layer_calls=way.calls / depth / new,
        layer_tokens=(way.tokens - depth * read) / depth / max(1, new - len(prompts)),
        tokens_per_second=None if seconds is None else new / seconds,
        speed=None if seconds is None else new / seconds / (plain.new_tokens(prompts) / median(plain.seconds)),
        same=same / len(prompts),
    )
