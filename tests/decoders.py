"""Small decoders of each family of transformers, whose weights are large enough that texts do not repeat a token."""

from typing import Any

import torch
import transformers

VOCAB = 64
_IDS = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "max_position_embeddings": 128}
_LLAMA = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 128}
# Windows shorter than the texts, so that they matter.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", _LLAMA),
    "Qwen3": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "Gemma 3": ("Gemma3ForCausalLM", {**_LLAMA, "head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2}),
    "Mistral": ("MistralForCausalLM", {**_LLAMA, "sliding_window": 8}),
    "SmolLM3": ("SmolLM3ForCausalLM", _LLAMA),
    "GPT-2": ("GPT2LMHeadModel", _GPT2),
    "OPT": ("OPTForCausalLM", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {**_SIZES, "intermediate_size": 48}),
}


def decoder(family: str, **changes: Any) -> Any:
    """The same weights every time."""
    name, options = FAMILIES[family]
    kind = getattr(transformers, name)
    config = kind.config_class if family != "Gemma 3" else transformers.Gemma3TextConfig
    torch.manual_seed(0)
    settings = {**_IDS, "tie_word_embeddings": False, **options, **changes}
    model = kind(config(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


def prompts(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask of prompts of 1 to 9 tokens, padded on the left."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, 9), generator=draw)
    lengths = torch.randint(1, 10, (rows, 1), generator=draw)
    lengths[0] = 9
    mask = (torch.arange(9) >= 9 - lengths).long()
    return ids * mask, mask
