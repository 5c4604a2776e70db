"""Self-speculative decoding: the first layers draft, the others verify, and no layer runs twice for a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from unloaf.language.draft_length import LONGEST, DraftLength
from unloaf.language.partial import PartialModel
from unloaf.language.prompts import check_model, checked_mask, context_of, layers_of_draft, stops_and_pad
from unloaf.language.slots import Slots, sliding_windows
from unloaf.language.verification import Choice, Greedy, Guess, Sampled
from unloaf.stages import Stage, evaluating, inner_module
from unloaf.subnet import Subnet


class Round(NamedTuple):
    """A draft and what became of it.

    Attributes:
        drafted: tokens that the draft gave each row.
        accepted: for each row that was not at its end, how many of them the main network took.
    """

    drafted: int
    accepted: tuple[int, ...]


def generate(
    model: nn.Module,
    stages: Sequence[Stage],
    input_ids: Tensor,
    *,
    draft: Subnet | None,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    draft_tokens: int | Literal["auto"] = "auto",
    do_sample: bool = False,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    on_round: Callable[[Round], None] | None = None,
) -> Tensor:
    """The tokens of ordinary decoding, cheaper: an ordered subnet drafts, the layers behind it verify.

    The draft is the network without its last layers. It writes a few tokens one by one; then the layers that it lacks
    run on all of them at once, from the hidden states that it has left, and the main network's tokens are kept as far
    as both agree, and one more. So there is one KV cache, and each layer runs once for each token that is looked at.

    Greedy decoding gives the main network's own tokens, but where two logits are equal to rounding: layers compute
    several tokens at once here, and sum in another order. Sampling draws from the main network's distribution, though
    other tokens than ordinary sampling from the same ``generator``.

    Args:
        model: a causal language model of transformers, whose layers keep keys and values (Llama, Qwen3, Gemma 3,
            Mistral, SmolLM3, GPT-2, OPT, GPT-NeoX and their kind); it is put into eval mode for the time of the call.
        stages: from `find_stages`; they hold all its layers.
        input_ids: prompts, (rows, length).
        draft: its first layers; None decodes without a draft.
        max_new_tokens: at least 1; prompt and new tokens fit into the model's context together.
        attention_mask: (rows, length), 0 where a shorter prompt is padded on the left; default: nothing is padded.
        draft_tokens: how many tokens are drafted at most before they are verified; "auto" stops where the next is
            not worth its cost, in view of the draft's own probability and of how often it was right so far.
        do_sample: draw tokens instead of taking the most probable one.
        temperature: what logits are divided by where tokens are drawn, above 0.
        generator: random numbers on the model's device; default: torch's own.
        eos_token_id: tokens at which a row ends, () for none; default: the model's generation_config.
        pad_token_id: fills rows behind their end; default: the model's generation_config, or a stop token.
        on_round: called after each verification.

    Returns:
        prompts and what follows them, (rows, length + at most max_new_tokens).

    Raises:
        ValueError: the draft is no ordered subnet, prompts are too long or not padded on the left, or the model keeps
            what cannot be cut where drafted tokens are rejected.

    Source: Elhoushi et al. 2024 (LayerSkip), section 4.3; Zhang et al. 2023 (Draft & Verify); Leviathan et al. 2023.

    >>> import torch, transformers, unloaf
    >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=4,
    ...     num_attention_heads=2, eos_token_id=None, bos_token_id=None)
    >>> model, prompt = transformers.LlamaForCausalLM(config).eval(), torch.tensor([[3, 4, 5]])
    >>> stages = unloaf.find_stages(model, {"input_ids": prompt})
    >>> draft = unloaf.Subnet.from_depths(stages, (1,))
    >>> tokens = unloaf.language.generate(model, stages, prompt, draft=draft, max_new_tokens=8)
    >>> torch.equal(tokens, model.generate(prompt, max_new_tokens=8, do_sample=False))
    True
    """
    inner = inner_module(model)
    check_model(inner)
    depth = layers_of_draft(stages, draft)
    stops, pad = stops_and_pad(inner, eos_token_id, pad_token_id, len(input_ids))
    mask = checked_mask(input_ids, attention_mask, pad)
    _check_numbers(max_new_tokens, draft_tokens, temperature, do_sample=do_sample)
    choice = Sampled(temperature, generator) if do_sample else Greedy()
    partial = PartialModel(inner, stages)
    length = _draft_length(partial, depth) if draft_tokens == "auto" and depth is not None else draft_tokens
    context = context_of(inner, mask.sum(-1), max_new_tokens)
    with evaluating(inner), partial.open():
        decoder = Decoder(partial, depth, length, choice, context)
        rows = decoder.run(input_ids, mask, max_new_tokens, stops, on_round)
    width = max(map(len, rows))
    filled = [[*row, *[pad] * (width - len(row))] for row in rows]
    return torch.cat([input_ids, input_ids.new_tensor(filled)], dim=1)


def _check_numbers(new: int, draft_tokens: int | str, temperature: float, *, do_sample: bool) -> None:
    if new < 1:
        raise ValueError(f"max_new_tokens {new}: give at least 1")
    if draft_tokens != "auto" and (not isinstance(draft_tokens, int) or draft_tokens < 1):
        raise ValueError(f"draft_tokens {draft_tokens!r}: give a number of at least 1, or 'auto'")
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature {temperature}: give a number above 0, or do_sample=False for the likeliest token"
        )
    if temperature != 1 and not do_sample:
        raise ValueError(f"temperature {temperature} has no effect where nothing is drawn; give do_sample=True with it")


def head_in_layers(model: nn.Module, blocks: Sequence[nn.Module]) -> float:
    """What the head costs, in layers: by its parameters, as a step reads each of them once."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    layer = sum(p.numel() for block in blocks for p in block.parameters()) / len(blocks)
    return sum(p.numel() for p in head.parameters()) / layer if head is not None and layer else 1.0


def _draft_length(partial: PartialModel, depth: int) -> DraftLength:
    head = head_in_layers(partial.model, list(partial.blocks.values()))
    return DraftLength(draft=depth, main=partial.depth, head=head)


class _Drafted(NamedTuple):
    """What the draft leaves: tokens it was run on, its hidden states for them, and its guesses of the next."""

    tokens: Tensor
    hidden: Tensor
    guesses: list[Guess]


class Decoder:
    """Rows on their way; see `generate`, which has checked everything.

    Args:
        partial: the model, opened.
        depth: layers of the draft, or None.
        length: how many tokens it writes.
        choice: of tokens.
        context: positions that the model has, if it says so.
    """

    def __init__(
        self,
        partial: PartialModel,
        depth: int | None,
        length: DraftLength | int | str,
        choice: Choice,
        context: int | None,
    ) -> None:
        self.partial, self.depth, self.length, self.choice = partial, depth, length, choice
        self.last_position = None if context is None else context - 1
        self.windows = sliding_windows(partial.model)
        # With eager attention the model makes a mask then, as wide as the cache of the first layer is.
        self.takes_no_mask = getattr(partial.model.config, "_attn_implementation", None) == "sdpa"

    def run(
        self,
        prompts: Tensor,
        mask: Tensor,
        new: int,
        stops: frozenset[int],
        on_round: Callable[[Round], None] | None,
    ) -> list[list[int]]:
        """The new tokens of each row."""
        dtype = next(self.partial.model.parameters()).dtype
        self.slots = Slots(mask, self.windows, dtype)
        self.pending = self._read(prompts, mask)
        written = [[token] for token in self.pending[:, 0].tolist()]
        left = self._still_going(written, list(range(len(written))), new, stops)
        while left:
            most = max(new - len(written[row]) for row in left) - 1
            drafted, verdict = self._round(most)
            for place, row in enumerate(left):
                tokens = [*drafted[place][: verdict[place][0]], verdict[place][1]]
                written[row] += _until_end(tokens, new - len(written[row]), stops)
            if on_round is not None:
                on_round(Round(len(drafted[0]), tuple(accepted for accepted, _ in verdict)))
            left = self._still_going(written, left, new, stops)
        return written

    def _still_going(self, written: list[list[int]], left: list[int], new: int, stops: frozenset[int]) -> list[int]:
        going = [place for place, row in enumerate(left) if len(written[row]) < new and written[row][-1] not in stops]
        if going and len(going) < len(left):
            rows = torch.tensor(going, device=self.pending.device)
            self.slots.keep(rows)
            self.pending = self.pending[rows]
        return [left[place] for place in going]

    def _read(self, prompts: Tensor, mask: Tensor) -> Tensor:
        """Runs the prompts, as ordinary decoding does; the first new token, (rows, 1)."""
        logits, _ = self.partial(
            prompts,
            mask=mask.long(),
            logits=1,
            position_ids=self.slots.positions.clamp(min=0),
            past_key_values=self.slots.cache,
            use_cache=True,
        )
        self.slots.check(self.partial.model, self.partial.depth)
        return self.choice.verify([], 0, logits[:, -1:]).token[:, None]

    def _call(self, tokens: Tensor, positions: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """A part of the model on the last slots; positions that a row never reaches may lie beyond the context."""
        count = tokens.shape[1]
        maskless = count == 1 and self.takes_no_mask and self.slots.last_sees_all
        return self.partial(
            tokens,
            mask=None if maskless else self.slots.mask(count),
            position_ids=positions.clamp(max=self.last_position),
            past_key_values=self.slots.cache,
            use_cache=True,
            **options,
        )

    def _round(self, most: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """Drafted tokens of each row, and how many are taken and what follows them."""
        start = self.slots.lengths[:, None]
        resting = isinstance(self.length, DraftLength) and self.length.rests()
        if self.depth is None or most < 1 or resting:
            logits, _ = self._call(self.pending, self.slots.append(1))
            drafted = _Drafted(self.pending, logits[:, :0], [])
        else:
            drafted = self._draft(self.depth, most)
            positions = start + torch.arange(drafted.tokens.shape[1], device=start.device)
            logits, _ = self._call(drafted.tokens, positions, first=self.depth, hidden=drafted.hidden)
        count = drafted.tokens.shape[1] - 1
        verdict = self.choice.verify(drafted.guesses, count, logits)
        self.pending = verdict.token[:, None]
        accepted: list[int] = verdict.accepted.tolist()
        self.slots.drop([count - one for one in accepted])
        self._learn(drafted.guesses, accepted, verdict.overlap)
        return drafted.tokens[:, 1:].tolist(), list(zip(accepted, verdict.token.tolist(), strict=True))

    def _draft(self, depth: int, most: int) -> _Drafted:
        tokens, hiddens, guesses = [self.pending], [], []
        if isinstance(self.length, DraftLength):
            self.length.begin(len(self.pending))
            most = min(most, LONGEST)
        else:
            most = min(most, int(self.length))
        while True:
            ends = len(guesses) == most  # what follows is the main network's to say
            logits, hidden = self._call(tokens[-1], self.slots.append(1), last=depth, logits=int(not ends))
            hiddens.append(hidden)
            if ends:
                break
            guesses.append(self.choice.guess(logits[:, -1]))
            if isinstance(self.length, DraftLength) and not self.length.goes_on(
                self.choice.confidence(guesses[-1]).tolist()
            ):
                break
            tokens.append(guesses[-1].token[:, None])
        return _Drafted(torch.cat(tokens, dim=1), torch.cat(hiddens, dim=1), guesses)

    def _learn(self, guesses: Sequence[Guess], accepted: Sequence[int], overlap: Tensor) -> None:
        if not isinstance(self.length, DraftLength) or not guesses:
            return
        confidences = torch.stack([self.choice.confidence(guess) for guess in guesses], dim=1).tolist()
        for row, taken in enumerate(accepted):
            for confidence, chance in list(zip(confidences[row], overlap[row].tolist(), strict=True))[: taken + 1]:
                self.length.learn(confidence, chance)
        self.length.end(sum(accepted) / len(accepted) + 1)


def _until_end(tokens: Sequence[int], most: int, stops: frozenset[int]) -> list[int]:
    """At most so many of the tokens, up to a stop token."""
    taken = list(tokens[:most])
    end = next((place + 1 for place, token in enumerate(taken) if token in stops), len(taken))
    return taken[:end]
