"""The recipes of `unloaf demo --task language`: a small byte-level Llama on the help pages that come with Python.

Both share text, network, steps and learning rate. Network, steps and number of subnets are the second of three that ST
was tried with, on validation texts: a deep network leaves more to save. 16 layers of width 64 for twice as many steps
were better and take too long. The learning rate is a usual one and was not tuned, for neither method.
"""

from __future__ import annotations

from dataclasses import replace

from unloaf.config import Config


def common() -> Config:
    """Common training: the cross-entropy of the main network alone.

    >>> common().method, common().seq_len
    ('common', 128)
    """
    return Config(
        task="language",
        dataset="text",
        model="hf/LlamaConfig",
        model_kwargs=(
            "hidden_size=96", "intermediate_size=192", "num_hidden_layers=12", "num_attention_heads=4",
            "num_key_value_heads=4", "tie_word_embeddings=True", "max_position_embeddings=512",
        ),
        seq_len=128,
        method="common",
        epochs=1,
        batch_size=4,
        opt="adamw",
        lr=3e-3,
        weight_decay=0.1,
        clip_grad=1.0,
        device="cpu",
    )  # fmt: skip


def stimulative() -> Config:
    """ST: in each step two ordered subnets, early exits, learn from the main network.

    >>> stimulative().method, stimulative().sampler_or_default
    ('st', 'ordered')
    """
    return replace(common(), method="st", num_subnets=2)
