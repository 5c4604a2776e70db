"""Masked autoencoders of transformers (ViT-MAE): built from a configuration, with outputs that losses here read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.models.hf import read_configuration, set_entries
from unloaf.models.offline import offline


def masked_config(
    name: str, *, in_chans: int, img_size: int, mask_ratio: float, norm_pix_loss: bool, given: Mapping[str, Any]
) -> Any:
    """The configuration of a masked autoencoder.

    Args:
        name: "hf/FOLDER" with a config.json, or "hf/ViTMAEForPreTraining" for default values.
        in_chans: channels of the images.
        img_size: side in pixels.
        mask_ratio: share of the patches that is hidden.
        norm_pix_loss: whether the pixels of a patch are normalised before they are compared.
        given: further entries, such as ``{"hidden_size": 64}``.

    Raises:
        ValueError: it is of another network, has no such entry, or patches do not fill the image.
    """
    bare = name.removeprefix("hf/")
    config = read_configuration(bare)
    if type(config).__name__ != "ViTMAEConfig":
        raise ValueError(
            f"model {name} is a {type(config).__name__}; task masked trains hf/ViTMAEForPreTraining, or a folder with "
            "its config.json"
        )
    own = {"num_channels": in_chans, "image_size": img_size, "mask_ratio": mask_ratio, "norm_pix_loss": norm_pix_loss}
    set_entries(config, given, own=own)
    for key, value in own.items():
        setattr(config, key, value)
    if img_size % config.patch_size:
        raise ValueError(
            f"img_size {img_size} is no multiple of the patches' {config.patch_size} pixels; give another, or "
            "--model-kwargs patch_size=..."
        )
    for key in ("hidden_size", "decoder_hidden_size"):
        if getattr(config, key) % 4:
            raise ValueError(f"model_kwargs {key}={getattr(config, key)}: give a multiple of 4, for sines and cosines")
    if not 0 < int(patches_of(config) * (1 - mask_ratio)) < patches_of(config):
        raise ValueError(
            f"mask_ratio {mask_ratio:g} leaves nothing to see or to hide of {patches_of(config)} patches; give another"
        )
    return config


def patches_of(config: Any) -> int:
    """How many patches an image has."""
    return (config.image_size // config.patch_size) ** 2


def build_masked(config: Any, *, folder: Path | None = None) -> nn.Module:
    """The network, with fresh weights from torch's global generator or, of a folder, its own.

    It takes images, (B, C, S, S), and noise, (B, patches): of each image the patches of the highest noise are hidden.
    It returns a mapping: ``logits``, the reconstructed patches (B, patches, pixels); ``target``, what they should be;
    ``hidden``, 1 where they are hidden, (B, patches); and ``features``, the encoder's output (B, visible + 1, width).
    """
    with offline():
        kind = _kind()
        if folder is None:
            return _begun(kind(config))
        return kind.from_pretrained(folder, config=config, local_files_only=True)


def _begun(network: Any) -> nn.Module:
    """The network with the positions that it is to have: transformers 5.23 leaves them at 0 in fresh weights.

    Its embeddings return before they set them, as their projection counts as done by then, and its decoder's are set
    and then zeroed. Without positions nothing but the mean patch can be reconstructed.
    """
    config, embeddings, decoder = network.config, network.vit.embeddings, network.decoder
    side = config.image_size // config.patch_size
    with torch.no_grad():
        embeddings.position_embeddings[0, 1:] = positions(side, config.hidden_size)
        decoder.decoder_pos_embed[0, 1:] = positions(side, config.decoder_hidden_size)
        nn.init.xavier_uniform_(embeddings.patch_embeddings.projection.weight.flatten(1))
        for token in (embeddings.cls_token, decoder.mask_token):
            nn.init.normal_(token, std=config.initializer_range)
    return network


def positions(side: int, width: int) -> Tensor:
    """Fixed sines and cosines of column and row, (side * side, width), in the order of the published weights.

    Source: He et al. 2022 (MAE), appendix A.1; Vaswani et al. 2017 for the frequencies.

    >>> positions(2, 4)[1]  # row 0, column 1
    tensor([0.8415, 0.5403, 0.0000, 1.0000])
    """
    frequencies = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    row, column = (torch.arange(side * side)[:, None] // side, torch.arange(side * side)[:, None] % side)
    return torch.cat([wave(place * frequencies) for place in (column, row) for wave in (torch.sin, torch.cos)], dim=1)


@cache
def _kind() -> Any:
    """Made when it is asked for: transformers takes its time."""
    from transformers import ViTMAEForPreTraining

    class MaskedAutoencoder(ViTMAEForPreTraining):
        """ViT-MAE whose weights keep their names."""

        # The engine hands over nothing else of what theirs takes.
        def forward(self, pixel_values: Tensor, noise: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            found = self.vit(pixel_values, noise=noise)
            logits = self.decoder(found.last_hidden_state, found.ids_restore).logits
            target = self.patchify(pixel_values)
            if self.config.norm_pix_loss:
                spread = (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
                target = (target - target.mean(dim=-1, keepdim=True)) / spread
            hidden = found.mask.to(logits.dtype)
            return {"logits": logits, "target": target, "hidden": hidden, "features": found.last_hidden_state}

    return MaskedAutoencoder


def whole_features(network: Any, images: Tensor) -> Tensor:
    """What the encoder says of whole images: the mean of its patches' features, (B, width)."""
    ratio = network.config.mask_ratio
    noise = torch.arange(patches_of(network.config), device=images.device, dtype=images.dtype).expand(len(images), -1)
    try:
        network.config.mask_ratio = 0.0
        return network.vit(images, noise=noise).last_hidden_state[:, 1:].mean(1)
    finally:
        network.config.mask_ratio = ratio
